"""Scans with matrix states in chunks, in plain torch on any device: tokens of a chunk meet in matrix products.

Inside a chunk S[t] = S[0] diag(exp G[t]) + sum_{s <= t} u[s] (k[s] exp(G[t] - G[s]))^T, where G sums the log decays
from the chunk's start. Only sums of log decays are ever exponentiated, so none is too strong. What the delta rule and
RWKV7 write depends on what stands in the state: a unit triangular system, solved once per chunk.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from quamba_kernels import ops
from quamba_kernels.ops.delta import directions
from quamba_kernels.ops.rowwise import dequantize
from quamba_kernels.ops.ssd import group_scale, per_head

SCALAR_CHUNK, DIAGONAL_CHUNK = 64, 16
"""Tokens of a chunk, by the decay: a diagonal one costs N exponentials for every pair of them."""


def _chunks(g: torch.Tensor, *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """[B, T, H, ...] -> for each chunk [B, H, L, ...], g first, padded with zeros, which leave every state as it is."""
    size = min(SCALAR_CHUNK if g.shape[-1] == 1 else DIAGONAL_CHUNK, g.shape[1])
    parts = []
    for x in (g, *tensors):
        x = pad(x, (0, 0) * (x.dim() - 2) + (0, -x.shape[1] % size))
        parts.append(x.transpose(1, 2).split(size, 2))
    return list(zip(*parts, strict=True))


def _weights(g: torch.Tensor) -> torch.Tensor:
    """exp(g[s + 1] + ... + g[t]) [B, H, L, L, N or 1] for s <= t, else 0: summed as such, for a difference of sums from
    the chunk's start would lose the small ones among large ones."""
    at = torch.arange(g.shape[2], device=g.device)
    gap = torch.where((at.unsqueeze(1) > at).unsqueeze(-1), g.unsqueeze(3), 0.0).cumsum_(2)
    return gap.masked_fill_((at.unsqueeze(1) < at).unsqueeze(-1), -torch.inf).exp_()


def _before(x: torch.Tensor, first: float) -> torch.Tensor:
    """x[t - 1] along the tokens of a chunk [B, H, L, ...], with ``first`` before x[0]."""
    return pad(x[:, :, :-1], (0, 0) * (x.dim() - 3) + (1, 0), value=first)


