"""Mamba2's SSD recurrence (scalar decay per head), prefill and decode. Dao and Gu, 2405.21060, eq. 1."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import softplus

from quamba_kernels.ops.conv import causal_conv1d
from quamba_kernels.ops.rowwise import dequantize
from quamba_kernels.ops.sequences import scan_each
from quamba_kernels.ops.state import load_state, quantize_state
from quamba_kernels.registry import op

NO_LIMIT = (0.0, float("inf"))


def per_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeat [..., G, N] to [..., H, N]: consecutive heads share a state group."""
    return x.repeat_interleave(heads // x.shape[-2], dim=-2)


def group_scale(scale: torch.Tensor | None) -> torch.Tensor | None:
    """Per-state-group scale [G] or [1], made to multiply [..., G, N]."""
    return None if scale is None else scale.unsqueeze(-1)


def timestep(dt: torch.Tensor, dt_bias: torch.Tensor | None, limit: tuple[float, float]) -> torch.Tensor:
    """clamp(softplus(dt + dt_bias), *limit) in fp32."""
    dt = dt.float()
    dt = softplus(dt if dt_bias is None else dt + dt_bias.float())
    return dt if limit == NO_LIMIT else dt.clamp(*limit)


def step(
    h: torch.Tensor, x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token: h [B, H, P, N], x [B, H, P], dt [B, H], A [H], B and C [B, H, N], all fp32 -> y [B, H, P], h."""
    decay = torch.exp(dt * A)[..., None, None]
    h = decay * h + (dt.unsqueeze(-1) * x).unsqueeze(-1) * B.unsqueeze(-2)
    return (h @ C.unsqueeze(-1)).squeeze(-1), h


@op
def ssd_scan(
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
    dt_limit: tuple[float, float] = NO_LIMIT,
    out_dtype: torch.dtype = torch.float32,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h[t] = exp(dt A) h[t-1] + dt x B^T;  y[t] = h[t] C + D x, dt = clamp(softplus(dt + dt_bias), dt_limit).

    x [B, T, H, P] int8 with x_scale [H, P], or float; dt [B, T, H] float; A [H] fp32, negative; B, C [B, T, G, N] int8
    with B_scale, C_scale [G], or float; D, dt_bias [H]; state [B, H, P, N] fp32 before the first token, None for
    zeros. Returns y [B, T, H, P] and the last state [B, H, P, N] fp32. cu_seqlens: ops/sequences.py.
    """
    if cu_seqlens is not None:
        options: dict[str, Any] = {
            "x_scale": x_scale, "B_scale": B_scale, "C_scale": C_scale, "dt_limit": dt_limit, "out_dtype": out_dtype,
        }  # fmt: skip
        return scan_each(
            lambda h, x, dt, B, C: ssd_scan(x, dt, A, B, C, D, dt_bias, h, **options),
            cu_seqlens, state, x, dt, B, C,
        )  # fmt: skip
    heads = x.shape[2]
    x = dequantize(x, x_scale)
    B = per_head(dequantize(B, group_scale(B_scale)), heads)
    C = per_head(dequantize(C, group_scale(C_scale)), heads)
    dt = timestep(dt, dt_bias, dt_limit)
    h = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1]) if state is None else state.float()
    y = torch.empty_like(x)
    for t in range(x.shape[1]):
        y[:, t], h = step(h, x[:, t], dt[:, t], A, B[:, t], C[:, t])
    return (y + x * D.float().unsqueeze(-1)).to(out_dtype), h


@op
def ssd_prefill(
    mixed: torch.Tensor,
    dt: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    conv_state: torch.Tensor | None,
    A: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    *,
    groups: int,
    d_state: int,
    conv_in_scale: torch.Tensor | None = None,
    conv_weight_scale: torch.Tensor | None = None,
    conv_out_scale: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    B_scale: torch.Tensor | None = None,
    C_scale: torch.Tensor | None = None,
    dt_limit: tuple[float, float] = NO_LIMIT,
    out_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What stands between in_proj of a prompt and its gate: causal_conv1d, then ssd_scan of what it gives.

    mixed [B, T, H P + 2 G N] float, the channels of x, B and C, G and N being ``groups`` and ``d_state``; conv_* as
    causal_conv1d takes them, conv_state updated in place; without conv_out_scale x, B and C have the type of y. The
    rest, and what is returned, as in ssd_scan.
    """
    mixed = causal_conv1d(
        mixed, conv_weight, conv_bias, conv_state, in_scale=conv_in_scale, weight_scale=conv_weight_scale,
        out_scale=conv_out_scale, out_dtype=out_dtype,
    )  # fmt: skip
    columns = groups * d_state
    x, B, C = mixed.split([mixed.shape[-1] - 2 * columns, columns, columns], -1)
    return ssd_scan(
        x.unflatten(-1, (len(A), -1)), dt, A, B.unflatten(-1, (groups, d_state)), C.unflatten(-1, (groups, d_state)), D,
        dt_bias, state, x_scale=x_scale, B_scale=B_scale, C_scale=C_scale, dt_limit=dt_limit, out_dtype=out_dtype,
    )  # fmt: skip


@op
def ssd_update(
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
    dt_limit: tuple[float, float] = NO_LIMIT,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """One token of ssd_scan; the state is updated in place and stored as quantize_state says.

    state [B, H, P, N] fp32, fp16 or int8 with state_scale [B, H, P]; x [B, H, P], dt [B, H], B and C [B, G, N].
    Returns y [B, H, P], computed from the state before it is rounded.
    """
    heads = x.shape[1]
    x = dequantize(x, x_scale)
    B = per_head(dequantize(B, group_scale(B_scale)), heads)
    C = per_head(dequantize(C, group_scale(C_scale)), heads)
    y, h = step(load_state(state, state_scale), x, timestep(dt, dt_bias, dt_limit), A, B, C)
    quantize_state(h, state, state_scale, rng)
    return (y + x * D.float().unsqueeze(-1)).to(out_dtype)
