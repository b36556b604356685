"""Two-level int4 weights (code = q4 * m inside int8, as QServe's progressive scales), int8 inputs."""

from __future__ import annotations

import torch

from quamba.formats.format import Format, Grid, Tensors, group_size
from quamba.formats.w4a16 import check_features
from quamba.packing import NIBBLES, pack_int4
from quamba.recipe import LinearSpec
from quamba_kernels import Op, ops
from quamba_kernels.ops.linear import expand_two_level

M_MAX = 17
CLIPS = [1 - 0.04 * i for i in range(13)]
"""Group scales tried, as shares of max |w| / 7."""
ANCHORS = [17.0, 16.0, 15.0, 14.0, 13.0, 12.0, 11.0]
"""Multipliers that the widest group of a row is offered when the row's scale is chosen."""


class TwoLevelGrid(Grid):
    """value = scale[o] * m[o, group] * q4, q4 in [-7, 7], m an integer in 1..17."""

    bounds = (-7, 7)

    def __init__(self, features: int, outputs: int, size: int, search: bool) -> None:
        self.size, self.search = size, search
        self.scale = torch.ones(outputs)
        self.multiplier = torch.ones(outputs, features // size, dtype=torch.int8)

    def begin(self, weight: torch.Tensor, importance: torch.Tensor) -> None:
        self.scale, self.multiplier = self.scale.to(weight.device), self.multiplier.to(weight.device)
        groups = weight.unflatten(1, (-1, self.size))  # O J S
        weights = importance.view(-1, self.size)
        peak = groups.abs().amax(2)
        peak = torch.where(peak > 0, peak, peak.amax().clamp_min(1e-12) / 100)
        self.scale = (peak / 7).amax(1) / M_MAX
        self.multiplier = (peak / 7 / self.scale[:, None]).round().clamp_(1, M_MAX).to(torch.int8)
        if not self.search:
            return
        curve = torch.stack([self._error(groups, weights, peak / 7 * c) for c in CLIPS], -1)  # O J clips
        ideal = peak / 7 * weight.new_tensor(CLIPS)[curve.argmin(-1)]
        best = self._error(groups, weights, self.multiplier * self.scale[:, None]).sum(1)
        for anchor in ANCHORS:
            scale = ideal.amax(1) / anchor
            multiplier, error = self._choose(groups, weights, scale, ideal)
            better = error.sum(1) < best
            best = torch.where(better, error.sum(1), best)
            self.scale = torch.where(better, scale, self.scale)
            self.multiplier = torch.where(better[:, None], multiplier.to(torch.int8), self.multiplier)

    @staticmethod
    def _error(groups: torch.Tensor, importance: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Weighted squared error [O, J] of groups [O, J, S] rounded with a step [O, J]."""
        s = step.unsqueeze(2)
        rounded = torch.round(groups / s).clamp_(-7, 7) * s
        return ((rounded - groups).square() * importance).sum(2)

    def _choose(
        self, groups: torch.Tensor, importance: torch.Tensor, scale: torch.Tensor, ideal: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best multiplier near ideal / scale for every group, and its error, both [O, J]."""
        middle = (ideal / scale[:, None]).floor()
        best, least = middle.clamp(1, M_MAX), torch.full_like(middle, torch.inf)
        for shift in (0, 1):
            multiplier = (middle + shift).clamp(1, M_MAX)
            error = self._error(groups, importance, multiplier * scale[:, None])
            better = error < least
            best, least = torch.where(better, multiplier, best), torch.where(better, error, least)
        return best, least

    def fit(self, group: int, weight: torch.Tensor, importance: torch.Tensor) -> None:
        if not self.search:
            return
        peak = weight.abs().amax(1, keepdim=True).clamp_min(1e-12)
        groups, weights = weight.unsqueeze(1), importance.unsqueeze(0)
        curve = torch.stack([self._error(groups, weights, peak / 7 * c) for c in CLIPS], -1)
        ideal = peak / 7 * weight.new_tensor(CLIPS)[curve.argmin(-1)]
        self.multiplier[:, group] = self._choose(groups, weights, self.scale, ideal)[0].squeeze(1).to(torch.int8)

    def step(self, group: int) -> torch.Tensor:
        return self.scale * self.multiplier[:, group].float()

    def pack(self, codes: torch.Tensor) -> Tensors:
        return {
            "weight_packed": pack_int4(codes.to(torch.int8)),
            "weight_multiplier": self.multiplier,
            "weight_scale": self.scale.float(),
        }


class W4A8(Format):
    """linear_w4a8 over weight_packed int32 [O, K/8], weight_multiplier int8 [O, K/S], weight_scale fp32 [O]."""

    name = "w4a8"
    int8_input = True
    grouped = True

    def tensors(self, features: int, outputs: int, spec: LinearSpec) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        check_features(features, self.name)
        size = group_size(spec.group_size, features)
        return {
            "weight_packed": ((outputs, features // NIBBLES), torch.int32),
            "weight_multiplier": ((outputs, features // size), torch.int8),
            "weight_scale": ((outputs,), torch.float32),
        }

    def grid(self, features: int, outputs: int, spec: LinearSpec) -> Grid:
        check_features(features, self.name)
        return TwoLevelGrid(features, outputs, group_size(spec.group_size, features), spec.search)

    def dequantize(self, tensors: Tensors) -> torch.Tensor:
        codes = expand_two_level(tensors["weight_packed"], tensors["weight_multiplier"])
        return codes.float() * tensors["weight_scale"].unsqueeze(1)

    def step(self, tensors: Tensors) -> torch.Tensor:
        return tensors["weight_multiplier"].float() * tensors["weight_scale"].unsqueeze(1)

    @property
    def op(self) -> Op:
        return ops.linear_w4a8


FORMAT = W4A8()
