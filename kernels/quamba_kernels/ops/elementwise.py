"""A vector state that decays by channel: HGRN. Qin et al., 2311.04823."""

from __future__ import annotations

import torch

from quamba_kernels.ops.rowwise import dequantize
from quamba_kernels.ops.state import load_state, quantize_state
from quamba_kernels.registry import op


@op
def elementwise_scan(
    x: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor | None = None,
    *,
    x_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h[t] = exp(g) h[t-1] + x, channel by channel;  y = h.

    x [B, T, I] int8 with x_scale [I] or [1], or float; g [B, T, I] float, at most 0; state [B, I] fp32 before the first
    token, None for zeros. Returns y [B, T, I] and the last state [B, I] fp32.
    """
    x, decay = dequantize(x, x_scale), torch.exp(g.float())
    h = torch.zeros_like(x[:, 0]) if state is None else state.float()
    y = torch.empty_like(x)
    for t in range(x.shape[1]):
        h = decay[:, t] * h + x[:, t]
        y[:, t] = h
    return y.to(out_dtype), h


@op
def elementwise_update(
    state: torch.Tensor,
    state_scale: torch.Tensor | None,
    rng: torch.Tensor | None,
    x: torch.Tensor,
    g: torch.Tensor,
    *,
    x_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """One token of elementwise_scan; the state is updated in place and stored as quantize_state says.

    state [B, I] fp32, fp16 or int8 with state_scale [B]; x and g [B, I]. Returns y [B, I], the state before it is
    rounded.
    """
    h = torch.exp(g.float()) * load_state(state, state_scale) + dequantize(x, x_scale)
    quantize_state(h, state, state_scale, rng)
    return h.to(out_dtype)
