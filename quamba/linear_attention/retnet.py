"""RetNet: a fixed decay per head, rotary positions. Sun et al., 2307.08621."""

from __future__ import annotations

import torch
from torch import nn

from quamba.linear_attention.cache import LayerState
from quamba.linear_attention.configs import RetNetConfig
from quamba.linear_attention.gla import Leave
from quamba.linear_attention.mixer import Mixer, activation, heads, masked
from quamba.linear_attention.rotary import rotate_positions
from quamba_kernels import ops


class MultiScaleRetention(Mixer, Leave):
    """g = log(1 - 2^(-5 - h)) in head h; fla gives RetNet no convolution, whatever its config says."""

    def __init__(self, config: RetNetConfig, layer: int) -> None:
        super().__init__(config, layer)
        size, self.groups = config.hidden_size, config.num_heads // (config.num_kv_heads or config.num_heads)
        keys, values = config.whole("expand_k"), config.whole("expand_v")
        self.k_size, self.v_size = keys // config.num_heads, values // config.num_heads
        self.feature_map = activation(config)
        self.q_proj = nn.Linear(size, keys, bias=False)
        self.k_proj = nn.Linear(size, keys // self.groups, bias=False)
        self.v_proj = nn.Linear(size, values // self.groups, bias=False)
        self.add_leave(config, values)

    def mix(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        state: LayerState | None,
        carry: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        q, k = heads(self.q_proj(x), self.k_size), heads(self.k_proj(x), self.k_size)
        v = heads(masked(self.v_proj(x), mask), self.v_size)
        first = self._position(x, state)
        q, k = rotate_positions(self.feature_map(q), first), rotate_positions(self.feature_map(k), first)
        k, v = (t.repeat_interleave(self.groups, 2) if self.groups > 1 else t for t in (k, v))
        rates = torch.arange(5, 5 + q.shape[2], device=x.device, dtype=torch.float32)
        g = torch.log1p(-torch.exp2(-rates)).view(1, 1, -1, 1).expand(*q.shape[:3], 1)
        (q, k, v), scales = self.enter(q=q, k=k, v=v)
        o = self.scan(
            (ops.gla_scan, ops.gla_update), state, q, k, v, g, fixed=(None,), scale=self.k_size**-0.5,
            out_dtype=x.dtype, **scales,
        )  # fmt: skip
        return self.leave(o, x)

    @staticmethod
    def _position(x: torch.Tensor, state: LayerState | None) -> torch.Tensor:
        """Position [B] of the first token, read from the state, where a captured graph can advance it."""
        found = None if state is None else state.get("position")
        first = torch.zeros(x.shape[0], device=x.device) if found is None else found.clone()
        if state is not None:
            state.put("position", first + x.shape[1])
        return first
