"""Decode with matrix states on any CPU: a token reads the state in one product, then decays and adds in place."""

from __future__ import annotations

import torch

from quamba_kernels import ops
from quamba_kernels.backends.cpu import _store, needs_cpu
from quamba_kernels.ops.delta import directions
from quamba_kernels.ops.rowwise import dequantize
from quamba_kernels.ops.ssd import group_scale, per_head


def _flat(x: torch.Tensor) -> torch.Tensor:
    """[B, H, ...] fp32 -> [B * H, ...]."""
    return x.float().flatten(0, 1)


def _load(state: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """The state [B * H, P, N] in fp32: its own memory where it is stored so."""
    flat = state.view(-1, *state.shape[-2:])
    if scale is None:
        return flat if flat.dtype == torch.float32 else flat.float()
    return flat.float().mul_(scale.view(-1, scale.shape[-1], 1))


def _read(h: torch.Tensor, *vectors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """h [B * H, P, N] times each [B * H, N]."""
    return torch.bmm(h, torch.stack(vectors, -1)).unbind(-1)


def _keep(h: torch.Tensor, state: torch.Tensor, scale: torch.Tensor | None, rng: torch.Tensor | None) -> None:
    _store(h, state.view(h.shape), None if scale is None else scale.view(h.shape[:-1]), rng)


@ops.gla_update.backend("cpu", why_not=needs_cpu)
def gla_update(
    state, state_scale, rng, q, k, v, g, u=None, *,
    scale=1.0, q_scale=None, k_scale=None, v_scale=None, out_dtype=torch.float32,
):  # fmt: skip
    """Reads before it writes: the token itself comes in through q k."""
    heads = v.shape[1]
    q = per_head(dequantize(q, group_scale(q_scale)), heads) * scale
    k = per_head(dequantize(k, group_scale(k_scale)), heads)
    own = (q * k if u is None else q * k * u.float()).sum(-1, keepdim=True)
    v, decay, h = dequantize(v, v_scale), _flat(g).exp(), _load(state, state_scale)
    (o,) = _read(h, _flat(q) * decay if u is None else _flat(q))
    h.mul_(decay.unsqueeze(1)).baddbmm_(_flat(v).unsqueeze(-1), _flat(k).unsqueeze(1))
    _keep(h, state, state_scale, rng)
    return o.view(v.shape).addcmul(own, v).to(out_dtype)


@ops.delta_update.backend("cpu", why_not=needs_cpu)
def delta_update(
    state, state_scale, rng, q, k, v, beta, g=None, *,
    scale=1.0, norm_eps=None, q_scale=None, k_scale=None, v_scale=None, out_dtype=torch.float32,
):  # fmt: skip
    """The decay goes into what is read, so the last step and the output share one read."""
    heads, steps = v.shape[2], v.shape[1]
    q = _flat(directions(q, q_scale, norm_eps, heads)) * scale
    k, v = directions(k, k_scale, norm_eps, heads), dequantize(v, v_scale)
    decay, h = None if g is None else _flat(g).exp(), _load(state, state_scale)
    for m in range(steps):
        key, last = _flat(k[:, m]), m == steps - 1
        seen = [key, q] if last else [key]
        found = _read(h, *(x if decay is None or m else x * decay for x in seen))
        write = (_flat(v[:, m]) - found[0]) * _flat(beta[:, m]).unsqueeze(-1)
        if decay is not None and m == 0:
            h.mul_(decay.unsqueeze(1))
        h.baddbmm_(write.unsqueeze(-1), key.unsqueeze(1))
        o = found[-1].addcmul(write, (key * q).sum(-1, keepdim=True)) if last else found[-1]
    _keep(h, state, state_scale, rng)
    return o.view(v[:, 0].shape).to(out_dtype)


@ops.dplr_update.backend("cpu", why_not=needs_cpu)
def dplr_update(
    state, state_scale, rng, q, k, v, g, a, b, *,
    q_scale=None, k_scale=None, v_scale=None, out_dtype=torch.float32,
):  # fmt: skip
    """One read for a and q, one write of rank two."""
    q, k = _flat(dequantize(q, group_scale(q_scale))), _flat(dequantize(k, group_scale(k_scale)))
    v, b, decay, h = dequantize(v, v_scale), _flat(b), _flat(g).exp(), _load(state, state_scale)
    values = _flat(v)
    read, o = _read(h, _flat(a), q * decay)
    h.mul_(decay.unsqueeze(1)).baddbmm_(torch.stack([read, values], -1), torch.stack([b, k], 1))
    _keep(h, state, state_scale, rng)
    o = o.addcmul(read, (b * q).sum(-1, keepdim=True)).addcmul_(values, (k * q).sum(-1, keepdim=True))
    return o.view(v.shape).to(out_dtype)
