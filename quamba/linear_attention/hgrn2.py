"""HGRN2: keys are what the forget gates leave. Qin et al., 2404.07904."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import silu

from quamba.linear_attention.cache import LayerState
from quamba.linear_attention.configs import HGRN2Config, heads_and_size
from quamba.linear_attention.conv import ShortConvolution
from quamba.linear_attention.hgrn import log_forget
from quamba.linear_attention.mixer import Mixer, heads, masked
from quamba.linear_attention.norm import RMSNorm
from quamba_kernels import ops

NORM_EPS = 1e-5
"""fla leaves the norm's own eps out of the call that fuses norm and projection, which falls back to this."""


class HGRN2Attention(Mixer):
    """q = silu(q_proj(x)), forget gates f from f_proj with a least value per layer, k = 1 - f, v = i_proj(x)."""

    def __init__(self, config: HGRN2Config, layer: int) -> None:
        super().__init__(config, layer)
        size = config.hidden_size
        count, self.k_size = heads_and_size(config)
        self.v_size = size // count
        keys = count * self.k_size
        self.q_proj = nn.Linear(size, keys, bias=False)
        self.f_proj = nn.Linear(size, keys, bias=False)
        self.i_proj = nn.Linear(size, size, bias=False)
        self.use_short_conv = config.use_short_conv
        if self.use_short_conv:
            self.q_conv1d = ShortConvolution(keys, config.conv_size, activation=False)
            self.f_conv1d = ShortConvolution(keys, config.conv_size, activation=False)
            self.i_conv1d = ShortConvolution(size, config.conv_size, activation=False)
        self.g_norm = RMSNorm(size, NORM_EPS, affine=bool(config.elementwise_affine))
        self.o_proj = nn.Linear(size, size, bias=False)

    def mix(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        state: LayerState | None,
        carry: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        q, f, i = masked(self.q_proj(x), mask), masked(self.f_proj(x), mask), masked(self.i_proj(x), mask)
        if self.use_short_conv:
            q, f, i = self.q_conv1d(q, state, "q"), self.f_conv1d(f, state, "f"), self.i_conv1d(i, state, "i")
        g = log_forget(f, carry, self.layer_idx)
        (q, k, v), scales = self.enter(
            q=heads(silu(q), self.k_size), k=heads(-torch.expm1(g), self.k_size), v=heads(masked(i, mask), self.v_size)
        )
        o = self.scan(
            (ops.gla_scan, ops.gla_update), state, q, k, v, heads(g, self.k_size), fixed=(None,),
            scale=self.k_size**-0.5, out_dtype=x.dtype, **scales,
        )  # fmt: skip
        out: torch.Tensor = self.o_proj(self.g_norm(o.flatten(2)))
        return out
