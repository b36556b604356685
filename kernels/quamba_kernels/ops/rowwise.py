"""Token-wise ops: quantise, RMS norm, and what stands between a scan and its output projection."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import silu

from quamba_kernels.hadamard import rotate
from quamba_kernels.registry import op

QMAX = 127


class Activation(NamedTuple):
    """A tensor on its way into a linear: int8 codes with their scale, or floats with ``scale`` None.

    data [..., C]; scale fp32, [1] (static, per tensor), [C] (static, per channel) or [..., 1] (dynamic, per token).
    """

    data: torch.Tensor
    scale: torch.Tensor | None = None


def dequantize(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """scale * x in fp32; x unchanged in fp32 when it carries no scale."""
    return x.float() if scale is None else x.float() * scale


def to_int8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """clamp(rint(x / scale), -127, 127) as int8."""
    return torch.round(x.float() / scale).clamp_(-QMAX, QMAX).to(torch.int8)


def codes(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Floats as int8 codes where they have a scale; else x, which is floats or codes already."""
    return x if scale is None or x.dtype == torch.int8 else to_int8(x, scale)


def peak_scale(peak: torch.Tensor) -> torch.Tensor:
    """peak / 127 in fp32, and 1 where it is 0."""
    peak = peak.float()
    # by a tensor: CUDA multiplies by the reciprocal of a Python number, which rounds otherwise than a division
    return torch.where(peak > 0, peak / peak.new_full((), QMAX), torch.ones_like(peak))


def token_scale(x: torch.Tensor) -> torch.Tensor:
    """max |x| / 127 over the last axis, [..., 1] fp32; 1 for a row of zeros."""
    return peak_scale(x.abs().amax(-1, keepdim=True))


def emit(y: torch.Tensor, out_scale: torch.Tensor | None, per_token: bool, out_dtype: torch.dtype) -> Activation:
    """The common epilogue: static int8, dynamic int8, or floats of ``out_dtype``."""
    if per_token:
        out_scale = token_scale(y)
    if out_scale is None:
        return Activation(y.to(out_dtype))
    return Activation(to_int8(y, out_scale), out_scale)


@op
def quantize(x: torch.Tensor, scale: torch.Tensor | None = None) -> Activation:
    """codes = clamp(rint(x / scale), -127, 127).

    x [..., C] float. scale fp32 [1] or [C]; None takes one scale per token, max |x| / 127.
    """
    return emit(x, scale, scale is None, x.dtype)


@op
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    out_scale: torch.Tensor | None = None,
    per_token: bool = False,
    out_dtype: torch.dtype = torch.float32,
) -> Activation:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis, quantised on the way out if asked for.

    x [..., D] float; weight [D] or None (folded into the next linear); out_scale fp32 [1].
    """
    x = x.float()
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.float()
    return emit(y, out_scale, per_token, out_dtype)


@op
def rotate_input(
    x: torch.Tensor,
    block: int,
    *,
    out_scale: torch.Tensor | None = None,
    per_token: bool = False,
    out_dtype: torch.dtype = torch.float32,
) -> Activation:
    """y = x H in blocks of ``block`` channels, quantised on the way out if asked for (Quamba, section 4.2).

    x [..., C] float; block 0 leaves x as it is; out_scale fp32 [1].
    """
    return emit(rotate(x.float(), block) if block else x.float(), out_scale, per_token, out_dtype)


@op
def gate_output(
    y: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    z_scale: torch.Tensor | None = None,
    norm_groups: int = 0,
    block: int = 0,
    out_scale: torch.Tensor | None = None,
    per_token: bool = False,
    out_dtype: torch.dtype = torch.float32,
) -> Activation:
    """u = y * silu(z); u = rms_norm(u) * weight within each of ``norm_groups`` groups; u = u H; quantise.

    y [..., I] float; z [..., I] float, or int8 with z_scale [1] or [I]; a float z beside a z_scale is rounded to int8
    first, as the op quantize would. weight [I] or None; norm_groups 0 leaves the norm out (Mamba1); block is the size
    of the Hadamard blocks, 0 leaves the rotation out (Quamba, section 4.2).
    """
    u = y.float() * silu(dequantize(codes(z, z_scale), z_scale))
    if norm_groups:
        grouped = u.unflatten(-1, (norm_groups, -1))
        u = (grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    if weight is not None:
        u = u * weight.float()
    if block:
        u = rotate(u, block)
    return emit(u, out_scale, per_token, out_dtype)
