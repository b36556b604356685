"""What RWKV6 and RWKV7 share: each token mixed with the one before it, low-rank maps, and the block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from quamba.linear_attention.cache import NamedTensors, state_of
from quamba.linear_attention.configs import RWKVConfig
from quamba.linear_attention.decoder import DecoderBlock, mixer_of
from quamba.linear_attention.mixer import Mixer, masked

ACTIVATIONS = {"tanh": nn.Tanh, "sigmoid": nn.Sigmoid, None: nn.Identity}


def step_back(x: torch.Tensor, state: NamedTensors | None, name: str) -> torch.Tensor:
    """x[t - 1] - x[t] for x [B, T, D], with the token before x[0] from the state, which keeps the last one."""
    before = None if state is None else state.get(name)
    if before is None:
        before = torch.zeros_like(x[:, :1])
    delta = torch.cat([before, x[:, :-1]], 1) - x
    if state is not None:
        state.put(name, x[:, -1:])  # after its use: the old one is overwritten in place
    return delta


class LoRA(nn.Module):
    """y = up(act(down(x)))."""

    def __init__(self, size: int, outputs: int, rank: int, activation: str | None = "tanh", bias: bool = True) -> None:
        super().__init__()
        self.lora = nn.Sequential(
            nn.Linear(size, rank, bias=False), ACTIVATIONS[activation](), nn.Linear(rank, outputs, bias=bias)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., D] -> [..., outputs]."""
        y: torch.Tensor = self.lora(x)
        return y


class FeedForward(nn.Module, ABC):
    """The MLP of an RWKV block, which looks at the token before. Subclasses define ``mix``."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.layer_idx = layer

    def forward(
        self, x: torch.Tensor, attention_mask: torch.Tensor | None = None, past_key_values: Cache | None = None
    ) -> torch.Tensor:
        """x [B, T, D] -> the same; attention_mask [B, at least T], 0 for padding on the left."""
        if attention_mask is not None:
            x = masked(x, attention_mask[:, -x.shape[1] :].unsqueeze(-1).to(x.dtype))
        return self.mix(x, step_back(x, state_of(past_key_values, self.layer_idx), "ffn"))

    @abstractmethod
    def mix(self, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """x and delta [B, T, D] -> the same."""


class RWKVBlock(DecoderBlock):
    """x + attn(attn_norm(x)), then x + ffn(ffn_norm(x)), with layer norms; the first may norm its input before."""

    ffn_class: type[FeedForward]

    def __init__(self, config: RWKVConfig, layer: int, recurrent: type[Mixer]) -> None:
        super().__init__(config, layer, recurrent)
        if layer == 0 and config.norm_first:
            self.pre_norm = self.norm(config)
        self.attn_norm = self.norm(config)
        self.attn = mixer_of(config, layer, recurrent)
        self.ffn_norm = self.norm(config)
        self.ffn = self.ffn_class(config, layer)

    @staticmethod
    def norm(config: Any) -> nn.Module:
        return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        carry: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if hasattr(self, "pre_norm"):
            hidden_states = self.pre_norm(hidden_states)
        mixed = self.attn(self.attn_norm(hidden_states), attention_mask, past_key_values, carry)
        hidden_states = hidden_states + mixed
        return hidden_states + self.ffn(self.ffn_norm(hidden_states), attention_mask, past_key_values)
