"""One token through a stack of whole Mamba1 blocks: for every layer norm, in_proj, mixer, out_proj and residual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from quamba_kernels.ops.decode import conv_decode, selective_decode
from quamba_kernels.ops.linear import linear_w8a8, norm_linear
from quamba_kernels.ops.rowwise import quantize
from quamba_kernels.ops.stack import BlockMemory
from quamba_kernels.registry import OPS, op


class SelectiveBlock(NamedTuple):
    """Constants of a Mamba1 block, as norm_linear, conv_decode, selective_decode and the linears take them."""

    norm_weight: torch.Tensor | None
    in_scale: torch.Tensor | None
    in_weights: tuple[torch.Tensor, ...]
    in_bias: torch.Tensor | None
    conv_weight: torch.Tensor
    conv_bias: torch.Tensor | None
    x_weights: tuple[torch.Tensor, ...]
    dt_weights: tuple[torch.Tensor, ...]
    dt_bias: torch.Tensor | None
    A: torch.Tensor
    D: torch.Tensor
    conv_in_scale: torch.Tensor | None
    conv_weight_scale: torch.Tensor | None
    conv_out_scale: torch.Tensor | None
    x_scale: torch.Tensor | None
    B_scale: torch.Tensor | None
    C_scale: torch.Tensor | None
    z_scale: torch.Tensor | None
    out_scale: torch.Tensor | None
    out_weights: tuple[torch.Tensor, ...]
    out_bias: torch.Tensor | None


@op
def selective_stack(
    x: torch.Tensor,
    blocks: Sequence[SelectiveBlock],
    memories: Sequence[BlockMemory],
    *,
    linear: str,
    eps: float,
    block: int = 0,
    in_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """[x | z] = in_proj(rms_norm(h)); x = conv_decode(x); [r | B | C] = x_proj(x); dt = dt_proj(r);
    h <- h + out_proj(selective_decode(z, x, dt, B, C)) for each of the blocks; x [B, D] float, the residual stream.

    linear: the op of in_proj, x_proj and out_proj (linear_w8a8, linear_w4a8, linear_w4a16). What in_proj and out_proj
    read is codes by the static in_scale or out_scale [1], codes with a scale per token where there is none, or for
    linear_w4a16 floats of in_dtype, which is the type of activations everywhere. x_proj reads what the scan reads:
    codes by x_scale [1], or floats. dt_proj is linear_w8a8 of r [B, R] with a scale per token.
    """
    coded = linear != "linear_w4a16"
    for b, memory in zip(blocks, memories, strict=True):
        projected = norm_linear(
            x, b.norm_weight, eps, b.in_weights, b.in_bias, linear=linear, in_scale=b.in_scale,
            per_token=coded and b.in_scale is None, in_dtype=in_dtype, out_dtype=in_dtype,
        )  # fmt: skip
        inputs, z = projected.chunk(2, -1)
        inputs = conv_decode(
            inputs, memory.conv_state, b.conv_weight, b.conv_bias, in_scale=b.conv_in_scale,
            weight_scale=b.conv_weight_scale, out_scale=b.conv_out_scale, out_dtype=in_dtype,
        )  # fmt: skip
        given = (inputs,) if b.x_scale is None else (inputs, b.x_scale)
        d_state = b.A.shape[-1]
        rank = b.dt_weights[0].shape[-1]
        common = OPS[linear](*given, b.x_weights, out_dtype=in_dtype)
        low, B, C = common.split([rank, d_state, d_state], -1)
        dt = linear_w8a8(*quantize(low), b.dt_weights, b.dt_bias, out_dtype=in_dtype)
        u = selective_decode(
            z, *memory[1:], inputs, dt, b.A, B, C, b.D, x_scale=b.x_scale, B_scale=b.B_scale, C_scale=b.C_scale,
            z_scale=b.z_scale, block=block, out_scale=b.out_scale, per_token=coded and b.out_scale is None,
            out_dtype=in_dtype,
        )  # fmt: skip
        made = (u.data,) if u.scale is None else (u.data, u.scale)
        x = OPS[linear](*made, b.out_weights, b.out_bias, x, out_dtype=x.dtype)
    return x
