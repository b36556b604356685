"""One token of the scans in Triton: the state is read once, advanced in fp32, read out, rounded and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quamba_kernels.ops.ssd import NO_LIMIT
from quamba_kernels.triton.layout import in_place, packed, processors, unit, whole
from quamba_kernels.triton.rounding import softplus
from quamba_kernels.triton.state import advance, check_rng, load_rows, store_rows


@triton.jit
def load_vector(pointer, scale_ptr, group, inside):
    """fp32 of a vector of codes times the scale of its group, or of floats."""
    v = tl.load(pointer, mask=inside, other=0).to(tl.float32)
    if scale_ptr is not None:
        v *= tl.load(scale_ptr + group)
    return v


@triton.jit
def ssd_update_kernel(
    state_ptr, state_scale_ptr, rng_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, dt_bias_ptr,
    x_scale_ptr, B_scale_ptr, C_scale_ptr, y_ptr, batches, H, P, G, N, lowest, highest,
    x_batch, x_head, dt_batch, B_batch, B_group, C_batch, C_group,
    LIMIT: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BP rows of the state of one head of one sequence."""
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // (H // G)
    n = tl.arange(0, BN)
    p_in, n_in = p < P, n < N
    row = (batch * H + head) * P + p
    h = load_rows(state_ptr, state_scale_ptr, row, N, p_in, BN)
    x = tl.load(x_ptr + batch * x_batch + head * x_head + p, mask=p_in, other=0).to(tl.float32)
    if x_scale_ptr is not None:
        x *= tl.load(x_scale_ptr + head * P + p, mask=p_in, other=0)
    B = load_vector(B_ptr + batch * B_batch + group * B_group + n, B_scale_ptr, group, n_in)
    C = load_vector(C_ptr + batch * C_batch + group * C_group + n, C_scale_ptr, group, n_in)
    dt = tl.load(dt_ptr + batch * dt_batch + head).to(tl.float32)
    if dt_bias_ptr is not None:
        dt += tl.load(dt_bias_ptr + head).to(tl.float32)
    dt = softplus(dt)
    if LIMIT:
        dt = tl.minimum(tl.maximum(dt, lowest), highest)
    h = tl.exp(dt * tl.load(A_ptr + head)) * h + (dt * x)[:, None] * B[None, :]
    y = tl.sum(h * C[None, :], 1) + x * tl.load(D_ptr + head).to(tl.float32)
    tl.store(y_ptr + row, y.to(y_ptr.dtype.element_ty), mask=p_in)
    store_rows(h, state_ptr, state_scale_ptr, rng_ptr, row, batches * H * P, N, p_in, BN)


