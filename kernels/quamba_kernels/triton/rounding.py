"""Pieces of kernels: int8 codes, SiLU, softplus, in fp32 and as the torch bodies round."""

import triton
import triton.language as tl

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds |y| < 2^22 half to even


@triton.jit
def codes(y, scale):
    """clamp(rint(y / scale), -127, 127) as int8; both of one shape."""
    y = tl.div_rn(y, scale)
    return (tl.minimum(tl.maximum(y, -127.0), 127.0) + ROUND - ROUND).to(tl.int8)


@triton.jit
def scale_of(peak):
    """peak / 127, and 1 where it is 0."""
    return tl.where(peak > 0, tl.div_rn(peak, tl.full(peak.shape, 127.0, tl.float32)), 1.0)


@triton.jit
def silu(y):
    return y / (1 + tl.exp(-y))


@triton.jit
def softplus(y):
    """max(y, 0) + log1p(e) with e = exp(-|y|), as log1p(e) = 2 atanh(e / (2 + e)): the logarithm of 1 + e in fp32
    would lose small steps, and s = e / (2 + e) <= 1/3 needs eight terms for the last bit."""
    e = tl.exp(-tl.abs(y))
    s = e / (2 + e)
    q = s * s
    series = 1 / 15 * q + 1 / 13
    series = series * q + 1 / 11
    series = series * q + 1 / 9
    series = series * q + 1 / 7
    series = series * q + 1 / 5
    series = series * q + 1 / 3
    series = series * q + 1
    return tl.maximum(y, 0.0) + 2 * s * series
