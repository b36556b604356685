"""Mamba1's scan in Triton: a thread per channel, its states in registers, token after token as in the definition.

Sequences are cut into segments to fill the device, in two launches as in ssd.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quamba_kernels.ops.sequences import check_cu_seqlens
from quamba_kernels.triton.layout import packed, processors, unit
from quamba_kernels.triton.rounding import softplus
from quamba_kernels.triton.ssd import segments, span

LEAST = 32
"""Tokens below which a segment is not worth its state."""


@triton.jit
def load_codes(pointer, inside, scale):
    return tl.load(pointer, mask=inside, other=0).to(tl.float32) * scale


@triton.jit
def selective_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, dt_bias_ptr, state_ptr, x_scale_ptr, B_scale_ptr, C_scale_ptr, cu_ptr,
    y_ptr, last_ptr, local_ptr, steps_ptr, T, I, N, segments,
    x_batch, x_token, dt_batch, dt_token, B_batch, B_token, C_batch, C_token,
    OUTPUT: tl.constexpr, CHANNEL_SCALE: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BI channels over one segment; the state is held as [BN, BI].

    OUTPUT: y, and from the last segment the last state; else local [.., segments - 1, N, I], the state left by a
    segment that begins at zero, and steps [.., segments - 1, I], the sum of its dt."""
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    segment, sequence = tl.program_id(1), tl.program_id(2)
    first, stop = span(cu_ptr, T, sequence, segment, segments, 1)
    row = sequence.to(tl.int64)
    if cu_ptr is not None:
        row = tl.zeros_like(row)
    n = tl.arange(0, BN)
    i_in, n_in = i < I, n < N
    tile, tile_in = n[:, None] * I + i[None, :], n_in[:, None] & i_in[None, :]
    own = sequence.to(tl.int64) * I * N + i[None, :] * N + n[:, None]
    A = tl.load(A_ptr + i[None, :] * N + n[:, None], mask=tile_in, other=0)
    bias, x_scale = tl.zeros((BI,), tl.float32), tl.full((BI,), 1.0, tl.float32)
    B_scale, C_scale = 1.0, 1.0
    if dt_bias_ptr is not None:
        bias = tl.load(dt_bias_ptr + i, mask=i_in, other=0).to(tl.float32)
    if x_scale_ptr is not None:
        x_scale *= tl.load(x_scale_ptr + i, mask=i_in, other=0) if CHANNEL_SCALE else tl.load(x_scale_ptr)
    if B_scale_ptr is not None:
        B_scale = tl.load(B_scale_ptr)
    if C_scale_ptr is not None:
        C_scale = tl.load(C_scale_ptr)

    states = sequence.to(tl.int64) * (segments - 1)
    h = tl.zeros((BN, BI), tl.float32)
    if OUTPUT:
        D = tl.load(D_ptr + i, mask=i_in, other=0).to(tl.float32)
        if state_ptr is not None:
            h = tl.load(state_ptr + own, mask=tile_in, other=0).to(tl.float32)
        if local_ptr is not None:
            for s in range(0, segment):
                steps = tl.load(steps_ptr + (states + s) * I + i, mask=i_in, other=0)
                before = tl.load(local_ptr + (states + s) * N * I + tile, mask=tile_in, other=0)
                h = h * tl.exp(steps[None, :] * A) + before

    # the loads of a token are issued while the one before it is computed
    x_ptr += row * x_batch + first.to(tl.int64) * x_token + i
    dt_ptr += row * dt_batch + first.to(tl.int64) * dt_token + i
    B_ptr += row * B_batch + first.to(tl.int64) * B_token + n
    C_ptr += row * C_batch + first.to(tl.int64) * C_token + n
    y_ptr += (row * T + first) * I + i
    channels, width = tl.where(first < stop, I, 0), tl.where(first < stop, N, 0)
    x, B = load_codes(x_ptr, i < channels, x_scale), load_codes(B_ptr, n < width, B_scale)
    C = tl.zeros((BN,), tl.float32)
    if OUTPUT:
        C = load_codes(C_ptr, n < width, C_scale)
    dt = load_codes(dt_ptr, i < channels, 1.0)
    total = tl.zeros((BI,), tl.float32)
    for t in range(first, stop):
        x_ptr += x_token
        dt_ptr += dt_token
        B_ptr += B_token
        C_ptr += C_token
        channels, width = tl.where(t + 1 < stop, I, 0), tl.where(t + 1 < stop, N, 0)
        x_next, B_next = load_codes(x_ptr, i < channels, x_scale), load_codes(B_ptr, n < width, B_scale)
        dt_next = load_codes(dt_ptr, i < channels, 1.0)
        step = softplus(dt + bias)
        total += step
        h = tl.exp(step[None, :] * A) * h + (step * x)[None, :] * B[:, None]
        if OUTPUT:
            C_next = load_codes(C_ptr, n < width, C_scale)
            y = tl.sum(h * C[:, None], 0) + x * D
            tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), mask=i_in)
            y_ptr += I
            C = C_next
        x, B, dt = x_next, B_next, dt_next

    if OUTPUT:
        if segment == segments - 1:
            tl.store(last_ptr + own, h, mask=tile_in)
    else:
        tl.store(local_ptr + (states + segment) * N * I + tile, h, mask=tile_in)
        tl.store(steps_ptr + (states + segment) * I + i, total, mask=i_in)


def tile(channels: int, BN: int) -> tuple[int, int]:
    """Channels of a program and its warps: a thread per channel, one warp, so that nothing is exchanged."""
    return max(1, min(triton.next_power_of_2(channels), 32)), 1 if BN <= 64 else 4


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor | None,
    state: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    B_scale: torch.Tensor | None,
    C_scale: torch.Tensor | None,
    out_dtype: torch.dtype,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``ops.selective_scan``. Raises ValueError for a cu_seqlens of another shape; what it holds is not read."""
    x, dt, B, C = unit(x), unit(dt), unit(B), unit(C)
    batch, tokens, channels = x.shape
    d_state = B.shape[-1]
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x, state)
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    BN = triton.next_power_of_2(d_state)
    BI, warps = tile(channels, BN)
    blocks = triton.cdiv(channels, BI)
    each = tokens // (1 if cu_seqlens is None else sequences)
    # a program is one warp: six times as many as of ssd.py make twelve warps on each processor
    cuts = segments(blocks * sequences, each, LEAST // 4, 6 * processors(x.device))
    y = x.new_empty(x.shape, dtype=out_dtype)
    last = x.new_empty((sequences, channels, d_state), dtype=torch.float32)
    local = steps = None
    if cuts > 1:
        local = x.new_empty((sequences, cuts - 1, d_state, channels), dtype=torch.float32)
        steps = x.new_empty((sequences, cuts - 1, channels), dtype=torch.float32)
    with torch.cuda.device_of(x):
        for output in (False, True) if cuts > 1 else (True,):
            selective_kernel[(blocks, cuts if output else cuts - 1, sequences)](
                x, dt, packed(A), B, C, packed(D), packed(dt_bias), packed(state), packed(x_scale), packed(B_scale),
                packed(C_scale), packed(cu_seqlens), y, last, local, steps, tokens, channels, d_state, cuts,
                x.stride(0), x.stride(1), dt.stride(0), dt.stride(1),
                B.stride(0), B.stride(1), C.stride(0), C.stride(1),
                OUTPUT=output, CHANNEL_SCALE=x_scale is not None and x_scale.numel() > 1,
                BI=BI, BN=BN, num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip
    return y, last
