"""Causal convolution, bias, SiLU and quantisation in Triton: one kernel for prompts and single tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quamba_kernels.ops.sequences import check_cu_seqlens
from quamba_kernels.triton.layout import in_place, packed, unit
from quamba_kernels.triton.rounding import codes, silu


@triton.jit
def shift_state(x_ptr, state_ptr, start, end, x_token, c, C, WIDTH: tl.constexpr, BW: tl.constexpr):
    """The last WIDTH - 1 inputs of a sequence into its state; x and state point to its row, c are channels."""
    j = tl.arange(0, BW)
    source = end - (WIDTH - 1) + j
    new = source >= start
    inside = (j < WIDTH - 1)[:, None] & (c < C)[None, :]
    from_x = tl.load(
        x_ptr + source.to(tl.int64)[:, None] * x_token + c[None, :], mask=inside & new[:, None], other=0
    )
    kept = (end - start + j)[:, None] * C + c[None, :]
    from_state = tl.load(state_ptr + kept, mask=inside & (source < start)[:, None], other=0)
    # every thread has read what another one is about to overwrite
    tl.debug_barrier()
    tl.store(state_ptr + j[:, None] * C + c[None, :], tl.where(new[:, None], from_x, from_state), mask=inside)


@triton.jit
def conv_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, x_scale_ptr, weight_scale_ptr, out_scale_ptr, cu_ptr, y_ptr,
    T, C, S, x_batch, x_token,
    WIDTH: tl.constexpr, STEPS: tl.constexpr, BW: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """[BT, BC] of y. With cu_seqlens a token finds its sequence by bisection in STEPS steps, and the states, which
    other programs read, are left to state_kernel; without, the program of the first tokens is the only reader."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    batch = tl.program_id(2).to(tl.int64)
    t_in, c_in = t < T, c < C
    first, sequence = tl.zeros_like(t), tl.zeros_like(t) + tl.program_id(2)
    if cu_ptr is not None:
        beyond = tl.zeros_like(t) + S
        sequence = tl.zeros_like(t)
        for _ in tl.static_range(STEPS):
            middle = (sequence + beyond) // 2
            later = tl.load(cu_ptr + middle) <= t
            sequence = tl.where(later, middle, sequence)
            beyond = tl.where(later, beyond, middle)
        first = tl.load(cu_ptr + sequence)
    x_ptr += batch * x_batch
    acc = tl.zeros((BT, BC), tl.float32)
    for w in tl.static_range(WIDTH):
        source = t - (WIDTH - 1) + w
        present = t_in & (source >= first)
        x = tl.load(
            x_ptr + source.to(tl.int64)[:, None] * x_token + c[None, :], mask=present[:, None] & c_in[None, :], other=0
        ).to(tl.float32)
        if state_ptr is not None:
            past = t_in & (source < first)
            row = sequence.to(tl.int64) * (WIDTH - 1) + (WIDTH - 1) + source - first
            old = state_ptr + row[:, None] * C + c[None, :]
            x += tl.load(old, mask=past[:, None] & c_in[None, :], other=0).to(tl.float32)
        acc += x * tl.load(weight_ptr + c * WIDTH + w, mask=c_in, other=0).to(tl.float32)[None, :]
    if x_scale_ptr is not None:
        acc *= tl.load(x_scale_ptr + c, mask=c_in, other=0)[None, :]
    if weight_scale_ptr is not None:
        acc *= tl.load(weight_scale_ptr + c, mask=c_in, other=0)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + c, mask=c_in, other=0).to(tl.float32)[None, :]
    y = silu(acc)
    if out_scale_ptr is not None:
        y = codes(y, tl.load(out_scale_ptr + c, mask=c_in, other=1)[None, :] + tl.zeros_like(y))
    place = (batch * T + t)[:, None] * C + c[None, :]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=t_in[:, None] & c_in[None, :])
    if state_ptr is not None and cu_ptr is None:  # noqa: SIM102 (decided when compiling, the inner one is not)
        if tl.program_id(0) == 0:
            shift_state(x_ptr, state_ptr + batch * (WIDTH - 1) * C, 0, T, x_token, c, C, WIDTH, BW)


@triton.jit
def state_kernel(
    x_ptr, state_ptr, cu_ptr, C, x_token, WIDTH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """The states of packed sequences, once every program of conv_kernel has read them."""
    sequence = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    start, end = tl.load(cu_ptr + sequence), tl.load(cu_ptr + sequence + 1)
    shift_state(x_ptr, state_ptr + sequence.to(tl.int64) * (WIDTH - 1) * C, start, end, x_token, c, C, WIDTH, BW)


def tile(tokens: int, width: int, element_size: int) -> tuple[int, int, int]:
    """Tokens, channels and warps of a program: 32 elements a thread, of which a load takes 4 (int8) to 16 bytes, and at
    least the tokens that look into the state."""
    if tokens == 1:
        return 1, 256, 2
    return max(min(16, triton.next_power_of_2(tokens)), triton.next_power_of_2(width)), 256, 4


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    weight_scale: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    out_dtype: torch.dtype,
    cu_seqlens: torch.Tensor | None,
) -> torch.Tensor:
    """As ``ops.causal_conv1d``. Raises ValueError for a state that is not contiguous or a cu_seqlens of another shape;
    what cu_seqlens holds is not looked at, which would wait for the device."""
    x, (batch, tokens, channels), width = unit(x), x.shape, weight.shape[-1]
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x, state)
    in_place("the convolution's state", state)
    y = x.new_empty(x.shape, dtype=out_dtype if out_scale is None else torch.int8)
    BT, BC, warps = tile(tokens, width, x.element_size())
    BC = min(BC, max(16, triton.next_power_of_2(channels)))
    blocks, BW = triton.cdiv(channels, BC), triton.next_power_of_2(width - 1)
    bounds, sequences = packed(cu_seqlens), 0 if cu_seqlens is None else len(cu_seqlens) - 1
    with torch.cuda.device_of(x):
        conv_kernel[(triton.cdiv(tokens, BT), blocks, batch)](
            x, packed(weight), packed(bias), state, packed(x_scale), packed(weight_scale), packed(out_scale), bounds, y,
            tokens, channels, sequences, x.stride(0), x.stride(1), WIDTH=width, STEPS=sequences.bit_length(), BW=BW,
            BT=BT, BC=BC, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
        if state is not None and cu_seqlens is not None:
            state_kernel[(sequences, blocks)](
                x, state, bounds, channels, x.stride(1), WIDTH=width, BW=BW, BC=BC, num_warps=2
            )
    return y
