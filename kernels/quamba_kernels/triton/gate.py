"""Gate, grouped norm, Hadamard rotation and quantisation in Triton: one program per token, its row on chip throughout.

A row is a tile [blocks, base, power] padded to powers of two. The rotation is H_base times a Sylvester matrix of the
power; that one is applied in factors of at most 32, each a small matrix product in fp32 (input_precision "ieee": fused
multiply-adds of the values themselves with +-1, so nothing is lost but the rounding of the sums).
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from quamba_kernels.hadamard import factor, hadamard_matrix
from quamba_kernels.ops.rowwise import Activation
from quamba_kernels.triton.layout import packed, rows_of
from quamba_kernels.triton.rounding import codes, scale_of, silu


@triton.jit
def sylvester(x, OUTER: tl.constexpr, F: tl.constexpr, INNER: tl.constexpr):
    """x [OUTER, F, INNER] times the +-1 Sylvester matrix of F along its middle axis. Windows of at least 16 elements
    pass a block-diagonal matrix, since a product has no smaller one."""
    W: tl.constexpr = F if F >= 16 else 16
    i, j = tl.arange(0, W)[:, None], tl.arange(0, W)[None, :]
    both = i & j & (F - 1)
    both ^= both >> 4
    both ^= both >> 2
    both ^= both >> 1
    signs = tl.where(i // F == j // F, 1.0 - 2.0 * (both & 1).to(tl.float32), 0.0)
    if INNER > 1:
        x = tl.permute(x, (0, 2, 1))
    x = tl.reshape(x, (OUTER * INNER * F // W, W))
    x = tl.dot(x, signs, input_precision="ieee")
    x = tl.reshape(x, (OUTER, INNER, F))
    if INNER > 1:
        x = tl.permute(x, (0, 2, 1))
    return tl.reshape(x, (OUTER, F, INNER))


@triton.jit
def gate_kernel(
    y_ptr, z_ptr, weight_ptr, z_scale_ptr, base_ptr, out_scale_ptr, u_ptr, token_scale_ptr,
    I, y_stride, z_stride, eps, norm_factor,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, BASE: tl.constexpr, POWER: tl.constexpr, CHANNEL_GATE: tl.constexpr,
    ROUND_GATE: tl.constexpr, CHANNEL_SCALE: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr, F1: tl.constexpr,
    F2: tl.constexpr, F3: tl.constexpr,
):  # fmt: skip
    """One row of I channels. Tile [BB, BK, POWER] of blocks, rows of the base matrix (BASE of them, none if 1) and
    columns; F1 F2 F3 = POWER; GROUPS norms of GROUP channels, none if 0; norm_factor scales the rotation. ROUND_GATE: z
    are floats that become codes first."""
    row = tl.program_id(0).to(tl.int64)
    block, base, column = tl.arange(0, BB), tl.arange(0, BK), tl.arange(0, POWER)
    i = (block[:, None, None] * BASE + base[None, :, None]) * POWER + column[None, None, :]
    inside = (i < I) & (base < BASE)[None, :, None]
    u = tl.load(y_ptr + row * y_stride + i, mask=inside, other=0).to(tl.float32)
    z = tl.load(z_ptr + row * z_stride + i, mask=inside, other=0).to(tl.float32)
    if z_scale_ptr is not None:
        if CHANNEL_GATE:
            z_scale = tl.load(z_scale_ptr + i, mask=inside, other=1)
        else:
            z_scale = tl.load(z_scale_ptr) + tl.zeros_like(z)
        if ROUND_GATE:
            z = codes(z, z_scale).to(tl.float32)
        z *= z_scale
    u *= silu(z)
    if GROUPS > 0:
        squares = u * u
        rate = tl.zeros_like(u)
        for g in tl.static_range(GROUPS):
            mine = i // GROUP == g
            mean = tl.sum(tl.where(mine, squares, 0.0)) / GROUP
            rate = tl.where(mine, tl.rsqrt(mean + eps), rate)
        u *= rate
    if weight_ptr is not None:
        u *= tl.load(weight_ptr + i, mask=inside, other=0).to(tl.float32)
    if BASE > 1:
        k = tl.arange(0, BK)
        known = (k < BASE)[:, None] & (k < BASE)[None, :]
        matrix = tl.load(base_ptr + k[:, None] * BASE + k[None, :], mask=known, other=0)
        u = tl.reshape(tl.permute(u, (0, 2, 1)), (BB * POWER, BK))
        u = tl.dot(u, matrix, input_precision="ieee")
        u = tl.permute(tl.reshape(u, (BB, POWER, BK)), (0, 2, 1))
    if F1 > 1:
        u = tl.reshape(sylvester(tl.reshape(u, (BB * BK, F1, F2 * F3)), BB * BK, F1, F2 * F3), (BB, BK, POWER))
    if F2 > 1:
        u = tl.reshape(sylvester(tl.reshape(u, (BB * BK * F1, F2, F3)), BB * BK * F1, F2, F3), (BB, BK, POWER))
    if F3 > 1:
        u = tl.reshape(sylvester(tl.reshape(u, (BB * BK * F1 * F2, F3, 1)), BB * BK * F1 * F2, F3, 1), (BB, BK, POWER))
    if BASE * F1 * F2 * F3 > 1:
        u *= norm_factor
    if token_scale_ptr is not None:
        scale = scale_of(tl.max(tl.abs(u)) + tl.zeros((1,), tl.float32))
        tl.store(token_scale_ptr + row + tl.arange(0, 1), scale)
        u = codes(u, tl.broadcast_to(scale[:, None, None], (BB, BK, POWER)))
    elif out_scale_ptr is not None:
        if CHANNEL_SCALE:
            u = codes(u, tl.load(out_scale_ptr + i, mask=inside, other=1))
        else:
            u = codes(u, tl.load(out_scale_ptr) + tl.zeros_like(u))
    tl.store(u_ptr + row * I + i, u.to(u_ptr.dtype.element_ty), mask=inside)


@cache
def _base_matrix(base: int, device: torch.device) -> torch.Tensor:
    """[base, base] of +-1, whose Sylvester part is H_1."""
    with torch.inference_mode(False):  # cached: a later call may be outside inference mode
        return (hadamard_matrix(base) * base**0.5).round().to(device, torch.float32)


def factors(power: int) -> tuple[int, int, int]:
    """A power of two as three powers of two of at most 32 that differ little, 1 where fewer do."""
    bits = power.bit_length() - 1
    steps = max(1, -(-bits // 5))
    parts = [1 << ((bits + k) // steps) for k in range(steps)]
    first, second, third = [1, 1, 1, *parts][-3:]
    return first, second, third


def gate_output(
    y: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    z_scale: torch.Tensor | None,
    norm_groups: int,
    block: int,
    out_scale: torch.Tensor | None,
    per_token: bool,
    out_dtype: torch.dtype,
) -> Activation:
    """As ``ops.gate_output``. Raises ValueError for a block that does not divide I or whose order is unknown."""
    channels = y.shape[-1]
    if block and channels % block:
        raise ValueError(f"a Hadamard block of {block} does not divide {channels} channels")
    if norm_groups and channels % norm_groups:
        raise ValueError(f"{norm_groups} norm groups do not divide {channels} channels")
    parts = factor(block) if block > 1 else (1, 1)
    if parts is None:
        raise ValueError(f"no Hadamard matrix of order {block} is known")
    base, power = parts
    y_rows, z_rows = rows_of(y), rows_of(z)
    scale = y.new_empty((*y.shape[:-1], 1), dtype=torch.float32) if per_token else out_scale
    u = y.new_empty(y.shape, dtype=out_dtype if scale is None else torch.int8)
    F1, F2, F3 = factors(power)
    BK = 1 if base == 1 else max(16, triton.next_power_of_2(base))
    if block <= 1:
        F1, F2, F3 = 1, 1, 1
        BB, width = 1, triton.next_power_of_2(channels)
    else:
        # a product has at least 16 rows
        BB, width = max(triton.next_power_of_2(channels // block), 16 // power, 512 // (BK * power)), power
    elements = BB * BK * width
    with torch.cuda.device_of(y):
        gate_kernel[(len(y_rows),)](
            y_rows, z_rows, packed(weight), packed(z_scale), _base_matrix(base, y.device) if base > 1 else None,
            None if per_token else packed(out_scale), u, scale if per_token else None,
            channels, y_rows.stride(0), z_rows.stride(0), eps, max(block, 1) ** -0.5,
            GROUPS=norm_groups, GROUP=channels // max(1, norm_groups), BASE=base, POWER=width,
            CHANNEL_GATE=z_scale is not None and z_scale.numel() > 1, ROUND_GATE=z.is_floating_point(),
            CHANNEL_SCALE=out_scale is not None and out_scale.numel() > 1,
            BB=BB, BK=BK, F1=F1, F2=F2, F3=F3, num_warps=min(16, max(4, elements // 1024)), enable_fp_fusion=False,
        )  # fmt: skip
    return Activation(u, scale)
