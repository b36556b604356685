"""One token for every sequence of a batch: transformers' forward, captured in a CUDA graph where there is a GPU."""

from __future__ import annotations

from typing import Any

import torch

from quamba.errors import UserError

CACHE_NAMES = ("cache_params", "past_key_values")
"""The name under which a model returns its cache is the name under which it takes it back."""
EAGER_STEPS = 3
"""The first step fills the cache, the second binds the decode operators, the third lets libraries settle."""


class Decoder:
    """Feed tokens one at a time over static caches.

    On CUDA the step is captured after a few eager ones and replayed from then on; a captured step has no host work, and
    states are updated in place. capture=False keeps every step eager.
    """

    def __init__(self, model: Any, *, capture: bool = True) -> None:
        self.model = model
        self.capture = capture and model.device.type == "cuda"
        self.cache: dict[str, Any] = {}
        self._seen = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [B] -> logits [B, V], overwritten by the next captured step.

        Raises UserError for a model that returns no cache.
        """
        if self._graph is None and self.capture and self._seen >= EAGER_STEPS:
            self._record(ids)
        self._seen += 1
        if self._graph is None:
            return self._eager(ids.unsqueeze(1))
        self._ids.copy_(ids.unsqueeze(1))
        self._graph.replay()
        return self._logits

    def _eager(self, ids: torch.Tensor) -> torch.Tensor:
        output = self.model(ids, use_cache=True, **self.cache)
        self.cache = {name: output[name] for name in CACHE_NAMES if output.get(name) is not None}
        if not self.cache:
            raise UserError(f"{type(self.model).__name__} returns no cache, so it cannot decode one token at a time")
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _record(self, ids: torch.Tensor) -> None:
        self._ids = ids.unsqueeze(1).clone()
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph):
            self._logits = self._eager(self._ids)
