"""Mamba2's scan in Triton: chunks of a sequence as matrix products, with the state on chip from chunk to chunk.

A program walks over the chunks of one head (2405.21060, section 6) and keeps its state in registers, in fp32, so that
states reach memory only where a sequence is cut: into as many segments as fill the device. Two launches: the state that
each segment but the last would leave behind if it began at zero, then the outputs, every segment beginning with what
those before it left. A sequence that is not cut takes the second launch alone.

The scales of B and C multiply sums, that of x its values once, beside dt. Products of int8 B and C are exact int32
sums. For an fp32 output the other products are three tf32 products (22 bits). For a 16-bit one they are products of
bf16, or of fp16 where the inputs are; both hold int8 exactly, and fp32 factors are split into terms of 8 or 11 bits.
With two terms of dt x, of the decayed C B^T and of the state the error stays below the rounding of the output, with one
it would pass it. What is added to the state has three, so that a prompt in pieces leaves the state of the whole.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quamba_kernels.ops.sequences import check_cu_seqlens
from quamba_kernels.ops.ssd import NO_LIMIT
from quamba_kernels.triton.layout import packed, processors, unit, whole
from quamba_kernels.triton.rounding import softplus


@triton.jit
def exact(a, b, acc):
    """acc + a b of fp32 factors, as three tf32 products."""
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def split(a, DOT: tl.constexpr):
    """fp32 a as a 16-bit number and what it lacks, in fp32."""
    high = a.to(DOT)
    return high, a - high.to(tl.float32)


@triton.jit
def span(cu_ptr, T, sequence, segment, segments, Q: tl.constexpr):
    """Where a sequence begins and ends, and where its segment does, in tokens of the row."""
    start, end = 0, T
    if cu_ptr is not None:
        start, end = tl.load(cu_ptr + sequence), tl.load(cu_ptr + sequence + 1)
    size = tl.cdiv(tl.cdiv(end - start, Q), segments) * Q
    first = start + segment * size
    return first, tl.minimum(first + size, end)


@triton.jit
def load_step(dt_ptr, dt_token, t, inside, bias, lowest, highest, LIMIT: tl.constexpr):
    """dt [Q] of a chunk: 0 beyond the end, where it leaves the state as it is."""
    dt = softplus(tl.load(dt_ptr + t.to(tl.int64) * dt_token, mask=inside, other=0).to(tl.float32) + bias)
    if LIMIT:
        dt = tl.minimum(tl.maximum(dt, lowest), highest)
    return tl.where(inside, dt, 0.0)


@triton.jit
def ssd_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, dt_bias_ptr, state_ptr, x_scale_ptr, B_scale_ptr, C_scale_ptr, cu_ptr,
    y_ptr, last_ptr, local_ptr, decay_ptr, T, H, P, G, N, segments, lowest, highest,
    x_batch, x_token, x_head, dt_batch, dt_token, B_batch, B_token, B_group, C_batch, C_token, C_group,
    OUTPUT: tl.constexpr, LIMIT: tl.constexpr, EXACT: tl.constexpr, DOT: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BP channels of a head over one segment.

    OUTPUT: y, and from the last segment the last state; else local [.., segments - 1, P, N], the state left by a
    segment that begins at zero, and decay [.., segments - 1], the logarithm of what it leaves of an earlier one."""
    blocks = tl.cdiv(P, BP)
    head, p = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BP + tl.arange(0, BP)
    segment, sequence = tl.program_id(1), tl.program_id(2)
    group = head // (H // G)
    first, stop = span(cu_ptr, T, sequence, segment, segments, Q)
    row = sequence.to(tl.int64)
    if cu_ptr is not None:
        row = tl.zeros_like(row)
    n, q = tl.arange(0, BN), tl.arange(0, Q)
    n_in, p_in = n < N, p < P
    x_ptr += row * x_batch + head * x_head
    dt_ptr += row * dt_batch + head
    B_ptr += row * B_batch + group * B_group
    C_ptr += row * C_batch + group * C_group
    A = tl.load(A_ptr + head)
    bias, x_scale, B_scale, C_scale = 0.0, tl.full((BP,), 1.0, tl.float32), 1.0, 1.0
    if dt_bias_ptr is not None:
        bias = tl.load(dt_bias_ptr + head).to(tl.float32)
    if x_scale_ptr is not None:
        x_scale = tl.load(x_scale_ptr + head * P + p, mask=p_in, other=0)
    if B_scale_ptr is not None:
        B_scale = tl.load(B_scale_ptr + group)
    if C_scale_ptr is not None:
        C_scale = tl.load(C_scale_ptr + group)

    owner = sequence.to(tl.int64) * H + head
    states = owner * (segments - 1)
    tile = p[:, None] * N + n[None, :]
    tile_in = p_in[:, None] & n_in[None, :]
    h = tl.zeros((BP, BN), tl.float32)
    if OUTPUT:
        D = tl.load(D_ptr + head).to(tl.float32)
        if state_ptr is not None:
            h = tl.load(state_ptr + owner * P * N + tile, mask=tile_in, other=0).to(tl.float32)
        if local_ptr is not None:
            for i in range(0, segment):
                left = tl.exp(tl.load(decay_ptr + states + i))
                h = h * left + tl.load(local_ptr + (states + i) * P * N + tile, mask=tile_in, other=0)

    total = 0.0
    for begin in range(first, stop, Q):
        t = begin + q
        t_in = t < stop
        offset = t.to(tl.int64)[:, None]
        dt = load_step(dt_ptr, dt_token, t, t_in, bias, lowest, highest, LIMIT)
        decay = tl.cumsum(dt * A, 0)
        end = tl.sum(tl.where(q == Q - 1, decay, 0.0), 0)
        x = tl.load(x_ptr + offset * x_token + p[None, :], mask=t_in[:, None] & p_in[None, :], other=0)
        B = tl.load(B_ptr + offset * B_token + n[None, :], mask=t_in[:, None] & n_in[None, :], other=0)
        # dt goes to the rows of x alone: as a factor of the columns of mix each thread would hold sixteen of them
        value = x.to(tl.float32) * x_scale[None, :]
        xdt = value * dt[:, None]
        if OUTPUT:
            C = tl.load(C_ptr + offset * C_token + n[None, :], mask=t_in[:, None] & n_in[None, :], other=0)
            if B.dtype == tl.int8:
                mix = tl.dot(C, tl.trans(B), out_dtype=tl.int32).to(tl.float32)
            elif EXACT:
                mix = exact(C.to(DOT), tl.trans(B.to(DOT)), tl.zeros((Q, Q), tl.float32))
            else:
                mix = tl.dot(C.to(DOT), tl.trans(B.to(DOT)))
            gap = tl.where(q[:, None] >= q[None, :], decay[:, None] - decay[None, :], float("-inf"))
            mix *= tl.exp(gap) * (B_scale * C_scale)
            if EXACT:
                y = exact(mix, xdt, value * D)
                carried = exact(C.to(DOT), tl.trans(h), tl.zeros((Q, BP), tl.float32))
            else:
                mix_high, mix_low = split(mix, DOT)
                x_high, x_low = split(xdt, DOT)
                y = tl.dot(mix_high, x_high, value * D)
                y = tl.dot(mix_high, x_low.to(DOT), y)
                y = tl.dot(mix_low.to(DOT), x_high, y)
                h_high, h_low = split(h, DOT)
                carried = tl.dot(C.to(DOT), tl.trans(h_high))
                carried = tl.dot(C.to(DOT), tl.trans(h_low.to(DOT)), carried)
            y += carried * (tl.exp(decay) * C_scale)[:, None]
            place = ((row * T + offset) * H + head) * P + p[None, :]
            tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=t_in[:, None] & p_in[None, :])
        weighted = xdt * (tl.exp(end - decay) * B_scale)[:, None]
        h *= tl.exp(end)
        if EXACT:
            h = exact(tl.trans(weighted), B.to(DOT), h)
        else:
            high, rest = split(weighted, DOT)
            middle, low = split(rest, DOT)
            h = tl.dot(tl.trans(high), B.to(DOT), h)
            h = tl.dot(tl.trans(middle), B.to(DOT), h)
            h = tl.dot(tl.trans(low.to(DOT)), B.to(DOT), h)
        total += end

    if OUTPUT:
        if segment == segments - 1:
            tl.store(last_ptr + owner * P * N + tile, h, mask=tile_in)
    else:
        tl.store(local_ptr + (states + segment) * P * N + tile, h, mask=tile_in)
        tl.store(decay_ptr + states + segment, total)