def _pairs(left: torch.Tensor, right: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum_n left[t, n] right[s, n] weights[t, s, n], [B, H, L, L]."""
    if weights.shape[-1] == 1:
        return (left @ right.transpose(-1, -2)).mul_(weights.squeeze(-1))
    return (weights * left.unsqueeze(-2)).mul_(right.unsqueeze(-3)).sum(-1)


def _solve(lower: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """x of (I + lower) x = right, for ``lower`` strictly lower triangular."""
    return torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)


def _join(outputs: list[torch.Tensor], tokens: int, out_dtype: torch.dtype) -> torch.Tensor:
    """Chunks [B, H, L, P] -> [B, T, H, P]."""
    return torch.cat(outputs, 2)[:, :, :tokens].transpose(1, 2).to(out_dtype)


def _state(state: torch.Tensor | None, v: torch.Tensor, keys: int) -> torch.Tensor:
    return v.new_zeros(v.shape[0], *v.shape[2:], keys) if state is None else state.float()


@ops.gla_scan.backend("chunked", rank=60)
def gla_scan(
    q, k, v, g, u=None, state=None, *,
    scale=1.0, q_scale=None, k_scale=None, v_scale=None, out_dtype=torch.float32,
):  # fmt: skip
    """Chunks of 64 tokens, of 16 where every key channel decays on its own."""
    heads, tokens = v.shape[2], v.shape[1]
    q = per_head(dequantize(q, group_scale(q_scale)), heads) * scale
    k = per_head(dequantize(k, group_scale(k_scale)), heads)
    v = dequantize(v, v_scale)
    S, outputs = _state(state, v, k.shape[-1]), []
    for gc, qc, kc, vc in _chunks(g.float(), q, k, v):
        weights, decay = _weights(gc), gc.cumsum(2).exp()
        if u is None:
            mix, entering = _pairs(qc, kc, weights), qc * decay
        else:  # a token reads the state before itself
            mix, entering = _pairs(qc, kc, _before(weights, 0)), qc * _before(decay, 1)
            mix = mix + torch.diag_embed((qc * u.float().unsqueeze(1) * kc).sum(-1))
        outputs.append(entering @ S.transpose(-1, -2) + mix @ vc)
        S = S * decay[:, :, -1:] + vc.transpose(-1, -2) @ (kc * weights[:, :, -1])
    return _join(outputs, tokens, out_dtype), S


@ops.delta_scan.backend("chunked", rank=60)
def delta_scan(
    q, k, v, beta, g=None, state=None, *,
    scale=1.0, norm_eps=None, q_scale=None, k_scale=None, v_scale=None, out_dtype=torch.float32,
):  # fmt: skip
    """As gla_scan over all steps of all tokens: the first step of a token decays, the last one is read."""
    heads, steps = v.shape[3], v.shape[2]
    q = directions(q, q_scale, norm_eps, heads) * scale
    k = directions(k, k_scale, norm_eps, heads).flatten(1, 2)
    v, beta = dequantize(v, v_scale).flatten(1, 2), beta.float().flatten(1, 2).unsqueeze(-1)
    g = torch.zeros_like(q[..., :1]) if g is None else g.float()
    if steps > 1:
        q = pad(q.unsqueeze(2), (0, 0, 0, 0, steps - 1, 0)).flatten(1, 2)
        g = pad(g.unsqueeze(2), (0, 0, 0, 0, 0, steps - 1)).flatten(1, 2)
    S, outputs = _state(state, v, k.shape[-1]), []
    for gc, qc, kc, vc, bc in _chunks(g, q, k, v, beta):
        weights, decay = _weights(gc), gc.cumsum(2).exp()
        recall = _pairs(kc, kc, weights).tril_(-1) * bc
        written = _solve(recall, bc * (vc - (kc * decay) @ S.transpose(-1, -2)))
        outputs.append((qc * decay) @ S.transpose(-1, -2) + _pairs(qc, kc, weights) @ written)
        S = S * decay[:, :, -1:] + written.transpose(-1, -2) @ (kc * weights[:, :, -1])
    return _join(outputs, v.shape[1], out_dtype)[:, steps - 1 :: steps], S


@ops.dplr_scan.backend("chunked", rank=60)
def dplr_scan(
    q, k, v, g, a, b, state=None, *,
    q_scale=None, k_scale=None, v_scale=None, out_dtype=torch.float32,
):  # fmt: skip
    """As delta_scan; a reads the state before the token's own decay."""
    q, k = dequantize(q, group_scale(q_scale)), dequantize(k, group_scale(k_scale))
    v = dequantize(v, v_scale)
    S, outputs = _state(state, v, k.shape[-1]), []
    for gc, qc, kc, vc, ac, bc in _chunks(g.float(), q, k, v, a.float(), b.float()):
        weights, decay = _weights(gc), gc.cumsum(2).exp()
        earlier = _before(weights, 0)
        right = (ac * _before(decay, 1)) @ S.transpose(-1, -2) + _pairs(ac, kc, earlier) @ vc
        read = _solve(-_pairs(ac, bc, earlier), right)
        mixed = _pairs(qc, bc, weights) @ read + _pairs(qc, kc, weights) @ vc
        outputs.append((qc * decay) @ S.transpose(-1, -2) + mixed)
        rest = weights[:, :, -1]
        S = S * decay[:, :, -1:] + read.transpose(-1, -2) @ (bc * rest) + vc.transpose(-1, -2) @ (kc * rest)
    return _join(outputs, v.shape[1], out_dtype), S
