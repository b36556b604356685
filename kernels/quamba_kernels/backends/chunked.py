"""Prefill scans in chunks, in plain torch on any device: no Python loop over tokens.

Within a chunk the work is matrix products (SSD) or runs over all chunks of the batch at once (selective scan);
only the carry from chunk to chunk is sequential.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from quamba_kernels import ops
from quamba_kernels.ops import selective, ssd
from quamba_kernels.ops.rowwise import dequantize
from quamba_kernels.ops.sequences import scan_each

SSD_CHUNK = 64
SELECTIVE_CHUNK = 32


def _chunks(x: torch.Tensor, size: int) -> torch.Tensor:
    """[B, T, ...] -> [B, ceil(T / size), size, ...], padded with zeros (which leave every state as it is)."""
    extra = -x.shape[1] % size
    if extra:
        x = pad(x, (0, 0) * (x.dim() - 2) + (0, extra))
    return x.unflatten(1, (x.shape[1] // size, size))


@ops.ssd_scan.backend("chunked", rank=60)
def ssd_scan(
    x, dt, A, B, C, D, dt_bias=None, state=None, *,
    x_scale=None, B_scale=None, C_scale=None, dt_limit=ssd.NO_LIMIT, out_dtype=torch.float32,
    cu_seqlens=None,
):  # fmt: skip
    """State-space duality in chunks of 64 (2405.21060, section 6). x_scale multiplies the outputs: it commutes."""
    if cu_seqlens is not None:
        options = {
            "x_scale": x_scale, "B_scale": B_scale, "C_scale": C_scale, "dt_limit": dt_limit, "out_dtype": out_dtype,
        }  # fmt: skip
        return scan_each(
            lambda h, x, dt, B, C: ssd_scan(x, dt, A, B, C, D, dt_bias, h, **options),
            cu_seqlens, state, x, dt, B, C,
        )  # fmt: skip
    batch, tokens, heads, headdim = x.shape
    size = min(SSD_CHUNK, max(tokens, 1))
    groups, d_state = B.shape[2:]
    fold = heads // groups
    dt = _chunks(ssd.timestep(dt, dt_bias, dt_limit), size)  # B c l H
    total = torch.cumsum(dt * A, 2)
    xd = _chunks(x.float(), size) * dt.unsqueeze(-1)  # B c l H P
    Bc = _chunks(dequantize(B, ssd.group_scale(B_scale)), size).transpose(2, 3)  # B c G l N
    Cc = _chunks(dequantize(C, ssd.group_scale(C_scale)), size).transpose(2, 3)

    by_head = total.transpose(2, 3)  # B c H l
    gap = by_head.unsqueeze(-1) - by_head.unsqueeze(-2)
    causal = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
    mix = gap.masked_fill_(~causal, -torch.inf).exp_().unflatten(2, (groups, fold))
    mix *= (Cc @ Bc.transpose(-1, -2)).unsqueeze(3)
    y = mix.flatten(2, 3) @ xd.transpose(2, 3)  # B c H l P

    to_end = torch.exp(total[:, :, -1:] - total).unsqueeze(-1)
    weighted = (xd * to_end).unflatten(3, (groups, fold)).permute(0, 1, 3, 4, 5, 2).flatten(3, 4)  # B c G fP l
    local = (weighted @ Bc).unflatten(3, (fold, headdim)).flatten(2, 3)  # B c H P N
    decay = torch.exp(total[:, :, -1])[..., None, None]
    scale = None if x_scale is None else x_scale.view(-1, *x_scale.shape[-2:]).unsqueeze(-1)
    h = x.new_zeros(batch, heads, headdim, d_state, dtype=torch.float32) if state is None else state.float()
    if scale is not None and state is not None:
        h = h / scale
    before = torch.empty_like(local)
    for c in range(local.shape[1]):
        before[:, c] = h
        h = decay[:, c] * h + local[:, c]

    carried = Cc @ before.unflatten(2, (groups, fold)).flatten(3, 4).transpose(-1, -2)  # B c G l fP
    carried = carried.unflatten(-1, (fold, headdim)).permute(0, 1, 2, 4, 3, 5).flatten(2, 3)  # B c H l P
    y += carried * by_head.exp().unsqueeze(-1)
    y = y.transpose(2, 3).flatten(1, 2)[:, :tokens]
    y = y + x.float() * D.float().unsqueeze(-1)
    if scale is not None:
        y, h = y * x_scale, h * scale
    return y.to(out_dtype), h


@ops.selective_scan.backend("chunked", rank=60)
def selective_scan(
    x, dt, A, B, C, D, dt_bias=None, state=None, *,
    x_scale=None, B_scale=None, C_scale=None, out_dtype=torch.float32,
    cu_seqlens=None,
):  # fmt: skip
    """All chunks of 32 tokens step together: once for their last states, then again from the states carried in."""
    if cu_seqlens is not None:
        options = {
            "x_scale": x_scale, "B_scale": B_scale, "C_scale": C_scale, "out_dtype": out_dtype,
        }  # fmt: skip
        return scan_each(
            lambda h, x, dt, B, C: selective_scan(x, dt, A, B, C, D, dt_bias, h, **options),
            cu_seqlens, state, x, dt, B, C,
        )  # fmt: skip
    tokens, size = x.shape[1], min(SELECTIVE_CHUNK, max(x.shape[1], 1))
    x, B, C = dequantize(x, x_scale), dequantize(B, B_scale), dequantize(C, C_scale)
    dt = selective.timestep(dt, dt_bias)
    dts = _chunks(dt, size)  # B c l I
    dx = _chunks(dt * x, size).unsqueeze(-1)
    Bs, Cs = _chunks(B, size).unsqueeze(3), _chunks(C, size)
    total = dts.sum(2)

    def advance(h: torch.Tensor, i: int) -> torch.Tensor:
        return torch.mul(dts[:, :, i].unsqueeze(-1), A).exp_().mul_(h).addcmul_(dx[:, :, i], Bs[:, :, i])

    h = x.new_zeros(*total.shape, A.shape[-1])
    for i in range(size):
        h = advance(h, i)
    last = x.new_zeros(x.shape[0], *A.shape) if state is None else state.float()
    before = torch.empty_like(h)
    for c in range(h.shape[1]):
        before[:, c] = last
        last = torch.exp(total[:, c].unsqueeze(-1) * A) * last + h[:, c]
    y = torch.empty_like(dts)
    h = before
    for i in range(size):
        h = advance(h, i)
        y[:, :, i] = (h @ Cs[:, :, i].unsqueeze(-1)).squeeze(-1)
    y = y.flatten(1, 2)[:, :tokens] + x * D.float()
    return y.to(out_dtype), last
