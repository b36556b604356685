"""Quantise and RMS norm in Triton: one kernel, a program per few rows, each row in registers and read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quamba_kernels.ops.rowwise import Activation
from quamba_kernels.triton.layout import packed, rows_of
from quamba_kernels.triton.rounding import codes, scale_of


@triton.jit
def rows_kernel(
    x_ptr, weight_ptr, out_scale_ptr, y_ptr, token_scale_ptr, M, D, x_stride, eps,
    NORM: tl.constexpr, CHANNEL_SCALE: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y of BM rows: [normed] x, times weight, as floats, as int8 by out_scale [1] or [D], or by the scale of each row,
    which is written to token_scale; absent tensors are None."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    inside = (m < M)[:, None] & (d < D)[None, :]
    rows = m.to(tl.int64)[:, None]
    y = tl.load(x_ptr + rows * x_stride + d[None, :], mask=inside, other=0).to(tl.float32)
    if NORM:
        y *= tl.rsqrt(tl.sum(y * y, 1) / D + eps)[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + d, mask=d < D, other=0).to(tl.float32)[None, :]
    if token_scale_ptr is not None:
        scale = scale_of(tl.max(tl.abs(y), 1))
        tl.store(token_scale_ptr + m, scale, mask=m < M)
        y = codes(y, tl.broadcast_to(scale[:, None], (BM, BD)))
    elif out_scale_ptr is not None:
        if CHANNEL_SCALE:
            scale = tl.load(out_scale_ptr + d, mask=d < D, other=1)[None, :]
            y = codes(y, tl.broadcast_to(scale, (BM, BD)))
        else:
            y = codes(y, tl.load(out_scale_ptr) + tl.zeros_like(y))
    tl.store(y_ptr + rows * D + d[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


def rows_and_warps(BD: int) -> tuple[int, int]:
    """Rows of a program and its warps: at least 1024 elements, 16 of them a thread."""
    BM = max(1, 1024 // BD)
    return BM, min(16, BM * BD // 512)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    norm: bool,
    out_scale: torch.Tensor | None,
    per_token: bool,
    out_dtype: torch.dtype,
) -> Activation:
    rows = rows_of(x)
    M, D = rows.shape
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) if per_token else out_scale
    y = x.new_empty(x.shape, dtype=out_dtype if scale is None else torch.int8)
    BD = triton.next_power_of_2(D)
    BM, warps = rows_and_warps(BD)
    with torch.cuda.device_of(x):
        rows_kernel[(triton.cdiv(M, BM),)](
            rows, packed(weight), None if per_token else packed(out_scale), y, scale if per_token else None, M, D,
            rows.stride(0), eps, NORM=norm, CHANNEL_SCALE=out_scale is not None and out_scale.numel() > 1,
            BM=BM, BD=BD, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return Activation(y, scale)


def quantize(x: torch.Tensor, scale: torch.Tensor | None) -> Activation:
    """As ``ops.quantize``."""
    return _launch(x, None, 0.0, False, scale, scale is None, x.dtype)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    out_scale: torch.Tensor | None,
    per_token: bool,
    out_dtype: torch.dtype,
) -> Activation:
    """As ``ops.rms_norm``."""
    return _launch(x, weight, eps, True, out_scale, per_token, out_dtype)
