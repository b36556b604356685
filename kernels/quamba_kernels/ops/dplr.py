"""Matrix states with a diagonal plus low-rank transition: RWKV7. Peng et al., 2503.14456."""

from __future__ import annotations

import torch

from quamba_kernels.ops.rowwise import dequantize
from quamba_kernels.ops.ssd import group_scale
from quamba_kernels.ops.state import load_state, quantize_state
from quamba_kernels.registry import op


def step(
    S: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token: S [B, H, P, N], v [B, H, P], all others [B, H, N], fp32 -> o [B, H, P], S."""
    read = S @ a.unsqueeze(-1)
    S = torch.exp(g).unsqueeze(-2) * S + read * b.unsqueeze(-2) + v.unsqueeze(-1) * k.unsqueeze(-2)
    return (S @ q.unsqueeze(-1)).squeeze(-1), S


@op
def dplr_scan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    state: torch.Tensor | None = None,
    *,
    q_scale: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """S[t] = S[t-1] (diag(exp g) + a b^T) + v k^T;  o[t] = S[t] q.  a reads the state before it decays.

    q, k [B, T, H, N] int8 with q_scale, k_scale [H] or [1], or float; v [B, T, H, P] int8 with v_scale [H, P], or
    float; g [B, T, H, N] float, at most 0; a, b [B, T, H, N] float; state [B, H, P, N] fp32 before the first token,
    None for zeros. Returns o [B, T, H, P] and the last state fp32.
    """
    q, k = dequantize(q, group_scale(q_scale)), dequantize(k, group_scale(k_scale))
    v, g, a, b = dequantize(v, v_scale), g.float(), a.float(), b.float()
    S = v.new_zeros(v.shape[0], *v.shape[2:], k.shape[-1]) if state is None else state.float()
    o = torch.empty_like(v)
    for t in range(v.shape[1]):
        o[:, t], S = step(S, q[:, t], k[:, t], v[:, t], g[:, t], a[:, t], b[:, t])
    return o.to(out_dtype), S


@op
def dplr_update(
    state: torch.Tensor,
    state_scale: torch.Tensor | None,
    rng: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    q_scale: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """One token of dplr_scan; the state is updated in place and stored as quantize_state says.

    state [B, H, P, N] fp32, fp16 or int8 with state_scale [B, H, P]; v [B, H, P], all others [B, H, N].
    Returns o [B, H, P], computed from the state before it is rounded.
    """
    q, k = dequantize(q, group_scale(q_scale)), dequantize(k, group_scale(k_scale))
    old = load_state(state, state_scale)
    o, S = step(old, q, k, dequantize(v, v_scale), g.float(), a.float(), b.float())
    quantize_state(S, state, state_scale, rng)
    return o.to(out_dtype)
