"""Storage of the recurrent state in Triton: rows over d_state as fp32, fp16, or int8 with a scale and a dither each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quamba_kernels.triton.layout import in_place, packed
from quamba_kernels.triton.rounding import ROUND, scale_of

TOGETHER, ALIGNMENT = 16, 16
"""Layers whose states a launch stores, and what their addresses are multiples of."""


@triton.jit
def mix(v):
    """The 32-bit finaliser of ops.state."""
    v = (v ^ (v >> 16)) * 0x7FEB352D
    v = (v ^ (v >> 15)) * 0x846CA68B
    return v ^ (v >> 16)


@triton.jit
def draw(rng_ptr, index):
    """Number ``index`` of this step, in [0, 1)."""
    seed, step = tl.load(rng_ptr).to(tl.uint32), tl.load(rng_ptr + 1).to(tl.uint32)
    v = mix(index.to(tl.uint32) + mix(seed ^ mix(step)))
    return tl.minimum(v.to(tl.float32) * (1 / 4294967296), 0.99999994)


@triton.jit
def load_rows(state_ptr, scale_ptr, row, N, inside, BN: tl.constexpr):
    """fp32 [R, BN] of the rows int64 [R]; 0 outside."""
    n = tl.arange(0, BN)
    mask = inside[:, None] & (n < N)[None, :]
    h = tl.load(state_ptr + row[:, None] * N + n[None, :], mask=mask, other=0).to(tl.float32)
    if scale_ptr is not None:
        h *= tl.load(scale_ptr + row, mask=inside, other=0)[:, None]
    return h


@triton.jit
def store_rows(h, state_ptr, scale_ptr, rng_ptr, row, rows, N, inside, BN: tl.constexpr):
    """ops.quantize_state of h [R, BN], which is 0 beyond N, into the rows int64 [R] of ``rows``; the step stays."""
    n = tl.arange(0, BN)
    mask = inside[:, None] & (n < N)[None, :]
    if scale_ptr is not None:
        scale = scale_of(tl.max(tl.abs(h), 1))
        tl.store(scale_ptr + row, scale, mask=inside)
        h = tl.div_rn(h, tl.broadcast_to(scale[:, None], h.shape))
        if rng_ptr is not None:
            dither = draw(rng_ptr, row)[:, None] + draw(rng_ptr, n + rows)[None, :]
            h = tl.floor(h + (dither - tl.floor(dither)))
        else:
            h = h + ROUND - ROUND
        h = tl.minimum(tl.maximum(h, -127.0), 127.0)
    tl.store(state_ptr + row[:, None] * N + n[None, :], h.to(state_ptr.dtype.element_ty), mask=mask)


@triton.jit
def quantize_state_kernel(h_ptr, state_ptr, scale_ptr, rng_ptr, rows, N, BR: tl.constexpr, BN: tl.constexpr):
    """BR rows."""
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    h = load_rows(h_ptr, None, row, N, row < rows, BN)
    store_rows(h, state_ptr, scale_ptr, rng_ptr, row, rows, N, row < rows, BN)


@triton.jit
def select(addresses, layer, kind: tl.constexpr):
    """The pointer of a layer, of addresses that are multiples of 16."""
    address = tl.full((), 0, tl.int64)
    for i in tl.static_range(len(addresses)):
        address = tl.where(layer == i, addresses[i], address)
    return tl.multiple_of(address.to(tl.pointer_type(kind)), 16)


@triton.jit
def quantize_states_kernel(h, state, scale, rng, rows, N, NOISY: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr):
    """BR rows of a layer, whose tensors lie at these addresses."""
    layer = tl.program_id(1)
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    values = load_rows(select(h, layer, tl.float32), None, row, N, row < rows, BN)
    state_ptr, scale_ptr = select(state, layer, tl.int8), select(scale, layer, tl.float32)
    rng_ptr = select(rng, layer, tl.int64) if NOISY else None
    store_rows(values, state_ptr, scale_ptr, rng_ptr, row, rows, N, row < rows, BN)


def check_rng(rng: torch.Tensor | None) -> None:
    """Raises ValueError for anything but seed and step, int64 [2]."""
    in_place("rng", rng)
    if rng is not None and (rng.dtype != torch.int64 or rng.shape != (2,)):
        raise ValueError(f"rng is int64 [2], seed and step, got {rng.dtype} {list(rng.shape)}")


def advance(rng: torch.Tensor | None) -> None:
    """The next step, in a launch of its own: every program of the kernel before it reads the old one."""
    if rng is not None:
        rng[1].add_(1)


def tile(N: int) -> tuple[int, int]:
    """Rows of a program, and columns: a power of two."""
    BN = triton.next_power_of_2(N)
    return max(1, 2048 // BN), BN


def quantize_state(
    h: torch.Tensor, state: torch.Tensor, scale: torch.Tensor | None, rng: torch.Tensor | None
) -> None:
    """As ``ops.quantize_state``. Raises ValueError when what it writes is not contiguous."""
    if scale is None:
        state.copy_(h)
        return
    in_place("the state", state)
    in_place("the state's scale", scale)
    check_rng(rng)
    N, rows = h.shape[-1], scale.numel()
    BR, BN = tile(N)
    with torch.cuda.device_of(h):
        quantize_state_kernel[(triton.cdiv(rows, BR),)](
            packed(h), state, scale, rng, rows, N, BR=BR, BN=BN, num_warps=4, enable_fp_fusion=False
        )
        advance(rng)


def quantize_states(
    h: tuple[torch.Tensor, ...],
    state: tuple[torch.Tensor, ...],
    scale: tuple[torch.Tensor, ...] | None,
    rng: tuple[torch.Tensor, ...] | None,
) -> None:
    """As ``ops.quantize_states``. Raises ValueError when what it writes is not contiguous, when layers are not alike in
    shape and type, and when a tensor does not begin at a multiple of 16 bytes."""
    if scale is None:
        torch._foreach_copy_(list(state), list(h))
        return
    kinds = {(one.shape, one.dtype, to.shape, to.dtype, at.shape, at.dtype)
             for one, to, at in zip(h, state, scale, strict=True)}  # fmt: skip
    shape = h[0].shape
    if kinds != {(shape, torch.float32, shape, torch.int8, shape[:-1], torch.float32)}:
        raise ValueError(f"layers alike have states fp32 [..., N], int8 [..., N] and scales fp32 [...], got {kinds}")
    for stored, at in zip(state, scale, strict=True):
        in_place("the state", stored)
        in_place("the state's scale", at)
    for drawn in rng or ():
        check_rng(drawn)
    parts = ([one.contiguous() for one in h], state, scale, scale if rng is None else rng)
    N, rows = h[0].shape[-1], scale[0].numel()
    BR, BN = tile(N)
    with torch.cuda.device_of(h[0]):
        for first in range(0, len(h), TOGETHER):
            layers = min(TOGETHER, len(h) - first)
            # always as many addresses, or each number of layers would be compiled anew
            given = [[part[first + min(i, layers - 1)].data_ptr() for i in range(TOGETHER)] for part in parts]
            if any(address % ALIGNMENT for addresses in given for address in addresses):
                raise ValueError(f"states, their scales and seeds have to begin at multiples of {ALIGNMENT} bytes")
            quantize_states_kernel[(triton.cdiv(rows, BR), layers)](
                *map(tuple, given), rows, N, NOISY=rng is not None, BR=BR, BN=BN, num_warps=4, enable_fp_fusion=False
            )
        if rng is not None:
            torch._foreach_add_([one[1:] for one in rng], 1)
