"""What a recurrent layer keeps between tokens, inside transformers' cache, in tensors updated in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer


class NamedTensors:
    """Tensors [B, ...] by name, which beam search and batch selection may reorder."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[str, torch.Tensor] = {}
        self.empty: dict[str, float] = {}

    def get(self, name: str) -> torch.Tensor | None:
        """The tensor of that name, None before the first token."""
        return self.tensors.get(name)

    def put(self, name: str, value: torch.Tensor, empty: float = 0.0) -> None:
        """Keep a copy, in the memory of the last one where it fits: a captured graph finds it again.

        empty: what it holds where no token has been seen.
        """
        self.empty[name] = empty
        old = self.tensors.get(name)
        if old is not None and old.shape == value.shape:
            old.copy_(value)
        else:
            self.tensors[name] = value.clone(memory_format=torch.contiguous_format)

    def clear(self) -> None:
        """As before the first token, in place."""
        for name, tensor in self.tensors.items():
            tensor.fill_(self.empty[name])

    def change(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """``fn`` of every tensor."""
        self.tensors = {name: fn(t) for name, t in self.tensors.items()}


class LayerState(NamedTensors, LinearAttentionLayer):
    """A recurrent layer: its tensors, and how many tokens it has seen. rng: int64 [2], of stochastic rounding."""

    seen = 0
    rng: torch.Tensor | None = None

    def advance(self, tokens: int) -> None:
        """Note that tokens have been seen."""
        self.seen += tokens
        self.has_previous_state[0] = True

    def get_seq_length(self) -> int:
        return self.seen

    def reset(self) -> None:
        self.clear()
        if self.rng is not None:
            self.rng[1:].zero_()
        self.seen = 0
        self.has_previous_state[0] = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.change(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.change(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.change(lambda t: t[indices])


class AttentionState(NamedTensors, DynamicLayer):
    """Keys and values of softmax attention, and what the same block's MLP keeps."""

    def reset(self) -> None:
        super().reset()
        self.clear()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.change(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.change(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.change(lambda t: t[indices])


class LayerCache(Cache):
    """A ``LayerState`` or an ``AttentionState`` for each layer."""

    def __init__(self, layer_types: list[str]) -> None:
        super().__init__(layers=[])
        furnish(self, layer_types)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        layer: Any = self.layers[layer_idx]
        return int(layer.get_seq_length())

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length(layer_idx) + query_length, 0


def furnish(cache: Cache, layer_types: list[str]) -> None:
    """Put our layers where a cache of transformers' own has none yet, or empty ones of the stock kinds."""
    for index, kind in enumerate(layer_types):
        if index == len(cache.layers):
            cache.layers.append(DynamicLayer())
        layer = cache.layers[index]
        if type(layer) is LinearAttentionLayer or (type(layer) is DynamicLayer and not layer.is_initialized):
            cache.layers[index] = LayerState() if kind == "linear_attention" else AttentionState()


def state_of(cache: Cache | None, layer: int) -> NamedTensors | None:
    """A layer's tensors inside a furnished cache."""
    if cache is None:
        return None
    state = cache.layers[layer]
    assert isinstance(state, NamedTensors), f"layer {layer} of the cache is a {type(state).__name__}"
    return state
