"""Gated DeltaNet: the delta rule after a scalar decay per head. Yang et al., 2412.06464."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import sigmoid, silu, softplus

from quamba.linear_attention.cache import LayerState
from quamba.linear_attention.configs import GatedDeltaNetConfig
from quamba.linear_attention.conv import ShortConvolution
from quamba.linear_attention.delta_net import Leave
from quamba.linear_attention.mixer import Mixer, heads, masked
from quamba_kernels import ops

L2_EPS = 1e-6


class GatedDeltaNet(Mixer, Leave):
    """q, k, v = silu(conv(proj(x))); beta = sigmoid(b_proj(x)); g = -exp(A_log) softplus(a_proj(x) + dt_bias)."""

    def __init__(self, config: GatedDeltaNetConfig, layer: int) -> None:
        super().__init__(config, layer)
        size, self.k_size, self.v_size = config.hidden_size, config.head_dim, int(config.head_dim * config.expand_v)
        v_heads = config.num_v_heads or config.num_heads
        keys, values = config.num_heads * self.k_size, v_heads * self.v_size
        self.beta_range = 2.0 if config.allow_neg_eigval else 1.0
        self.q_proj = nn.Linear(size, keys, bias=False)
        self.k_proj = nn.Linear(size, keys, bias=False)
        self.v_proj = nn.Linear(size, values, bias=False)
        self.a_proj = nn.Linear(size, v_heads, bias=False)
        self.b_proj = nn.Linear(size, v_heads, bias=False)
        self.A_log = nn.Parameter(torch.zeros(v_heads))
        self.dt_bias = nn.Parameter(torch.zeros(v_heads))
        self.use_short_conv = config.use_short_conv
        if self.use_short_conv:
            self.q_conv1d = ShortConvolution(keys, config.conv_size)
            self.k_conv1d = ShortConvolution(keys, config.conv_size)
            self.v_conv1d = ShortConvolution(values, config.conv_size)
        self.add_leave(config, values, gated=config.use_gate, activation=config.output_gate_activation)

    def mix(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        state: LayerState | None,
        carry: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        q, k, v = self.project(x, mask, state)
        if not self.use_short_conv:
            q, k, v = silu(q), silu(k), silu(v)
        beta = sigmoid(self.b_proj(x).float()) * self.beta_range
        g = -torch.exp(self.A_log.float()) * softplus(self.a_proj(x).float() + self.dt_bias.float())
        (q, k, v), scales = self.enter(
            q=heads(q, self.k_size), k=heads(k, self.k_size), v=heads(masked(v, mask), self.v_size)
        )
        o = self.scan(
            (ops.delta_scan, ops.delta_update), state, q, k.unsqueeze(2), v.unsqueeze(2), beta.unsqueeze(2),
            g.unsqueeze(-1), scale=self.k_size**-0.5, norm_eps=L2_EPS, out_dtype=x.dtype, **scales,
        )  # fmt: skip
        return self.leave(o, x)
