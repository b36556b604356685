"""The W4A8 linears of a decode step on Hopper: up to eight tokens, and up to two whose norm the linear does itself.

csrc/linear_stream_w4a8_sm90.cu keeps what it reads of the weights in shared memory before its turn comes. ``serves``
and ``normalises`` say exactly which problems it takes, so that no call finds out. For the other formats, and from two
rows on, the kernel that splits K is faster within a model.
"""

from __future__ import annotations

import ctypes

from quamba_kernels.cuda.library import QuambaLinear

ROWS, NORM_ROWS = 8, 2
LARGEST = 20_000_000
"""Bytes of a weight up to which this kernel is ahead of the skinny one, which has more loads under way."""
MIN_K, MAX_X_BYTES, MAX_NORM_K, NORM_STEP = 128, 131_072, 8192, 16
STRIP, TAIL = 16, 8
"""Out features of a strip of weights, and of the last one where it is shorter."""


class QuambaStream(ctypes.Structure):
    """The struct of csrc/linear_stream.h, field by field."""

    _fields_ = [
        ("linear", QuambaLinear),
        ("norm_weight", ctypes.c_void_p),
        ("in_scale", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("prologue", "norm_weight_dtype")),
    ]

    def __str__(self) -> str:
        return f"{self.linear}, prologue {self.prologue}"


def serves(a: QuambaLinear) -> bool:
    """Whether the kernel takes a problem: tokens, groups, whole copies of 16 bytes, room in shared memory."""
    return (
        0 < a.M <= ROWS
        and a.K >= MIN_K
        and (a.S % 128 == 0 or a.S == a.K)
        and (a.O % STRIP == 0 or TAIL * (a.K // a.S) % 16 == 0)
        and (a.M + a.M % 2) * a.K <= MAX_X_BYTES
        and a.O * a.K // 2 <= LARGEST
    )


def normalises(a: QuambaLinear) -> bool:
    """Whether the kernel also makes the linear's input from the floats before its norm."""
    return serves(a) and a.M <= NORM_ROWS and a.K <= MAX_NORM_K and a.K % NORM_STEP == 0
