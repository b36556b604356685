"""Triton: the linears and the embedding on CUDA devices where the CUDA kernels do not serve.

With ``TRITON_INTERPRET=1`` in the environment the same kernels run in Triton's interpreter, on tensors of the CPU.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from quamba_kernels import ops
from quamba_kernels.registry import Setting

INTERPRET = "TRITON_INTERPRET"


def _why_not(setting: Setting) -> str | None:
    interpreted = os.environ.get(INTERPRET) == "1"
    if setting.device != ("cpu" if interpreted else "cuda"):
        where = f"the CPU, since {INTERPRET}=1 asks for the interpreter" if interpreted else "a CUDA device"
        return f"serves tensors on {where}; these are on {setting.device}"
    if interpreted and setting.dtype == torch.bfloat16:
        return "Triton's interpreter has no bf16: it computes with the bits as integers"
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    return None


def _int4_why_not(setting: Setting) -> str | None:
    features = setting.shape.get("K", 8)
    if features % 8:
        return f"reads words of eight int4 codes, got {features} in features"
    return _why_not(setting)


@ops.linear_w8a8.backend("triton", why_not=_why_not, rank=20)
def linear_w8a8(
    x, x_scale, weights: tuple[torch.Tensor, ...], bias=None, residual=None, *,
    out_scale=None, out_dtype=torch.float32,
):  # fmt: skip
    """Exact int32 sums on int8 tensor cores."""
    from quamba_kernels.triton.linear import linear

    weight, scale = weights
    return linear(x, x_scale, weight, None, scale, bias, residual, out_scale, out_dtype)


@ops.linear_w4a8.backend("triton", why_not=_int4_why_not, rank=20)
def linear_w4a8(
    x, x_scale, weights: tuple[torch.Tensor, ...], bias=None, residual=None, *,
    out_scale=None, out_dtype=torch.float32,
):  # fmt: skip
    """As linear_w8a8, with the int32 sum of each group times its multiplier."""
    from quamba_kernels.triton.linear import linear

    packed, multiplier, scale = weights
    return linear(x, x_scale, packed, multiplier, scale, bias, residual, out_scale, out_dtype)


@ops.linear_w4a16.backend("triton", why_not=_int4_why_not, rank=20)
def linear_w4a16(
    x, weights: tuple[torch.Tensor, ...], bias=None, residual=None, *, out_scale=None, out_dtype=torch.float32
):  # fmt: skip
    """Products in the type of x, where int4 codes are exact; sums and scales in fp32."""
    from quamba_kernels.triton.linear import linear

    packed, scale = weights
    return linear(x, None, packed, scale, None, bias, residual, out_scale, out_dtype)


@ops.embedding.backend("triton", why_not=_why_not, rank=20)
def embedding(ids, weight, scale, *, out_dtype=torch.float32):
    """One launch; an id outside of the table gives NaN."""
    from quamba_kernels.triton.linear import embedding as rows

    return rows(ids, weight, scale, out_dtype)
