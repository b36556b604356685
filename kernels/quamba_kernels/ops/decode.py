"""One token of a whole mixer, from the projection that opens it to the quantised input of the one that closes it.

Each op is the chain of the ops it names, so that a backend may run it in a launch or two.
"""

from __future__ import annotations

import torch

from quamba_kernels.ops.conv import causal_conv1d
from quamba_kernels.ops.rowwise import Activation, codes, gate_output
from quamba_kernels.ops.selective import selective_update
from quamba_kernels.ops.ssd import NO_LIMIT, ssd_update
from quamba_kernels.registry import op


@op
def conv_decode(
    x: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    in_scale: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """quantize, then one token of causal_conv1d: x [B, C] float -> [B, C], int8 by out_scale [C] or out_dtype.

    state [B, W - 1, C] int8 with in_scale [1] or [C], or of x's dtype; it is updated in place. weight, bias and
    weight_scale as in causal_conv1d.
    """
    y = causal_conv1d(
        codes(x, in_scale).unsqueeze(1), weight, bias, state, x_scale=in_scale, weight_scale=weight_scale,
        out_scale=out_scale, out_dtype=out_dtype,
    )  # fmt: skip
    return y[:, 0]


@op
def ssd_decode(
    projected: torch.Tensor,
    conv_state: torch.Tensor,
    state: torch.Tensor,
    state_scale: torch.Tensor | None,
    rng: torch.Tensor | None,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    A: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    *,
    conv_in_scale: torch.Tensor | None = None,
    conv_weight_scale: torch.Tensor | None = None,
    conv_out_scale: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    B_scale: torch.Tensor | None = None,
    C_scale: torch.Tensor | None = None,
    z_scale: torch.Tensor | None = None,
    dt_limit: tuple[float, float] = NO_LIMIT,
    norm_groups: int = 0,
    block: int = 0,
    out_scale: torch.Tensor | None = None,
    per_token: bool = False,
    out_dtype: torch.dtype = torch.float32,
) -> Activation:
    """conv_decode of [x | B | C], ssd_update, gate_output with z: projected [B, F] float = [z | x | B | C | dt].

    F = 2 I + 2 G N + H. conv_state [B, W - 1, I + 2 G N] and state [B, H, P, N] are updated in place; what is int8 in
    the state, the convolution and the gate is as in these ops. conv_out_scale [I + 2 G N] comes with x_scale [H, P],
    B_scale and C_scale [G]; without them the scan takes floats of projected's type. Returns [B, I].
    """
    batch, heads, headdim, d_state = state.shape
    inner, channels = heads * headdim, conv_weight.shape[0]
    z, mixed, dt = projected.split([inner, channels, heads], -1)
    mixed = conv_decode(
        mixed, conv_state, conv_weight, conv_bias, in_scale=conv_in_scale, weight_scale=conv_weight_scale,
        out_scale=conv_out_scale, out_dtype=projected.dtype,
    )  # fmt: skip
    B, C = mixed[:, inner:].unflatten(-1, (2, -1, d_state)).unbind(1)
    y = ssd_update(
        state, state_scale, rng, mixed[:, :inner].unflatten(-1, (heads, headdim)), dt, A, B, C, D, dt_bias,
        x_scale=x_scale, B_scale=B_scale, C_scale=C_scale, dt_limit=dt_limit,
    )  # fmt: skip
    return gate_output(
        y.flatten(1), codes(z, z_scale), norm_weight, eps, z_scale=z_scale, norm_groups=norm_groups, block=block,
        out_scale=out_scale, per_token=per_token, out_dtype=out_dtype,
    )  # fmt: skip


@op
def selective_decode(
    z: torch.Tensor,
    state: torch.Tensor,
    state_scale: torch.Tensor | None,
    rng: torch.Tensor | None,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor | None = None,
    *,
    x_scale: torch.Tensor | None = None,
    B_scale: torch.Tensor | None = None,
    C_scale: torch.Tensor | None = None,
    z_scale: torch.Tensor | None = None,
    block: int = 0,
    out_scale: torch.Tensor | None = None,
    per_token: bool = False,
    out_dtype: torch.dtype = torch.float32,
) -> Activation:
    """selective_update of float B and C [B, N], quantised where they have a scale [1]; gate_output without a norm.

    z [B, I] float, quantised by z_scale [1] or [I]; the rest as in these ops. Returns [B, I].
    """
    y = selective_update(
        state, state_scale, rng, x, dt, A, codes(B, B_scale), codes(C, C_scale), D, dt_bias,
        x_scale=x_scale, B_scale=B_scale, C_scale=C_scale,
    )  # fmt: skip
    return gate_output(
        y, codes(z, z_scale), None, 0.0, z_scale=z_scale, block=block, out_scale=out_scale, per_token=per_token,
        out_dtype=out_dtype,
    )  # fmt: skip
