"""int8 weights with a scale per output channel, int8 inputs."""

from __future__ import annotations

import torch

from quamba.formats.format import Format, Grid, Tensors, clip_search
from quamba.recipe import LinearSpec
from quamba_kernels import Op, ops

RATIOS = [1 - 0.02 * i for i in range(1, 11)]


class Int8Grid(Grid):
    """value = scale[o] * code, code in [-127, 127]."""

    bounds = (-127, 127)

    def __init__(self, features: int, outputs: int, search: bool) -> None:
        self.size, self.search = features, search
        self.scale = torch.ones(outputs)

    def begin(self, weight: torch.Tensor, importance: torch.Tensor) -> None:
        peak = weight.abs().amax(1)
        scale = torch.where(peak > 0, peak / 127, torch.ones_like(peak))
        if self.search:

            def error(s: torch.Tensor) -> torch.Tensor:
                s = s.unsqueeze(1)
                rounded = torch.round(weight / s).clamp_(-127, 127) * s
                return (rounded - weight).square() @ importance

            scale, _ = clip_search(error, scale, RATIOS)
        self.scale = scale

    def fit(self, group: int, weight: torch.Tensor, importance: torch.Tensor) -> None:
        """The scale of a whole row stays as begin fitted it."""

    def step(self, group: int) -> torch.Tensor:
        return self.scale

    def pack(self, codes: torch.Tensor) -> Tensors:
        return {"weight_packed": codes.to(torch.int8), "weight_scale": self.scale.float()}


class W8A8(Format):
    """linear_w8a8 over weight_packed int8 [O, K] and weight_scale fp32 [O]."""

    name = "w8a8"
    int8_input = True

    def tensors(self, features: int, outputs: int, spec: LinearSpec) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {
            "weight_packed": ((outputs, features), torch.int8),
            "weight_scale": ((outputs,), torch.float32),
        }

    def grid(self, features: int, outputs: int, spec: LinearSpec) -> Grid:
        return Int8Grid(features, outputs, spec.search)

    def dequantize(self, tensors: Tensors) -> torch.Tensor:
        return tensors["weight_packed"].float() * tensors["weight_scale"].unsqueeze(1)

    def step(self, tensors: Tensors) -> torch.Tensor:
        return tensors["weight_scale"].unsqueeze(1)

    @property
    def op(self) -> Op:
        return ops.linear_w8a8


FORMAT = W8A8()
