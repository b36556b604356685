"""One token through a stack of whole blocks: for every layer norm, in_proj, mixer, out_proj and residual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from quamba_kernels.ops.decode import ssd_decode
from quamba_kernels.ops.linear import norm_linear
from quamba_kernels.ops.ssd import NO_LIMIT
from quamba_kernels.registry import OPS, op


class SsdBlock(NamedTuple):
    """Constants of a Mamba2 block, as norm_linear, ssd_decode and the linears take them."""

    norm_weight: torch.Tensor | None
    in_scale: torch.Tensor | None
    in_weights: tuple[torch.Tensor, ...]
    in_bias: torch.Tensor | None
    conv_weight: torch.Tensor
    conv_bias: torch.Tensor | None
    A: torch.Tensor
    D: torch.Tensor
    dt_bias: torch.Tensor | None
    gate_weight: torch.Tensor | None
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


class BlockMemory(NamedTuple):
    """What a recurrent block keeps from token to token, as the ops of a decode step take it; updated in place."""

    conv_state: torch.Tensor
    state: torch.Tensor
    state_scale: torch.Tensor | None
    rng: torch.Tensor | None


@op
def ssd_stack(
    x: torch.Tensor,
    blocks: Sequence[SsdBlock],
    memories: Sequence[BlockMemory],
    *,
    linear: str,
    eps: float,
    gate_eps: float,
    dt_limit: tuple[float, float] = NO_LIMIT,
    norm_groups: int = 0,
    block: int = 0,
    in_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """x <- x + out_proj(ssd_decode(in_proj(rms_norm(x)))) for each of the blocks; x [B, D] float, the residual stream.

    linear: the op of both projections (linear_w8a8, linear_w4a8, linear_w4a16). Its input is codes by the static
    in_scale or out_scale [1], codes with a scale per token where there is none, or for linear_w4a16 floats of in_dtype,
    which is the type of activations everywhere.
    """
    coded = linear != "linear_w4a16"
    for b, memory in zip(blocks, memories, strict=True):
        projected = norm_linear(
            x, b.norm_weight, eps, b.in_weights, b.in_bias, linear=linear, in_scale=b.in_scale,
            per_token=coded and b.in_scale is None, in_dtype=in_dtype, out_dtype=in_dtype,
        )  # fmt: skip
        u = ssd_decode(
            projected, *memory, b.conv_weight, b.conv_bias, b.A, b.D, b.dt_bias, b.gate_weight, gate_eps,
            conv_in_scale=b.conv_in_scale, conv_weight_scale=b.conv_weight_scale, conv_out_scale=b.conv_out_scale,
            x_scale=b.x_scale, B_scale=b.B_scale, C_scale=b.C_scale, z_scale=b.z_scale, dt_limit=dt_limit,
            norm_groups=norm_groups, block=block, out_scale=b.out_scale, per_token=coded and b.out_scale is None,
            out_dtype=in_dtype,
        )  # fmt: skip
        made = (u.data,) if u.scale is None else (u.data, u.scale)
        x = OPS[linear](*made, b.out_weights, b.out_bias, x, out_dtype=x.dtype)
    return x
