"""LightNet: keys normalised by all keys so far, which is also their decay. Qin et al., 2405.21022."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import silu

from quamba.linear_attention.cache import LayerState
from quamba.linear_attention.configs import LightNetConfig
from quamba.linear_attention.conv import ShortConvolution
from quamba.linear_attention.mixer import Mixer, heads, masked
from quamba.linear_attention.norm import GatedRMSNorm
from quamba_kernels import ops

NORM_EPS = 1e-6
"""fla leaves the norm's own eps out of the call that fuses norm, gate and projection, which falls back to this."""
NO_KEY = -1e30


class LightNetAttention(Mixer):
    """z[t] = log sum_{s <= t} exp(k[s]) per key channel; the scan has keys exp(k - z) and decays exp(z[t-1] - z[t])."""

    def __init__(self, config: LightNetConfig, layer: int) -> None:
        super().__init__(config, layer)
        size, rank = config.hidden_size, config.gate_low_rank_dim
        count, self.k_size = config.heads_and_size
        self.v_size = size // count
        keys = count * self.k_size
        self.q_proj = nn.Linear(size, keys, bias=False)
        self.k_proj = nn.Linear(size, keys, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.use_short_conv = config.use_short_conv
        if self.use_short_conv:
            self.q_conv1d = ShortConvolution(keys, config.conv_size, activation=False)
            self.k_conv1d = ShortConvolution(keys, config.conv_size, activation=False)
            self.v_conv1d = ShortConvolution(size, config.conv_size, activation=False)
        self.g_proj = nn.Sequential(nn.Linear(size, rank, bias=False), nn.Linear(rank, size, bias=False))
        self.g_norm = GatedRMSNorm(size, NORM_EPS, affine=bool(config.elementwise_affine))
        self.o_proj = nn.Linear(size, size, bias=False)

    def mix(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        state: LayerState | None,
        carry: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        q, k, v = self.project(x, mask, state)
        k, g = self._normalise(k.float() if mask is None else k.float().masked_fill(mask == 0, NO_KEY), state)
        (q, v), scales = self.enter(q=heads(silu(q), self.k_size), v=heads(masked(v, mask), self.v_size))
        o = self.scan(
            (ops.gla_scan, ops.gla_update), state, q, heads(k, self.k_size), v, heads(g, self.k_size), fixed=(None,),
            scale=self.k_size**-0.5, out_dtype=x.dtype, **scales,
        )  # fmt: skip
        out: torch.Tensor = self.o_proj(self.g_norm(o.flatten(2), self.g_proj(x)))
        return out

    def _normalise(self, k: torch.Tensor, state: LayerState | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and log decays from the logits k [B, T, C] fp32, and the log of the sum so far into the state."""
        before = None if state is None else state.get("z")
        if before is None:
            before = torch.full_like(k[:, :1], NO_KEY)
        z = torch.logcumsumexp(torch.cat([before, k], 1), 1)
        if state is not None:
            state.put("z", z[:, -1:], empty=NO_KEY)
        return torch.exp(k - z[:, 1:]), z[:, :-1] - z[:, 1:]
