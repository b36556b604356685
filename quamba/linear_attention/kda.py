"""Kimi Delta Attention: the delta rule after a decay per key channel. Kimi team, 2510.26692."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import sigmoid, silu, softplus

from quamba.linear_attention.cache import LayerState
from quamba.linear_attention.configs import KDAConfig
from quamba.linear_attention.conv import ShortConvolution
from quamba.linear_attention.gated_deltanet import L2_EPS
from quamba.linear_attention.mixer import Mixer, heads, masked
from quamba.linear_attention.norm import GatedRMSNorm
from quamba_kernels import ops


class KimiDeltaAttention(Mixer):
    """g = -exp(A_log) softplus(f_proj(x) + dt_bias), or lower_bound sigmoid(exp(A_log) (f_proj(x) + dt_bias))."""

    def __init__(self, config: KDAConfig, layer: int) -> None:
        super().__init__(config, layer)
        size, self.k_size, self.v_size = config.hidden_size, config.head_dim, int(config.head_dim * config.expand_v)
        v_heads = config.num_v_heads or config.num_heads
        keys, values = config.num_heads * self.k_size, v_heads * self.v_size
        self.beta_range, self.lower_bound = 2.0 if config.allow_neg_eigval else 1.0, config.lower_bound
        self.q_proj = nn.Linear(size, keys, bias=False)
        self.k_proj = nn.Linear(size, keys, bias=False)
        self.v_proj = nn.Linear(size, values, bias=False)
        self.use_short_conv = config.use_short_conv
        if self.use_short_conv:
            self.q_conv1d = ShortConvolution(keys, config.conv_size)
            self.k_conv1d = ShortConvolution(keys, config.conv_size)
            self.v_conv1d = ShortConvolution(values, config.conv_size)
        rank, gates = self.v_size, v_heads * self.k_size
        self.f_proj = nn.Sequential(nn.Linear(size, rank, bias=False), nn.Linear(rank, gates, bias=False))
        self.b_proj = nn.Linear(size, v_heads, bias=False)
        self.A_log = nn.Parameter(torch.zeros(v_heads))
        self.dt_bias = nn.Parameter(torch.zeros(gates))
        self.g_proj = nn.Sequential(nn.Linear(size, rank, bias=False), nn.Linear(rank, values))
        self.o_norm = GatedRMSNorm(self.v_size, config.norm_eps, activation="sigmoid")
        self.o_proj = nn.Linear(values, size, bias=False)

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
        rate = torch.exp(self.A_log.float()).unsqueeze(-1)
        f = heads(self.f_proj(x).float() + self.dt_bias.float(), self.k_size)
        g = -rate * softplus(f) if self.lower_bound is None else self.lower_bound * sigmoid(rate * f)
        (q, k, v), scales = self.enter(
            q=heads(q, self.k_size), k=heads(k, self.k_size), v=heads(masked(v, mask), self.v_size)
        )
        o = self.scan(
            (ops.delta_scan, ops.delta_update), state, q, k.unsqueeze(2), v.unsqueeze(2), beta.unsqueeze(2), g,
            scale=self.k_size**-0.5, norm_eps=L2_EPS, out_dtype=x.dtype, **scales,
        )  # fmt: skip
        out: torch.Tensor = self.o_proj(self.o_norm(o, heads(self.g_proj(x), self.v_size)).flatten(2))
        return out
