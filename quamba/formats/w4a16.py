"""int4 weights with a scale per group of input features, 16-bit inputs."""

from __future__ import annotations

import torch

from quamba.errors import UserError
from quamba.formats.format import Format, Grid, Tensors, clip_search, group_size
from quamba.packing import NIBBLES, pack_int4
from quamba.recipe import LinearSpec
from quamba_kernels import Op, ops
from quamba_kernels.ops.linear import dequantize_int4

RATIOS = [1 - 0.03 * i for i in range(1, 15)]


def check_features(features: int, name: str) -> None:
    """Raises UserError when K does not fill whole words of eight nibbles."""
    if features % NIBBLES:
        raise UserError(
            f"format {name} packs input features by {NIBBLES}, got a linear with {features}; "
            "give that role format w8a8 or float in the recipe"
        )


class Int4Grid(Grid):
    """value = scale[o, group] * code, code in [-8, 7], scale rounded to fp16.

    The scale is negative where the largest magnitude of a group is positive and -8 serves it better than 7.
    """

    bounds = (-8, 7)

    def __init__(self, features: int, outputs: int, size: int, search: bool) -> None:
        self.size, self.search = size, search
        self.scale = torch.ones(outputs, features // size, dtype=torch.float16)

    def begin(self, weight: torch.Tensor, importance: torch.Tensor) -> None:
        self.scale = self.scale.to(weight.device)
        for group in range(self.scale.shape[1]):
            span = slice(group * self.size, (group + 1) * self.size)
            self.fit(group, weight[:, span], importance[span])

    def fit(self, group: int, weight: torch.Tensor, importance: torch.Tensor) -> None:
        def error(s: torch.Tensor) -> torch.Tensor:
            s = s.half().float().unsqueeze(1)
            rounded = torch.round(weight / s).clamp_(-8, 7) * s
            return (rounded - weight).square() @ importance

        peak, at = weight.abs().max(1)
        tiny, huge = torch.finfo(torch.float16).smallest_normal, torch.finfo(torch.float16).max
        peak = peak.clamp_max(7 * huge)  # beyond it codes saturate
        if not self.search:
            scale = (peak / 7).clamp_min(tiny)
        else:
            sign = torch.where(weight.gather(1, at[:, None]).squeeze(1) > 0, -1.0, 1.0)
            wide, wide_error = clip_search(error, (peak / 8).clamp_min(tiny) * sign, RATIOS)
            plain, plain_error = clip_search(error, (peak / 7).clamp_min(tiny), RATIOS)
            scale = torch.where(wide_error < plain_error, wide, plain)
        self.scale[:, group] = scale.half()

    def step(self, group: int) -> torch.Tensor:
        return self.scale[:, group].float()

    def pack(self, codes: torch.Tensor) -> Tensors:
        return {"weight_packed": pack_int4(codes.to(torch.int8)), "weight_scale": self.scale}


class W4A16(Format):
    """linear_w4a16 over weight_packed int32 [O, K/8] and weight_scale fp16 [O, K/S]."""

    name = "w4a16"
    int8_input = False
    grouped = True

    def tensors(self, features: int, outputs: int, spec: LinearSpec) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        check_features(features, self.name)
        size = group_size(spec.group_size, features)
        return {
            "weight_packed": ((outputs, features // NIBBLES), torch.int32),
            "weight_scale": ((outputs, features // size), torch.float16),
        }

    def grid(self, features: int, outputs: int, spec: LinearSpec) -> Grid:
        check_features(features, self.name)
        return Int4Grid(features, outputs, group_size(spec.group_size, features), spec.search)

    def dequantize(self, tensors: Tensors) -> torch.Tensor:
        return dequantize_int4(tensors["weight_packed"], tensors["weight_scale"])

    def step(self, tensors: Tensors) -> torch.Tensor:
        return tensors["weight_scale"].float().abs()

    @property
    def op(self) -> Op:
        return ops.linear_w4a16


FORMAT = W4A16()
