"""Matrix states that decay per key channel or per head: GLA (2312.06635), RetNet, HGRN2, LightNet, RWKV6."""

from __future__ import annotations

import torch

from quamba_kernels.ops.rowwise import dequantize
from quamba_kernels.ops.ssd import group_scale, per_head
from quamba_kernels.ops.state import load_state, quantize_state
from quamba_kernels.registry import op


def step(
    S: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, u: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token: S [B, H, P, N], q and k [B, H, N], v [B, H, P], g [B, H, N or 1], fp32 -> o [B, H, P], S."""
    new = v.unsqueeze(-1) * k.unsqueeze(-2)
    after = torch.exp(g).unsqueeze(-2) * S + new
    read = after if u is None else S + u.unsqueeze(-2) * new
    return (read @ q.unsqueeze(-1)).squeeze(-1), after


@op
def gla_scan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    u: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    q_scale: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """S[t] = S[t-1] diag(exp g) + v k^T;  o[t] = scale S[t] q, or with a bonus u: scale (S[t-1] + v (u k)^T) q.

    q, k [B, T, G, N] int8 with q_scale, k_scale [G] or [1], or float; v [B, T, H, P] int8 with v_scale [H, P], or
    float; g [B, T, H, N] float, at most 0, or [B, T, H, 1]: one decay per head; u [H, N] (RWKV6, 2404.05892);
    state [B, H, P, N] fp32 before the first token, None for zeros. Returns o [B, T, H, P] and the last state fp32.
    """
    heads = v.shape[2]
    q = per_head(dequantize(q, group_scale(q_scale)), heads) * scale
    k = per_head(dequantize(k, group_scale(k_scale)), heads)
    v, g = dequantize(v, v_scale), g.float()
    u = None if u is None else u.float()
    S = v.new_zeros(v.shape[0], *v.shape[2:], k.shape[-1]) if state is None else state.float()
    o = torch.empty_like(v)
    for t in range(v.shape[1]):
        o[:, t], S = step(S, q[:, t], k[:, t], v[:, t], g[:, t], u)
    return o.to(out_dtype), S


@op
def gla_update(
    state: torch.Tensor,
    state_scale: torch.Tensor | None,
    rng: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    u: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    q_scale: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """One token of gla_scan; the state is updated in place and stored as quantize_state says.

    state [B, H, P, N] fp32, fp16 or int8 with state_scale [B, H, P]; q, k [B, G, N], v [B, H, P], g [B, H, N or 1].
    Returns o [B, H, P], computed from the state before it is rounded.
    """
    heads = v.shape[1]
    q = per_head(dequantize(q, group_scale(q_scale)), heads) * scale
    k = per_head(dequantize(k, group_scale(k_scale)), heads)
    u = None if u is None else u.float()
    o, S = step(load_state(state, state_scale), q, k, dequantize(v, v_scale), g.float(), u)
    quantize_state(S, state, state_scale, rng)
    return o.to(out_dtype)
