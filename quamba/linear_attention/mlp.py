"""The gated MLP of every family but RWKV."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import silu

from quamba.linear_attention.configs import LinearAttentionConfig


class GatedMLP(nn.Module):
    """y = down_proj(silu(gate_proj(x)) * up_proj(x))."""

    def __init__(self, config: LinearAttentionConfig) -> None:
        super().__init__()
        inner = config.mlp_size
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., D] -> the same."""
        out: torch.Tensor = self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
        return out
