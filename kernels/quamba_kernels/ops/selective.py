"""Mamba1's selective scan (diagonal decay per channel and state), prefill and decode. Gu and Dao, 2312.00752, eq. 2."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import silu, softplus

from quamba_kernels.ops.linear import linear_w8a8
from quamba_kernels.ops.rowwise import codes, dequantize, quantize
from quamba_kernels.ops.sequences import scan_each
from quamba_kernels.ops.state import load_state, quantize_state
from quamba_kernels.registry import op


def step(
    h: torch.Tensor, x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token: h [B, I, N], x and dt [B, I], A [I, N], B and C [B, N], all fp32 -> y [B, I], h."""
    h = torch.exp(dt.unsqueeze(-1) * A) * h + (dt * x).unsqueeze(-1) * B.unsqueeze(1)
    return (h @ C.unsqueeze(-1)).squeeze(-1), h


def timestep(dt: torch.Tensor, dt_bias: torch.Tensor | None) -> torch.Tensor:
    """softplus(dt + dt_bias) in fp32."""
    dt = dt.float()
    return softplus(dt if dt_bias is None else dt + dt_bias.float())


@op
def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    *,
    x_scale: torch.Tensor | None = None,
    B_scale: torch.Tensor | None = None,
    C_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h[t] = exp(dt A) h[t-1] + dt B x;  y[t] = C h[t] + D x, dt = softplus(dt + dt_bias).

    x [B, T, I] int8 with x_scale [1] or [I], or float; dt [B, T, I] float; A [I, N] fp32, negative; B, C [B, T, N]
    int8 with B_scale, C_scale [1], or float; D, dt_bias [I]; state [B, I, N] fp32 before the first token, None for
    zeros. Returns y [B, T, I] and the last state [B, I, N] fp32. cu_seqlens: ops/sequences.py.
    """
    if cu_seqlens is not None:
        options: dict[str, Any] = {
            "x_scale": x_scale, "B_scale": B_scale, "C_scale": C_scale, "out_dtype": out_dtype,
        }  # fmt: skip
        return scan_each(
            lambda h, x, dt, B, C: selective_scan(x, dt, A, B, C, D, dt_bias, h, **options),
            cu_seqlens, state, x, dt, B, C,
        )  # fmt: skip
    x, B, C = dequantize(x, x_scale), dequantize(B, B_scale), dequantize(C, C_scale)
    dt = timestep(dt, dt_bias)
    h = x.new_zeros(x.shape[0], *A.shape) if state is None else state.float()
    y = torch.empty_like(x)
    for t in range(x.shape[1]):
        y[:, t], h = step(h, x[:, t], dt[:, t], A, B[:, t], C[:, t])
    return (y + x * D.float()).to(out_dtype), h


@op
def selective_prefill(
    x: torch.Tensor,
    projected: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    bias: torch.Tensor | None,
    A: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
    state: torch.Tensor | None = None,
    *,
    x_scale: torch.Tensor | None = None,
    B_scale: torch.Tensor | None = None,
    C_scale: torch.Tensor | None = None,
    z_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What follows x_proj in a prompt: linear_w8a8 of the rates, in codes with a scale per token, selective_scan, gate.

    x [B, T, I]; projected [B, T, R + 2 N] float, the columns dt, B and C; weights [I, R] and bias [I] as linear_w8a8
    takes them; B_scale and C_scale [1] make B and C codes; z and z_scale as in gate_output; x, x_scale and the rest as
    in selective_scan. Returns y silu(z) [B, T, I], of a y in fp32, and the last state [B, I, N] fp32; in fp16 a product
    beyond 65504 is infinite, which gate_output's, in fp32 until it is rotated, is not.
    """
    rank, B, C = projected.split([weights[0].shape[1], A.shape[1], A.shape[1]], -1)
    dt = linear_w8a8(*quantize(rank), weights, bias, out_dtype=out_dtype)
    if B_scale is not None and C_scale is not None:
        B, C = quantize(B, B_scale).data, quantize(C, C_scale).data
    scales = {"x_scale": x_scale, "B_scale": B_scale, "C_scale": C_scale}
    y, last = selective_scan(x, dt, A, B, C, D, None, state, **scales)
    return (y * silu(dequantize(codes(z, z_scale), z_scale))).to(out_dtype), last


@op
def selective_update(
    state: torch.Tensor,
    state_scale: torch.Tensor | None,
    rng: torch.Tensor | None,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor | None = None,
    *,
    x_scale: torch.Tensor | None = None,
    B_scale: torch.Tensor | None = None,
    C_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """One token of selective_scan; the state is updated in place and stored as quantize_state says.

    state [B, I, N] fp32, fp16 or int8 with state_scale [B, I]; x and dt [B, I], B and C [B, N]. Returns y [B, I],
    computed from the state before it is rounded.
    """
    x, B, C = dequantize(x, x_scale), dequantize(B, B_scale), dequantize(C, C_scale)
    y, h = step(load_state(state, state_scale), x, timestep(dt, dt_bias), A, B, C)
    quantize_state(h, state, state_scale, rng)
    return (y + x * D.float()).to(out_dtype)
