"""Softmax attention of the layers that a config lists under ``attn``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache

from quamba.linear_attention.configs import AttentionSpec
from quamba.linear_attention.rotary import rotate_positions


class Attention(nn.Module):
    """Causal attention with rotary positions, shared key and value heads, and a window where the config sets one."""

    def __init__(self, hidden_size: int, spec: AttentionSpec, layer: int) -> None:
        super().__init__()
        self.spec, self.layer_idx = spec, layer
        self.head_dim = hidden_size // spec.num_heads
        kv = spec.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, kv, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, kv, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        carry: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """hidden_states [B, T, D] -> the same; attention_mask [B, seen + T], 0 for padding."""
        q, k, v = (
            proj(hidden_states).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        layer: Any = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        seen = 0 if layer is None else layer.get_seq_length()
        # padding on the left shifts all positions of a row alike, and only their differences count
        q, k = (rotate_positions(x, seen, self.spec.rope_theta) for x in (q, k))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if layer is not None:
            k, v = layer.update(k, v)
        mask = self._visible(q.shape[2], k.shape[2], attention_mask, q.device)
        causal = mask is None and q.shape[2] > 1
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
        out: torch.Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return out

    def _visible(
        self, queries: int, keys: int, attention_mask: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor | None:
        """Which keys each query sees, [B or 1, 1, T, S]; None for all up to the query itself."""
        if attention_mask is None and self.spec.window_size is None and queries in (1, keys):
            return None
        at = torch.arange(keys - queries, keys, device=device).unsqueeze(1)
        key = torch.arange(keys, device=device)
        seen = key <= at
        if self.spec.window_size is not None:
            seen &= key > at - self.spec.window_size
        seen = seen[None, None]
        if attention_mask is not None:
            seen = seen & attention_mask[:, None, None, -keys:].bool()
            seen = seen | (key == at)  # a padded query sees itself: a row without keys would be NaN
        return seen
