"""HGRN: elementwise, with forget gates whose least value grows with depth. Qin et al., 2311.04823."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import logsigmoid, silu

from quamba.linear_attention.cache import LayerState
from quamba.linear_attention.configs import HGRNConfig
from quamba.linear_attention.conv import ShortConvolution
from quamba.linear_attention.mixer import Mixer, masked
from quamba.linear_attention.norm import GatedRMSNorm
from quamba_kernels import ops


def log_forget(f: torch.Tensor, carry: dict[str, torch.Tensor], layer: int) -> torch.Tensor:
    """log(lb + (1 - lb) sigmoid(f)) in fp32; lb is the layer's row of carry["lower_bounds"], 0 in the first layer."""
    g = logsigmoid(f.float())
    if layer == 0 or "lower_bounds" not in carry:
        return g
    least = carry["lower_bounds"][layer]
    return torch.logaddexp(least.log(), torch.log1p(-least) + g)


class HGRNAttention(Mixer):
    """h = f h + (1 - f) silu(i_proj(x)), then a norm gated by g_proj(x)."""

    def __init__(self, config: HGRNConfig, layer: int) -> None:
        super().__init__(config, layer)
        size, inner = config.hidden_size, int(config.hidden_size * config.expand_ratio)
        self.i_proj = nn.Linear(size, inner, bias=False)
        self.f_proj = nn.Linear(size, inner, bias=False)
        self.g_proj = nn.Linear(size, inner, bias=False)
        self.use_short_conv = config.use_short_conv
        if self.use_short_conv:
            self.f_conv1d = ShortConvolution(inner, config.conv_size, activation=False)
            self.i_conv1d = ShortConvolution(inner, config.conv_size, activation=False)
        self.g_norm = GatedRMSNorm(inner, config.norm_eps, affine=bool(config.elementwise_affine))
        self.o_proj = nn.Linear(inner, size, bias=False)

    def mix(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        state: LayerState | None,
        carry: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        i, f = masked(self.i_proj(x), mask), masked(self.f_proj(x), mask)
        if self.use_short_conv:
            i, f = self.i_conv1d(i, state, "i"), self.f_conv1d(f, state, "f")
        g = log_forget(f, carry, self.layer_idx)
        i = masked(silu(i) * -torch.expm1(g), mask)
        (i,), scales = self.enter(v=i.unsqueeze(-1))
        y = self.scan(
            (ops.elementwise_scan, ops.elementwise_update), state, i.squeeze(-1), g, out_dtype=x.dtype,
            x_scale=scales["v_scale"].flatten() if scales else None,
        )  # fmt: skip
        out: torch.Tensor = self.o_proj(self.g_norm(y, self.g_proj(x)))
        return out
