"""Weights as the checkpoint has them; the only format whose tensor is called ``weight``."""

from __future__ import annotations

import torch

from quamba.formats.format import Format, Grid, Tensors
from quamba.recipe import LinearSpec
from quamba_kernels import Backend, Op


def _float_linear(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    out_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """y = x w^T + bias + residual in the weight's type."""
    (weight,) = weights
    y = torch.nn.functional.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
    return (y if residual is None else y + residual).to(out_dtype)


class Float(Format):
    """torch.nn.functional.linear."""

    name = "float"
    int8_input = False
    has_grid = False

    def tensors(self, features: int, outputs: int, spec: LinearSpec) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"weight": ((outputs, features), torch.float32)}

    def grid(self, features: int, outputs: int, spec: LinearSpec) -> Grid:
        raise TypeError("a float linear has no grid")

    def dequantize(self, tensors: Tensors) -> torch.Tensor:
        return tensors["weight"].float()

    def step(self, tensors: Tensors) -> torch.Tensor:
        raise TypeError("a float linear has no grid")

    @property
    def op(self) -> Op:
        raise TypeError("a float linear runs in torch itself")

    def bind(self, device: str, dtype: torch.dtype, features: int, outputs: int, spec: LinearSpec) -> Backend:
        return Backend("torch", _float_linear)


FORMAT = Float()
