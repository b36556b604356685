"""Decoding in bf16 on any CPU: few rows read int8 weights directly, through torch._weight_int8pack_mm.

The sum over K is rounded to bf16 before the scales, also where the result is wider (a residual in fp32): that is what
a bf16 model does. An int8 result is never computed so.
"""

from __future__ import annotations

import torch

from quamba_kernels import ops
from quamba_kernels.backends.cpu import contract, exact_product, expand, needs_cpu
from quamba_kernels.ops.linear import finish
from quamba_kernels.registry import Setting

FEW_ROWS = 8
FULL_K = 32
"""torch._weight_int8pack_mm reads beyond rows that do not fill its vectors (K = 12 and 100 crashed in torch 2.13)."""


def _why_not(setting: Setting) -> str | None:
    if setting.dtype != torch.bfloat16:
        return f"takes bf16 activations, these are {str(setting.dtype).removeprefix('torch.')}"
    if setting.shape.get("K", FULL_K) % FULL_K:
        return f"takes a multiple of {FULL_K} in features, got {setting.shape['K']}"
    return needs_cpu(setting)


def _product(x, x_scale, weight, scale, ones, bias, residual, out_scale, out_dtype):
    rows = x.flatten(0, -2)
    if rows.shape[0] <= FEW_ROWS and out_scale is None:
        acc = torch._weight_int8pack_mm(rows.to(torch.bfloat16), weight, ones).float()
    else:
        acc = exact_product(rows, weight)
    y = acc.view(*x.shape[:-1], -1).mul_(x_scale).mul_(scale)
    return finish(y, bias, residual, out_scale, out_dtype)


def add_ones(weights: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """(w, scale) -> (w, scale, ones): the product's own bf16 scale, since ours is fp32 and applied after it."""
    return *weights, torch.ones_like(weights[-1], dtype=torch.bfloat16)


def drop_ones(weights: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The inverse of add_ones."""
    return weights[:-1]


@ops.linear_w8a8.backend("packed", why_not=_why_not, rank=45, prepack=add_ones, unpack=drop_ones)
def linear_w8a8(
    x, x_scale, weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor], bias=None, residual=None, *,
    out_scale=None, out_dtype=torch.float32,
):  # fmt: skip
    """At most 8 rows read the int8 weights directly; more, and an int8 result, go through exact fp32 products."""
    return _product(x, x_scale, *weights, bias, residual, out_scale, out_dtype)


@ops.linear_w4a8.backend(
    "packed", why_not=_why_not, rank=45,
    prepack=lambda weights: add_ones(expand(weights)), unpack=lambda weights: contract(drop_ones(weights)),
)  # fmt: skip
def linear_w4a8(x, x_scale, weights, bias=None, residual=None, *, out_scale=None, out_dtype=torch.float32):
    """The weights are expanded to int8 when bound; then as linear_w8a8."""
    codes, _, scale, ones = weights
    return _product(x, x_scale, codes, scale, ones, bias, residual, out_scale, out_dtype)
