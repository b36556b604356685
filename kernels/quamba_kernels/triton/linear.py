"""Low-bit linears and the embedding in Triton: the fallback where no CUDA kernel serves.

One kernel reads int8 or int4 weights in the layout of ``ops.linear``, with or without groups. It walks along K in
blocks that never cross a group, so that a group's factor meets a partial sum once per output and not once per weight:
the integer of the two-level format an int32 sum (still exact), the scale of w4a16 an fp32 one. K is not split over
programs: results do not depend on their order, and nothing but the output is allocated.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from quamba_kernels.triton.layout import packed, rows_of
from quamba_kernels.triton.rounding import ROUND


@triton.jit
def linear_kernel(
    x_ptr, x_scale_ptr, w_ptr, factor_ptr, w_scale_ptr, bias_ptr, residual_ptr,
    out_scale_ptr, y_ptr, M, O, K, S, x_stride, residual_stride,
    PER_ELEMENT: tl.constexpr, GROUPED: tl.constexpr, EVEN: tl.constexpr, ACC: tl.constexpr, TOKEN_SCALE: tl.constexpr,
    CHANNEL_OUT_SCALE: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One [BM, BO] tile of y. x [M, K] int8 or float; w [O, K] int8 or [O, K/8] int32, an element of which holds
    PER_ELEMENT weights; factor [O, K/S]; ACC, the type of the sums; EVEN: BK divides S; absent tensors are None."""
    tiles_m = tl.cdiv(M, BM)
    m = (tl.program_id(0) % tiles_m) * BM + tl.arange(0, BM)
    o = (tl.program_id(0) // tiles_m) * BO + tl.arange(0, BO)
    m_in, o_in = m[:, None] < M, o[:, None] < O
    k = tl.arange(0, BK)
    x_rows = x_ptr + m.to(tl.int64)[:, None] * x_stride
    w_rows = w_ptr + o.to(tl.int64)[:, None] * (K // PER_ELEMENT)
    groups, blocks = K // S, tl.cdiv(S, BK)
    acc = tl.zeros((BM, BO), ACC)
    for step in range(0, groups * blocks):
        group, start = step // blocks, (step % blocks) * BK
        first = group * S + start
        x_in = m_in if EVEN else m_in & (start + k < S)[None, :]
        x = tl.load(x_rows + (first + k)[None, :], mask=x_in, other=0)
        if PER_ELEMENT == 1:
            w_in = o_in if EVEN else o_in & (start + k < S)[None, :]
            w = tl.load(w_rows + (first + k)[None, :], mask=w_in, other=0)
        else:
            # beyond a group x is 0, so what its weights unpack to does not matter
            word = tl.arange(0, BK // 8)
            words_in = o_in if EVEN else o_in & (start + 8 * word < S)[None, :]
            words = tl.load(w_rows + (first // 8 + word)[None, :], mask=words_in, other=0)
            nibbles = (words[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :]) & 15
            w = tl.reshape(nibbles - 8, (BO, BK))
        w = tl.trans(w.to(x.dtype))
        if GROUPED:
            factor = tl.load(factor_ptr + o * groups + group, mask=o < O, other=0).to(ACC)
            acc += tl.dot(x, w, input_precision="ieee", out_dtype=ACC) * factor[None, :]
        else:
            acc = tl.dot(x, w, acc, input_precision="ieee", out_dtype=ACC)
    y = acc.to(tl.float32)
    if x_scale_ptr is not None:
        if TOKEN_SCALE:
            y *= tl.load(x_scale_ptr + m, mask=m < M, other=0)[:, None]
        else:
            y *= tl.load(x_scale_ptr)
    if w_scale_ptr is not None:
        y *= tl.load(w_scale_ptr + o, mask=o < O, other=0)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + o, mask=o < O, other=0).to(tl.float32)[None, :]
    inside = m_in & (o < O)[None, :]
    if residual_ptr is not None:
        rows = residual_ptr + m.to(tl.int64)[:, None] * residual_stride
        y += tl.load(rows + o[None, :], mask=inside, other=0).to(tl.float32)
    if out_scale_ptr is not None:
        if CHANNEL_OUT_SCALE:
            y = tl.div_rn(y, tl.load(out_scale_ptr + o, mask=o < O, other=1)[None, :] + tl.zeros_like(y))
        else:
            y = tl.div_rn(y, tl.load(out_scale_ptr) + tl.zeros_like(y))
        y = tl.minimum(tl.maximum(y, -127.0), 127.0) + ROUND - ROUND
    tl.store(y_ptr + m.to(tl.int64)[:, None] * O + o[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def embedding_kernel(ids_ptr, weight_ptr, scale_ptr, y_ptr, V, D, BD: tl.constexpr):
    """One row of y: weight[id] * scale[id], NaN for an id outside of 0..V-1."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.load(ids_ptr + row).to(tl.int64)
    known = (index >= 0) & (index < V)
    index = tl.where(known, index, 0)
    scale = tl.where(known, tl.load(scale_ptr + index), float("nan"))
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        codes = tl.load(weight_ptr + index * D + d, mask=d < D, other=0)
        tl.store(y_ptr + row * D + d, (codes.to(tl.float32) * scale).to(y_ptr.dtype.element_ty), mask=d < D)


class Tile(NamedTuple):
    """Rows, out features and in features of a block, warps of a program, stages of its pipeline."""

    BM: int
    BO: int
    BK: int
    warps: int
    stages: int


def tile(rows: int, int8: bool, wide: bool) -> Tile:
    """Sizes by hand: few rows want many programs and many loads in flight, many rows want reuse.

    ``wide`` are fp32 products, which have no tensor cores and need registers.
    """
    if wide:
        return Tile(16, 32, 64, 4, 2) if rows <= 16 else Tile(64, 64, 32, 4, 2)
    if rows <= 16:
        return Tile(16, 32, 256 if int8 else 128, 4, 4)
    if rows <= 32:
        return Tile(32, 64, 128, 4, 4)
    if rows <= 256:
        return Tile(64, 64, 128 if int8 else 64, 4, 4)
    return Tile(128, 128, 128 if int8 else 64, 8, 3)


def check(x: torch.Tensor, weight: torch.Tensor, factor: torch.Tensor | None, per_element: int) -> None:
    """Raises ValueError when the weights do not belong to x."""
    K, stored = x.shape[-1], weight.shape[-1] * per_element
    if stored != K:
        raise ValueError(f"x has {K} in features and the weights {stored}: pass a linear its own input")
    if factor is not None and K % factor.shape[-1]:
        raise ValueError(f"{factor.shape[-1]} groups do not divide {K} in features: pass factors of [O, K/S]")
    if len({t.device for t in (x, weight, factor) if t is not None}) > 1:
        raise ValueError(f"x is on {x.device} and the weights are on {weight.device}: move one of them")


def linear(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    factor: torch.Tensor | None,
    w_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out_scale: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """y [..., O] of any of the three formats; arguments as in ``ops.linear``.

    weight int8 [O, K] or int32 [O, K/8]; factor [O, K/S]: int8 multipliers or fp16 scales, None for whole rows;
    w_scale fp32 [O] or None. Raises ValueError for shapes that do not belong together.
    """
    per_element = 1 if weight.dtype == torch.int8 else 8
    check(x, weight, factor, per_element)
    rows, K, features = rows_of(x), x.shape[-1], weight.shape[0]
    M, S = rows.shape[0], K if factor is None else K // factor.shape[-1]
    int8 = x.dtype == torch.int8
    BM, BO, BK, warps, stages = tile(M, int8, wide=x.dtype == torch.float32)
    BK = min(BK, max(32, triton.next_power_of_2(S)))
    residual = None if residual is None else rows_of(residual)
    y = x.new_empty((*x.shape[:-1], features), dtype=out_dtype if out_scale is None else torch.int8)
    with torch.cuda.device_of(x):
        linear_kernel[(triton.cdiv(M, BM) * triton.cdiv(features, BO),)](
            rows, packed(x_scale), packed(weight), packed(factor), packed(w_scale), packed(bias), residual,
            packed(out_scale), y, M, features, K, S, rows.stride(0), 0 if residual is None else residual.stride(0),
            PER_ELEMENT=per_element, GROUPED=factor is not None, EVEN=S % BK == 0, ACC=tl.int32 if int8 else tl.float32,
            TOKEN_SCALE=x_scale is not None and x_scale.numel() > 1,
            CHANNEL_OUT_SCALE=out_scale is not None and out_scale.numel() > 1,
            BM=BM, BO=BO, BK=BK, num_warps=warps, num_stages=stages, enable_fp_fusion=False,
        )  # fmt: skip
    return y


def embedding(ids: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """y [..., D] = weight[ids] * scale[ids] with weight int8 [V, D], scale fp32 [V]; NaN for ids outside of 0..V-1."""
    V, D = weight.shape
    y = torch.empty((*ids.shape, D), dtype=out_dtype, device=weight.device)
    with torch.cuda.device_of(weight):
        embedding_kernel[(ids.numel(),)](
            packed(ids), packed(weight), packed(scale), y, V, D, BD=min(1024, triton.next_power_of_2(D))
        )
    return y
