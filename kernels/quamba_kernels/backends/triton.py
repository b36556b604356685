"""Triton: every operator on CUDA devices, where the CUDA kernels do not serve.

With ``TRITON_INTERPRET=1`` in the environment the same kernels run in Triton's interpreter, on tensors of the CPU.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from quamba_kernels import ops
from quamba_kernels.ops.rowwise import to_int8
from quamba_kernels.ops.ssd import NO_LIMIT
from quamba_kernels.registry import Setting

INTERPRET = "TRITON_INTERPRET"
MOST_STATES = 256


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


def _scan_why_not(setting: Setting) -> str | None:
    d_state = setting.shape.get("N", 16)
    if d_state > MOST_STATES:
        return f"keeps a state of at most {MOST_STATES} per channel on chip, got {d_state}"
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


@ops.likeliest.backend("triton", why_not=_why_not, rank=20)
def likeliest(logits):
    """One launch, a program a row."""
    from quamba_kernels.triton import sampling

    return sampling.likeliest(logits)


@ops.quantize.backend("triton", why_not=_why_not, rank=20)
def quantize(x, scale=None):
    """One launch, each row read once."""
    from quamba_kernels.triton import rowwise

    return rowwise.quantize(x, scale)


@ops.rms_norm.backend("triton", why_not=_why_not, rank=20)
def rms_norm(x, weight, eps, *, out_scale=None, per_token=False, out_dtype=torch.float32):
    """One launch, each row read once."""
    from quamba_kernels.triton import rowwise

    return rowwise.rms_norm(x, weight, eps, out_scale, per_token, out_dtype)


@ops.gate_output.backend("triton", why_not=_why_not, rank=20)
def gate_output(
    y, z, weight, eps, *,
    z_scale=None, norm_groups=0, block=0, out_scale=None, per_token=False, out_dtype=torch.float32,
):  # fmt: skip
    """One launch; the rotation as small fp32 products on chip."""
    from quamba_kernels.triton import gate

    return gate.gate_output(y, z, weight, eps, z_scale, norm_groups, block, out_scale, per_token, out_dtype)


@ops.causal_conv1d.backend("triton", why_not=_why_not, rank=20)
def causal_conv1d(
    x, weight, bias=None, state=None, *,
    in_scale=None, x_scale=None, weight_scale=None, out_scale=None, out_dtype=torch.float32, cu_seqlens=None,
):  # fmt: skip
    """One launch, and one more for the states of packed sequences; rounding on entry is a pass of torch's."""
    from quamba_kernels.triton import conv

    if in_scale is not None:
        x, x_scale = to_int8(x, in_scale), in_scale
    return conv.causal_conv1d(x, weight, bias, state, x_scale, weight_scale, out_scale, out_dtype, cu_seqlens)


@ops.ssd_scan.backend("triton", why_not=_scan_why_not, rank=20)
def ssd_scan(
    x, dt, A, B, C, D, dt_bias=None, state=None, *,
    x_scale=None, B_scale=None, C_scale=None, dt_limit=NO_LIMIT, out_dtype=torch.float32, cu_seqlens=None,
):  # fmt: skip
    """Chunks on tensor cores in the type of the output, one or two launches."""
    from quamba_kernels.triton import ssd

    return ssd.ssd_scan(
        x, dt, A, B, C, D, dt_bias, state, x_scale, B_scale, C_scale, dt_limit, out_dtype, cu_seqlens
    )


@ops.ssd_update.backend("triton", why_not=_scan_why_not, rank=20)
def ssd_update(
    state, state_scale, rng, x, dt, A, B, C, D, dt_bias=None, *,
    x_scale=None, B_scale=None, C_scale=None, dt_limit=NO_LIMIT, out_dtype=torch.float32,
):  # fmt: skip
    """The state is read and written once."""
    from quamba_kernels.triton import update

    return update.ssd_update(
        state, state_scale, rng, x, dt, A, B, C, D, dt_bias, x_scale, B_scale, C_scale, dt_limit, out_dtype
    )


@ops.selective_scan.backend("triton", why_not=_scan_why_not, rank=20)
def selective_scan(
    x, dt, A, B, C, D, dt_bias=None, state=None, *,
    x_scale=None, B_scale=None, C_scale=None, out_dtype=torch.float32, cu_seqlens=None,
):  # fmt: skip
    """A thread per channel, token after token, in one or two launches."""
    from quamba_kernels.triton import selective

    return selective.selective_scan(
        x, dt, A, B, C, D, dt_bias, state, x_scale, B_scale, C_scale, out_dtype, cu_seqlens
    )


@ops.selective_update.backend("triton", why_not=_scan_why_not, rank=20)
def selective_update(
    state, state_scale, rng, x, dt, A, B, C, D, dt_bias=None, *,
    x_scale=None, B_scale=None, C_scale=None, out_dtype=torch.float32,
):  # fmt: skip
    """The state is read and written once."""
    from quamba_kernels.triton import update

    return update.selective_update(
        state, state_scale, rng, x, dt, A, B, C, D, dt_bias, x_scale, B_scale, C_scale, out_dtype
    )


@ops.quantize_state.backend("triton", why_not=_why_not, rank=20)
def quantize_state(h, state, scale=None, rng=None):
    """One launch, and one that advances the step."""
    from quamba_kernels.triton import state as rows

    rows.quantize_state(h, state, scale, rng)


@ops.quantize_states.backend("triton", why_not=_why_not, rank=20)
def quantize_states(h, state, scale=None, rng=None):
    """As quantize_state, one launch for all layers."""
    from quamba_kernels.triton import state as rows

    rows.quantize_states(h, state, scale, rng)
