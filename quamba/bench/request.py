"""One request of a batch, as often as wanted: a prefill of the same prompts, then token after token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from quamba.decoding import Captured, Continuation


class Request(ABC):
    """prefill() and step() return logits [B, V], overwritten by the next call of the same; tokens are chosen greedily.

    ``captured`` are its parts that replay a CUDA graph once they ran; on a CPU nothing is captured.
    """

    captured: tuple[Captured[torch.Tensor], ...]

    @abstractmethod
    def prefill(self) -> torch.Tensor:
        """Forget everything, read the prompts and choose the first token."""

    @abstractmethod
    def step(self) -> torch.Tensor:
        """Read the last token and choose the next."""

    @property
    @abstractmethod
    def state_bytes(self) -> int:
        """Bytes of the states of one sequence, once a prefill ran."""

    def capture(self, wanted: bool) -> None:
        """Replay graphs, or run eagerly."""
        for part in self.captured:
            part.capture = wanted

    @property
    def warm(self) -> bool:
        """Whether every part that may be captured has been."""
        return all(part.replays for part in self.captured if part.capture)


class TransformersRequest(Request):
    """Of a model with transformers' interface: ours, or transformers' own."""

    def __init__(self, model: Any, ids: torch.Tensor, generate: int) -> None:
        """ids int64 [B, T] on the model's device; room for ``generate`` tokens."""
        self.text = Continuation(model, len(ids), room=generate, capture=False)
        self.ids = ids
        self._prefill = Captured(self._begin, capture=False, eager=2)
        self.captured = (self._prefill, self.text.captured)

    def prefill(self) -> torch.Tensor:
        logits = self._prefill()
        self.text.count = 1
        return logits

    def _begin(self) -> torch.Tensor:
        logits = self.text.begin(self.ids)
        self.text.decoder.check_whole()
        self._prefill.capture = self._prefill.capture and self.text.decoder.static
        return logits

    def step(self) -> torch.Tensor:
        return self.text.step()

    @property
    def state_bytes(self) -> int:
        caches = self.text.decoder.cache.values()
        held = [part for cache in caches for part in getattr(cache, "layers", [cache])]
        return sum(_bytes(part) for part in held) // len(self.ids)


def _bytes(layer: Any) -> int:
    """Of a layer of transformers' cache, or of a cache without layers; ours knows its scales."""
    if hasattr(layer, "bytes"):
        return int(layer.bytes)
    parts = list(vars(layer).values()) if hasattr(layer, "__dict__") else layer
    held = [leaf for leaf in tree_leaves(parts) if isinstance(leaf, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in held)