def tile(tokens: int, headdim: int, BN: int, exact: bool) -> tuple[int, int, int, int]:
    """Tokens of a chunk, channels of a program, warps and stages.

    A warp group multiplies 64 rows, and with d_state and headdim near 64 the work per token is least for chunks of 64.
    Four warps hold a state of 8192 elements and the factors of a chunk in their registers, two such programs share a
    processor. fp32 factors are split in two and take four times the room of 16-bit ones. Triton 3.6 for Hopper gets the
    products of 64 rows with narrower factors wrong (y of headdim 16 and d_state 8 or 16); those of 32 are right.
    """
    BP = max(16, min(triton.next_power_of_2(headdim), (8192 if exact else 16384) // BN, 64))
    Q = max(16, min(triton.next_power_of_2(tokens), 16 if exact else 64 if min(BP, BN) >= 64 else 32))
    return Q, BP, 8 if exact or BN * BP > 8192 else 4, 1 if exact else 2


def segments(programs: int, tokens: int, Q: int, processors: int) -> int:
    """Cuts of each sequence: two programs on each processor, and no segment of fewer than four chunks."""
    return max(1, min(2 * processors // programs, tokens // (4 * Q)))


def ssd_scan(
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
    dt_limit: tuple[float, float],
    out_dtype: torch.dtype,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``ops.ssd_scan``. Raises ValueError for a cu_seqlens of another shape; what it holds is not looked at."""
    x, dt, B, C = unit(x), unit(dt), unit(B), unit(C)
    batch, tokens, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x, state)
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    exactly = out_dtype == torch.float32
    dot = tl.float32 if exactly else tl.float16 if B.dtype == torch.float16 else tl.bfloat16
    BN = max(32, triton.next_power_of_2(d_state))
    Q, BP, warps, stages = tile(tokens, headdim, BN, exactly)
    blocks = heads * triton.cdiv(headdim, BP)
    cuts = segments(blocks * sequences, tokens // (1 if cu_seqlens is None else sequences), Q, processors(x.device))
    y = x.new_empty(x.shape, dtype=out_dtype)
    last = x.new_empty((sequences, heads, headdim, d_state), dtype=torch.float32)
    local = decay = None
    if cuts > 1:
        local = x.new_empty((sequences, heads, cuts - 1, headdim, d_state), dtype=torch.float32)
        decay = x.new_empty((sequences, heads, cuts - 1), dtype=torch.float32)
    with torch.cuda.device_of(x):
        for output in (False, True) if cuts > 1 else (True,):
            ssd_kernel[(blocks, cuts if output else cuts - 1, sequences)](
                x, dt, packed(A), B, C, packed(D), packed(dt_bias), packed(state), whole(x_scale, heads, headdim),
                whole(B_scale, groups), whole(C_scale, groups), packed(cu_seqlens), y, last, local, decay,
                tokens, heads, headdim, groups, d_state, cuts, *dt_limit,
                x.stride(0), x.stride(1), x.stride(2), dt.stride(0), dt.stride(1),
                B.stride(0), B.stride(1), B.stride(2), C.stride(0), C.stride(1), C.stride(2),
                OUTPUT=output, LIMIT=tuple(dt_limit) != NO_LIMIT, EXACT=exactly, DOT=dot,
                Q=Q, BP=BP, BN=BN, num_warps=warps, num_stages=stages, enable_fp_fusion=True,
            )  # fmt: skip
    return y, last
