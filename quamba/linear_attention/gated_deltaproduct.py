"""Gated DeltaProduct: several delta-rule steps per token. Siems et al., 2502.10297."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import sigmoid, silu, softplus

from quamba.linear_attention.cache import LayerState
from quamba.linear_attention.configs import GatedDeltaProductConfig
from quamba.linear_attention.conv import ShortConvolution
from quamba.linear_attention.delta_net import Leave
from quamba.linear_attention.gated_deltanet import L2_EPS
from quamba.linear_attention.mixer import Mixer, heads, masked
from quamba_kernels import ops


class GatedDeltaProduct(Mixer, Leave):
    """num_householder keys, values and betas for every query; without the forget gate nothing decays."""

    def __init__(self, config: GatedDeltaProductConfig, layer: int) -> None:
        super().__init__(config, layer)
        size, self.k_size, self.v_size = config.hidden_size, config.head_dim, int(config.head_dim * config.expand_v)
        count, self.steps = config.num_heads, config.num_householder
        keys, values = count * self.k_size, count * self.v_size
        self.beta_range = 2.0 if config.allow_neg_eigval else 1.0
        self.q_proj = nn.Linear(size, keys, bias=False)
        self.k_proj = nn.Linear(size, keys * self.steps, bias=False)
        self.v_proj = nn.Linear(size, values * self.steps, bias=False)
        self.b_proj = nn.Linear(size, count * self.steps, bias=False)
        self.use_forget_gate, self.use_short_conv = config.use_forget_gate, config.use_short_conv
        if self.use_forget_gate:
            self.a_proj = nn.Linear(size, count, bias=False)
            self.A_log = nn.Parameter(torch.zeros(count))
            self.dt_bias = nn.Parameter(torch.zeros(count))
        if self.use_short_conv:
            self.q_conv1d = ShortConvolution(keys, config.conv_size)
            self.k_conv1d = ShortConvolution(keys * self.steps, config.conv_size)
            self.v_conv1d = ShortConvolution(values * self.steps, config.conv_size)
        self.add_leave(config, values, gated=config.use_output_gate)

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
        k, v = (t.unflatten(-1, (self.steps, -1, n)) for t, n in ((k, self.k_size), (masked(v, mask), self.v_size)))
        beta = sigmoid(self.b_proj(x).float()).unflatten(-1, (self.steps, -1)) * self.beta_range
        g = None
        if self.use_forget_gate:
            g = -torch.exp(self.A_log.float()) * softplus(self.a_proj(x).float() + self.dt_bias.float())
            g = g.unsqueeze(-1)
        (q, k, v), scales = self.enter(q=heads(q, self.k_size), k=k, v=v)
        o = self.scan(
            (ops.delta_scan, ops.delta_update), state, q, k, v, beta, g, scale=self.k_size**-0.5, norm_eps=L2_EPS,
            out_dtype=x.dtype, **scales,
        )  # fmt: skip
        return self.leave(o, x)
