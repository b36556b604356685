"""The delta rule: DeltaNet (2406.06484), Gated DeltaNet (2412.06464), DeltaProduct (2502.10297), KDA (2510.26692)."""

from __future__ import annotations

import torch

from quamba_kernels.ops.rowwise import dequantize
from quamba_kernels.ops.ssd import group_scale, per_head
from quamba_kernels.ops.state import load_state, quantize_state
from quamba_kernels.registry import op


def step(
    S: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token: S [B, H, P, N], q [B, H, N], k [B, M, H, N], v [B, M, H, P], beta [B, M, H], g [B, H, N or 1], fp32
    -> o [B, H, P], S."""
    if g is not None:
        S = torch.exp(g).unsqueeze(-2) * S
    for m in range(k.shape[1]):
        gap = v[:, m] - (S @ k[:, m].unsqueeze(-1)).squeeze(-1)
        S = S + (beta[:, m].unsqueeze(-1) * gap).unsqueeze(-1) * k[:, m].unsqueeze(-2)
    return (S @ q.unsqueeze(-1)).squeeze(-1), S


def directions(x: torch.Tensor, scale: torch.Tensor | None, norm_eps: float | None, heads: int) -> torch.Tensor:
    """Queries or keys [..., G, N] as fp32 [..., H, N], divided by sqrt(|x|^2 + norm_eps) unless that is None."""
    x = dequantize(x, group_scale(scale))
    if norm_eps is not None:
        x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + norm_eps)
    return per_head(x, heads)


@op
def delta_scan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    norm_eps: float | None = None,
    q_scale: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """S = S[t-1] diag(exp g); for m = 1 .. M: S = S + beta_m (v_m - S k_m) k_m^T;  S[t] = S, o[t] = scale S[t] q.

    q [B, T, G, N], k [B, T, M, G, N] int8 with q_scale, k_scale [G] or [1], or float, both divided by
    sqrt(|.|^2 + norm_eps) unless that is None; v [B, T, M, H, P] int8 with v_scale [H, P], or float; beta [B, T, M, H]
    float; g [B, T, H, N] float, at most 0, or [B, T, H, 1]: one decay per head, or None: no decay; state [B, H, P, N]
    fp32 before the first token, None for zeros. M, the steps a token takes, is 1 but for DeltaProduct.
    Returns o [B, T, H, P] and the last state fp32.
    """
    heads = v.shape[3]
    q = directions(q, q_scale, norm_eps, heads) * scale
    k = directions(k, k_scale, norm_eps, heads)
    v, beta = dequantize(v, v_scale), beta.float()
    S = v.new_zeros(v.shape[0], *v.shape[3:], k.shape[-1]) if state is None else state.float()
    o = torch.empty_like(v[:, :, 0])
    for t in range(v.shape[1]):
        o[:, t], S = step(S, q[:, t], k[:, t], v[:, t], beta[:, t], None if g is None else g[:, t].float())
    return o.to(out_dtype), S


@op
def delta_update(
    state: torch.Tensor,
    state_scale: torch.Tensor | None,
    rng: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    norm_eps: float | None = None,
    q_scale: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """One token of delta_scan; the state is updated in place and stored as quantize_state says.

    state [B, H, P, N] fp32, fp16 or int8 with state_scale [B, H, P]; q [B, G, N], k [B, M, G, N], v [B, M, H, P],
    beta [B, M, H], g [B, H, N or 1] or None. Returns o [B, H, P], computed from the state before it is rounded.
    """
    heads = v.shape[2]
    q = directions(q, q_scale, norm_eps, heads) * scale
    k = directions(k, k_scale, norm_eps, heads)
    decay = None if g is None else g.float()
    o, S = step(load_state(state, state_scale), q, k, dequantize(v, v_scale), beta.float(), decay)
    quantize_state(S, state, state_scale, rng)
    return o.to(out_dtype)
