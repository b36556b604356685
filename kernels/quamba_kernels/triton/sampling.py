"""The likeliest token in Triton: a program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quamba_kernels.triton.layout import rows_of

MOST = 16384
"""Logits that a program looks at together: sixteen a thread."""


@triton.jit
def likeliest_kernel(logits_ptr, ids_ptr, V, stride, BV: tl.constexpr):
    """ids of one row: the first of the largest of V logits, as integers that are ordered as floats are, NaN on top."""
    row = tl.program_id(0).to(tl.int64)
    most = tl.full((BV,), -(2**31), tl.int32)
    at = tl.zeros((BV,), tl.int32)
    for start in range(0, V, BV):
        v = start + tl.arange(0, BV)
        x = tl.load(logits_ptr + row * stride + v, mask=v < V, other=0).to(tl.float32) + 0.0  # -0 becomes 0
        word = x.to(tl.int32, bitcast=True)
        key = tl.where(x == x, word ^ ((word >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
        key = tl.where(v < V, key, -(2**31))
        at = tl.where(key > most, v, at)
        most = tl.maximum(most, key)
    best = tl.max(most, 0)
    tl.store(ids_ptr + row, tl.min(tl.where(most == best, at, 0x7FFFFFFF), 0).to(tl.int64))


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """Index int64 [...] of the largest of logits [..., V]."""
    rows = rows_of(logits)
    ids = torch.empty(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    BV = min(MOST, triton.next_power_of_2(rows.shape[1]))
    if len(rows):
        with torch.cuda.device_of(logits):
            likeliest_kernel[(len(rows),)](
                rows, ids, rows.shape[1], rows.stride(0), BV=BV, num_warps=max(1, min(32, BV // 512))
            )
    return ids