@triton.jit
def selective_update_kernel(
    state_ptr, state_scale_ptr, rng_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, dt_bias_ptr,
    x_scale_ptr, B_scale_ptr, C_scale_ptr, y_ptr, batches, I, N, x_batch, dt_batch, B_batch, C_batch,
    CHANNEL_SCALE: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BI channels of one sequence."""
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    batch = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, BN)
    i_in, n_in = i < I, n < N
    row = batch * I + i
    h = load_rows(state_ptr, state_scale_ptr, row, N, i_in, BN)
    x = tl.load(x_ptr + batch * x_batch + i, mask=i_in, other=0).to(tl.float32)
    if x_scale_ptr is not None:
        x *= tl.load(x_scale_ptr + i, mask=i_in, other=0) if CHANNEL_SCALE else tl.load(x_scale_ptr)
    B = load_vector(B_ptr + batch * B_batch + n, B_scale_ptr, 0, n_in)
    C = load_vector(C_ptr + batch * C_batch + n, C_scale_ptr, 0, n_in)
    dt = tl.load(dt_ptr + batch * dt_batch + i, mask=i_in, other=0).to(tl.float32)
    if dt_bias_ptr is not None:
        dt += tl.load(dt_bias_ptr + i, mask=i_in, other=0).to(tl.float32)
    dt = softplus(dt)
    A = tl.load(A_ptr + i[:, None] * N + n[None, :], mask=i_in[:, None] & n_in[None, :], other=0)
    h = tl.exp(dt[:, None] * A) * h + (dt * x)[:, None] * B[None, :]
    y = tl.sum(h * C[None, :], 1) + x * tl.load(D_ptr + i, mask=i_in, other=0).to(tl.float32)
    tl.store(y_ptr + row, y.to(y_ptr.dtype.element_ty), mask=i_in)
    store_rows(h, state_ptr, state_scale_ptr, rng_ptr, row, batches * I, N, i_in, BN)


def rows_and_warps(blocks: int, rows: int, BN: int, processors: int) -> tuple[int, int]:
    """State rows of a program and its warps, for ``blocks`` stretches of ``rows`` rows: 16 to 64 elements a thread,
    fewer where the device would not be filled with eight programs on each processor."""
    BR = max(1, min(triton.next_power_of_2(rows), 8192 // BN))
    while BR * BN > 1024 and blocks * triton.cdiv(rows, BR) < 8 * processors:
        BR //= 2
    return BR, 4 if BR * BN >= 2048 else 2


def ssd_update(
    state: torch.Tensor,
    state_scale: torch.Tensor | None,
    rng: torch.Tensor | None,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    B_scale: torch.Tensor | None,
    C_scale: torch.Tensor | None,
    dt_limit: tuple[float, float],
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """As ``ops.ssd_update``. Raises ValueError when what it writes is not contiguous."""
    in_place("the state", state)
    in_place("the state's scale", state_scale)
    check_rng(rng)
    x, dt, B, C = unit(x), unit(dt), unit(B), unit(C)
    (batch, heads, headdim, d_state), groups = state.shape, B.shape[1]
    y = x.new_empty(x.shape, dtype=out_dtype)
    BN = triton.next_power_of_2(d_state)
    BP, warps = rows_and_warps(batch * heads, headdim, BN, processors(x.device))
    with torch.cuda.device_of(x):
        ssd_update_kernel[(triton.cdiv(headdim, BP), heads, batch)](
            state, state_scale, rng, x, dt, packed(A), B, C, packed(D), packed(dt_bias),
            whole(x_scale, heads, headdim), whole(B_scale, groups), whole(C_scale, groups), y,
            batch, heads, headdim, groups, d_state, *dt_limit,
            x.stride(0), x.stride(1), dt.stride(0), B.stride(0), B.stride(1), C.stride(0), C.stride(1),
            LIMIT=tuple(dt_limit) != NO_LIMIT, BP=BP, BN=BN, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
        advance(rng)
    return y


def selective_update(
    state: torch.Tensor,
    state_scale: torch.Tensor | None,
    rng: torch.Tensor | None,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    B_scale: torch.Tensor | None,
    C_scale: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """As ``ops.selective_update``. Raises ValueError when what it writes is not contiguous."""
    in_place("the state", state)
    in_place("the state's scale", state_scale)
    check_rng(rng)
    x, dt, B, C = unit(x), unit(dt), unit(B), unit(C)
    batch, channels, d_state = state.shape
    y = x.new_empty(x.shape, dtype=out_dtype)
    BN = triton.next_power_of_2(d_state)
    BI, warps = rows_and_warps(batch, channels, BN, processors(x.device))
    with torch.cuda.device_of(x):
        selective_update_kernel[(triton.cdiv(channels, BI), batch)](
            state, state_scale, rng, x, dt, packed(A), B, C, packed(D), packed(dt_bias),
            packed(x_scale), packed(B_scale), packed(C_scale), y, batch, channels, d_state,
            x.stride(0), dt.stride(0), B.stride(0), C.stride(0),
            CHANNEL_SCALE=x_scale is not None and x_scale.numel() > 1, BI=BI, BN=BN,
            num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
        advance(rng)
    return y
