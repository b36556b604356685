"""RWKV7: a diagonal plus rank-one transition. Peng et al., 2503.14456."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import relu, sigmoid

from quamba.linear_attention.cache import LayerState
from quamba.linear_attention.configs import RWKV7Config
from quamba.linear_attention.mixer import Mixer, heads, masked
from quamba.linear_attention.token_shift import FeedForward, LoRA, RWKVBlock, step_back
from quamba_kernels import ops

SLOWEST = -0.6065306597126334
"""-exp(-0.5): the log decay where its gate is 1."""
L2_EPS = {True: 1e-6, False: 1e-12}
"""By whether fla fuses the norm of the removal key: fused, eps stands under the root beside the sum of squares."""


class RWKV7Attention(Mixer):
    """r, k, v and the low-rank gates w, a, v, g, each from its own mixture of a token with the one before.

    carry["v_first"] holds the first layer's values, towards which later layers interpolate theirs.
    """

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__(config, layer)
        assert isinstance(config.value_dim, list) and config.head_dim is not None
        size, values, self.k_size = config.hidden_size, config.value_dim[layer], config.head_dim
        count = size // self.k_size
        self.v_size, self.fused = values // count, config.fuse_norm
        for name in "rwkvag":
            setattr(self, f"x_{name}", nn.Parameter(torch.zeros(1, 1, size)))
        self.k_k, self.k_a = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.zeros(size))
        self.r_k = nn.Parameter(torch.zeros(count, self.k_size))
        self.r_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, values, bias=False)
        self.o_proj = nn.Linear(values, size, bias=False)
        self.w_lora = LoRA(size, size, config.decay_low_rank_dim)
        if layer != 0:
            self.v_lora = LoRA(size, values, config.v_low_rank_dim, activation=None)
        self.a_lora = LoRA(size, size, config.a_low_rank_dim, activation=None)
        self.g_lora = LoRA(size, values, config.gate_low_rank_dim, activation="sigmoid", bias=False)
        self.g_norm = nn.GroupNorm(count, values, eps=self.k_size * config.norm_eps)

    def mix(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        state: LayerState | None,
        carry: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        x = masked(x, mask)
        delta = step_back(x, state, "shift")
        xr, xw, xk, xv, xa, xg = (x + delta * getattr(self, f"x_{name}") for name in "rwkvag")
        r, k, v = self.r_proj(xr), self.k_proj(xk), self.v_proj(xv)
        g = SLOWEST * sigmoid(self.w_lora(xw).float())
        if self.layer_idx == 0:
            carry["v_first"] = v
        else:
            v = torch.lerp(v, carry["v_first"], sigmoid(self.v_lora(xv)))
        a = sigmoid(self.a_lora(xa).float())
        removal = self._unit(heads((k * self.k_k).float(), self.k_size))
        k = k.float() * (1 + (a - 1) * self.k_a.float())
        v = heads(masked(v, mask), self.v_size)
        r, k, g, a = (heads(t, self.k_size) for t in (r, k, g, a))
        taken, scales = self.enter(q=r, k=k, v=v)
        o = self.scan(
            (ops.dplr_scan, ops.dplr_update), state, *taken, g, -removal, removal * a, out_dtype=x.dtype, **scales
        )
        o = self.g_norm(o.flatten(2).flatten(0, 1)).view(*x.shape[:2], -1)
        bonus = (r.float() * k * self.r_k.float()).sum(-1, keepdim=True) * v.float()
        out: torch.Tensor = self.o_proj((o + bonus.flatten(2).to(o.dtype)) * self.g_lora(xg))
        return out

    def _unit(self, x: torch.Tensor) -> torch.Tensor:
        eps = L2_EPS[self.fused]
        if self.fused:
            return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)
        return x / x.norm(dim=-1, keepdim=True).clamp_min(eps)


class RWKV7FeedForward(FeedForward):
    """y = value(relu(key(x mixed with the token before))^2)."""

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__(config, layer)
        inner = config.mlp_size
        self.x_k = nn.Parameter(torch.zeros(config.hidden_size))
        self.key = nn.Linear(config.hidden_size, inner, bias=False)
        self.value = nn.Linear(inner, config.hidden_size, bias=False)

    def mix(self, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.value(relu(self.key(x + delta * self.x_k)).square())
        return out


class RWKV7Block(RWKVBlock):
    """The block of RWKV7."""

    ffn_class = RWKV7FeedForward
