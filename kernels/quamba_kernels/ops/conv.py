"""Causal depthwise convolution with SiLU, over int8 or float inputs, with a rolling state."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.nn.functional import silu

from quamba_kernels.ops.rowwise import to_int8
from quamba_kernels.ops.sequences import sequences
from quamba_kernels.registry import op


@op
def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    *,
    in_scale: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """y[t] = silu(sum_w weight[w] x[t - W + 1 + w] + bias), per channel; prefill for any T, decode for T = 1.

    x [B, T, C] int8 with x_scale [1] or [C], or float; weight [C, W] int8 with weight_scale [C], or float; bias [C].
    in_scale fp32 [1] or [C] rounds a float x to int8 first, as the op quantize would. state [B, W - 1, C] of the type
    of x, once rounded, holds the inputs before x[0] and is left holding the last W - 1 inputs; None stands for zeros.
    out_scale fp32 [C] gives int8, else out_dtype. cu_seqlens: ops/sequences.py. Returns [B, T, C].
    """
    if in_scale is not None:
        x, x_scale = to_int8(x, in_scale), in_scale
    if cu_seqlens is not None:
        options: dict[str, Any] = {
            "x_scale": x_scale, "weight_scale": weight_scale, "out_scale": out_scale, "out_dtype": out_dtype,
        }  # fmt: skip
        parts = sequences(cu_seqlens, state, x)
        return torch.cat([causal_conv1d(own, weight, bias, before, **options) for before, (own,) in parts], 1)
    width, tokens = weight.shape[-1], x.shape[1]
    past = x.new_zeros(x.shape[0], width - 1, x.shape[2]) if state is None else state
    full = torch.cat([past, x], 1)
    if state is not None:
        state.copy_(full[:, tokens:])
    full = full.float()
    taps = weight.float()
    if tokens == 1:
        y = (full * taps.T).sum(1, keepdim=True)
    else:
        y = cast(torch.Tensor, sum(full[:, w : w + tokens] * taps[:, w] for w in range(width)))
    for scale in (x_scale, weight_scale):
        if scale is not None:
            y = y * scale
    if bias is not None:
        y = y + bias.float()
    y = silu(y)
    return y.to(out_dtype) if out_scale is None else to_int8(y, out_scale)
