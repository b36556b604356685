"""RWKV6: a decay per key channel, a bonus for the current token, mixtures that depend on the data. 2404.05892."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import relu, sigmoid, silu

from quamba.linear_attention.cache import LayerState
from quamba.linear_attention.configs import RWKV6Config
from quamba.linear_attention.mixer import Mixer, heads, masked
from quamba.linear_attention.token_shift import FeedForward, LoRA, RWKVBlock, step_back
from quamba_kernels import ops

MIXTURES = 5
"""r, w, k, v, g, in this order."""


class LerpLinear(nn.Module):
    """y = linear(x + delta * mu), with mu a parameter, or handed in where the mixture depends on the data."""

    def __init__(self, size: int, outputs: int, *, rank: int | None = None, own: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(size, outputs, bias=False) if rank is None else LoRA(size, outputs, rank)
        if own:
            self.mu = nn.Parameter(torch.zeros(size))

    def forward(self, x: torch.Tensor, delta: torch.Tensor, mu: torch.Tensor | None = None) -> torch.Tensor:
        """x, delta [B, T, D], mu [B, T, D] -> [B, T, outputs]."""
        y: torch.Tensor = self.linear(x + delta * (self.mu if mu is None else mu))
        return y


class RWKV6Attention(Mixer):
    """The mixtures are tanh(x_proj.0(x)) in five parts, each through its own stretch of x_proj.2, plus x_bias."""

    def __init__(self, config: RWKV6Config, layer: int) -> None:
        super().__init__(config, layer)
        size, self.rank = config.hidden_size, config.proj_low_rank_dim
        keys, values = config.whole("expand_k"), config.whole("expand_v")
        self.k_size, self.v_size = keys // config.num_heads, values // config.num_heads
        self.x_proj = nn.Sequential(
            LerpLinear(size, self.rank * MIXTURES), nn.Tanh(), nn.Linear(self.rank * MIXTURES, size, bias=False)
        )
        self.x_bias = nn.Parameter(torch.zeros(MIXTURES, size))
        self.r_proj = LerpLinear(size, keys, own=False)
        self.w_proj = LerpLinear(size, keys, own=False, rank=config.gate_low_rank_dim)
        self.k_proj = LerpLinear(size, keys, own=False)
        self.v_proj = LerpLinear(size, values, own=False)
        self.g_proj = LerpLinear(size, values, own=False)
        self.bonus = nn.Parameter(torch.zeros(config.num_heads, self.k_size))
        self.g_norm = nn.GroupNorm(config.num_heads, values, eps=config.norm_eps)
        self.o_proj = nn.Linear(values, size, bias=False)

    def mix(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        state: LayerState | None,
        carry: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        x = masked(x, mask)
        delta = step_back(x, state, "shift")
        r, w, k, v, g = (
            proj(x, delta, mu)
            for proj, mu in zip(
                (self.r_proj, self.w_proj, self.k_proj, self.v_proj, self.g_proj), self._mixtures(x, delta), strict=True
            )
        )
        (r, k, v), scales = self.enter(
            q=heads(r, self.k_size), k=heads(k, self.k_size), v=heads(masked(v, mask), self.v_size)
        )
        o = self.scan(
            (ops.gla_scan, ops.gla_update), state, r, k, v, -torch.exp(heads(w.float(), self.k_size)),
            fixed=(self.bonus,), out_dtype=x.dtype, **scales,
        )  # fmt: skip
        o = self.g_norm(o.flatten(2).flatten(0, 1)).view(*x.shape[:2], -1)
        out: torch.Tensor = self.o_proj(o * silu(g))
        return out

    def _mixtures(self, x: torch.Tensor, delta: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Five [B, T, D]. Part n of the low-rank vector stands alone in row n, so x_proj.2 is called as a whole."""
        low = self.x_proj[1](self.x_proj[0](x, delta))
        part = torch.arange(low.shape[-1], device=x.device) // self.rank
        alone = part == torch.arange(MIXTURES, device=x.device).unsqueeze(1)
        return (self.x_proj[2](low.unsqueeze(2) * alone) + self.x_bias).unbind(2)


class RWKV6FeedForward(FeedForward):
    """y = sigmoid(receptance) * value(relu(key)^2), both of x mixed with the token before."""

    def __init__(self, config: RWKV6Config, layer: int) -> None:
        super().__init__(config, layer)
        inner = config.mlp_size
        self.key = LerpLinear(config.hidden_size, inner)
        self.value = nn.Linear(inner, config.hidden_size, bias=False)
        self.receptance = LerpLinear(config.hidden_size, config.hidden_size)

    def mix(self, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = sigmoid(self.receptance(x, delta)) * self.value(relu(self.key(x, delta)).square())
        return out


class RWKV6Block(RWKVBlock):
    """The block of RWKV6."""

    ffn_class = RWKV6FeedForward
