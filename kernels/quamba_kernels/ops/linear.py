"""Linears over low-bit weights. ``weights`` is the canonical tuple; a backend may take its own prepacked one."""

from __future__ import annotations

import torch

from quamba_kernels.ops.rowwise import rms_norm, to_int8
from quamba_kernels.registry import OPS, op

NIBBLES = 8


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """int32 [O, K/8] -> int8 [O, K] in [-8, 7]: eight nibbles a word, low first, stored with +8."""
    shifts = torch.arange(0, 4 * NIBBLES, 4, device=packed.device, dtype=torch.int32)
    return ((packed.unsqueeze(-1) >> shifts & 15) - 8).to(torch.int8).flatten(-2)


def expand_two_level(packed: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
    """The int8 weight [O, K] of a two-level int4 one: code = q4 * m, m [O, K/S] in 1..17."""
    codes = unpack_int4(packed)
    groups = codes.unflatten(-1, (multiplier.shape[-1], -1))
    return (groups * multiplier.unsqueeze(-1)).flatten(-2)


def finish(
    y: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The epilogue of every linear: + bias, + residual, then static int8 or a cast. y fp32 [..., O]."""
    if bias is not None:
        y = y + bias.float()
    if residual is not None:
        y = y + residual.float()
    return y.to(out_dtype) if out_scale is None else to_int8(y, out_scale)


def int8_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Exact integer accumulators of int8 [..., K] times int8 [O, K]^T, as fp64 [..., O] (every sum is below 2^53)."""
    return x.double() @ weight.double().T


@op
def linear_w8a8(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    out_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """y = (x w^T) * x_scale * w_scale + bias + residual, accumulated in int32.

    x int8 [..., K]; x_scale fp32 [1] or [..., 1]; weights: w int8 [O, K], w_scale fp32 [O];
    out_scale fp32 [1] or [O] gives an int8 result.
    """
    weight, scale = weights
    acc = int8_product(x, weight).float()
    return finish(acc * x_scale * scale, bias, residual, out_scale, out_dtype)


@op
def linear_w4a8(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    out_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """y = (x w^T) * x_scale * w_scale + bias + residual with int8 w = q4 * m (two levels), accumulated in int32.

    weights: q4 int32 [O, K/8] packed, in [-7, 7]; m int8 [O, K/S] in 1..17; w_scale fp32 [O]. Rest as linear_w8a8.
    """
    packed, multiplier, scale = weights
    acc = int8_product(x, expand_two_level(packed, multiplier)).float()
    return finish(acc * x_scale * scale, bias, residual, out_scale, out_dtype)


@op
def linear_w4a16(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    out_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """y = x w^T + bias + residual with w = q4 * scale.

    x [..., K] float; weights: q4 int32 [O, K/8] packed, in [-8, 7]; scale fp16 [O, K/S].
    """
    packed, scale = weights
    weight = dequantize_int4(packed, scale)
    return finish(x.float() @ weight.T, bias, residual, out_scale, out_dtype)


@op
def norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor | None,
    eps: float,
    weights: tuple[torch.Tensor, ...],
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    linear: str,
    in_scale: torch.Tensor | None = None,
    per_token: bool = False,
    in_dtype: torch.dtype = torch.float32,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """rms_norm of x [..., K] float, then the op called ``linear`` (linear_w8a8, linear_w4a8, linear_w4a16) of it.

    in_scale fp32 [1], per_token and in_dtype: what the norm's output becomes, as in rms_norm; the rest as in that op.
    """
    u = rms_norm(x, norm_weight, eps, out_scale=in_scale, per_token=per_token, out_dtype=in_dtype)
    made = (u.data,) if u.scale is None else (u.data, u.scale)
    y: torch.Tensor = OPS[linear](*made, weights, bias, residual, out_dtype=out_dtype)
    return y


def dequantize_int4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fp32 [O, K] of a group-scaled int4 weight: packed int32 [O, K/8], scale fp16 [O, K/S]."""
    groups = unpack_int4(packed).unflatten(-1, (scale.shape[-1], -1)).float()
    return (groups * scale.float().unsqueeze(-1)).flatten(-2)


@op
def embedding(
    ids: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, *, out_dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """y = weight[ids] * scale[ids]. ids int [...], weight int8 [V, D], scale fp32 [V]; returns [..., D]."""
    return (weight[ids].float() * scale[ids].unsqueeze(-1)).to(out_dtype)


