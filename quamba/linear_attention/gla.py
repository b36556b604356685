"""Gated linear attention: a decay per key channel. Yang et al., 2312.06635."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import logsigmoid, silu

from quamba.linear_attention.cache import LayerState
from quamba.linear_attention.configs import GLAConfig, RetNetConfig
from quamba.linear_attention.conv import ShortConvolution
from quamba.linear_attention.mixer import Mixer, activation, heads, masked
from quamba.linear_attention.norm import GatedRMSNorm, RMSNorm
from quamba_kernels import ops

GATE_NORMALIZER = 16


class Leave(nn.Module):
    """What GLA and RetNet share after the scan; fla names the norm by whether it is fused with the gate."""

    g_proj: nn.Linear
    o_proj: nn.Linear
    v_size: int

    def add_leave(self, config: GLAConfig | RetNetConfig, values: int) -> None:
        """Add the output gate, the norm over each head and the projection."""
        self.gated, affine = config.use_output_gate, bool(config.elementwise_affine)
        if self.gated:
            self.g_proj = nn.Linear(config.hidden_size, values, bias=False)
        if self.gated and config.fuse_norm:
            self.g_norm_swish_gate = GatedRMSNorm(self.v_size, config.norm_eps, affine=affine)
        else:
            self.g_norm = RMSNorm(self.v_size, config.norm_eps, affine=affine)
        self.fused = self.gated and config.fuse_norm
        self.o_proj = nn.Linear(values, config.hidden_size, bias=False)

    def leave(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """o [B, T, H, P] of the scan -> [B, T, D]."""
        if self.fused:
            o = self.g_norm_swish_gate(o, heads(self.g_proj(x), self.v_size)).flatten(2)
        else:
            o = self.g_norm(o).flatten(2)
            o = o * silu(self.g_proj(x)) if self.gated else o
        out: torch.Tensor = self.o_proj(o)
        return out


class GatedLinearAttention(Mixer, Leave):
    """g = logsigmoid(gk_proj(x)) / 16 per key channel; keys, values and gates may have fewer heads than queries."""

    def __init__(self, config: GLAConfig, layer: int) -> None:
        super().__init__(config, layer)
        size, self.groups = config.hidden_size, config.num_heads // (config.num_kv_heads or config.num_heads)
        keys, values = config.whole("expand_k"), config.whole("expand_v")
        self.k_size, self.v_size = keys // config.num_heads, values // config.num_heads
        self.clamp_min, self.feature_map = config.clamp_min, activation(config)
        shared_keys, shared_values = keys // self.groups, values // self.groups
        self.q_proj = nn.Linear(size, keys, bias=False)
        self.k_proj = nn.Linear(size, shared_keys, bias=False)
        self.v_proj = nn.Linear(size, shared_values, bias=False)
        self.gk_proj = nn.Sequential(
            nn.Linear(size, config.gate_rank, bias=False), nn.Linear(config.gate_rank, shared_keys)
        )
        self.use_short_conv = config.use_short_conv
        if self.use_short_conv:
            self.q_conv1d = ShortConvolution(keys, config.conv_size)
            self.k_conv1d = ShortConvolution(shared_keys, config.conv_size)
            self.v_conv1d = ShortConvolution(shared_values, config.conv_size)
        self.add_leave(config, values)

    def mix(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        state: LayerState | None,
        carry: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        q, k, v = self.project(x, mask, state)
        g = logsigmoid(self.gk_proj(x).float()) / GATE_NORMALIZER
        if self.clamp_min is not None:
            g = g.clamp_min(self.clamp_min)
        q, k, g = heads(q, self.k_size), heads(k, self.k_size), heads(g, self.k_size)
        v = heads(masked(v, mask), self.v_size)
        k, g, v = (t.repeat_interleave(self.groups, 2) if self.groups > 1 else t for t in (k, g, v))
        (q, k, v), scales = self.enter(q=self.feature_map(q), k=self.feature_map(k), v=v)
        o = self.scan(
            (ops.gla_scan, ops.gla_update), state, q, k, v, g, fixed=(None,), scale=self.k_size**-0.5,
            out_dtype=x.dtype, **scales,
        )  # fmt: skip
        return self.leave(o, x)
