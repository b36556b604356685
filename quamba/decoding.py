"""Token after token over static caches: transformers' forward, captured in a CUDA graph where there is a GPU."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from transformers import DynamicCache

from quamba.errors import UserError
from quamba.modules.norm import narrowed
from quamba.modules.stack import Stack, joined, stacks_of
from quamba.modules.state import reset, stored_together
from quamba.placement import entry, together
from quamba.sampling import Sampler

CACHE_NAMES = ("cache", "cache_params", "past_key_values", "state")
"""The name under which a model returns its cache is the name under which it takes it back; from transformers 5.24 on
the first answers to the others too."""
EAGER_STEPS = 3
"""The first step fills the cache, the second binds the decode operators, the third lets libraries settle."""

Result = TypeVar("Result")


class Captured(Generic[Result]):
    """``run`` over tensors that outlive it: eager for ``eager`` calls, then one CUDA graph that is replayed.

    A replay does no host work but its launch; what ``run`` returned while it was recorded is returned each time, with
    new values. With ``capture`` False every call is eager; it may be set between calls.
    """

    def __init__(self, run: Callable[[], Result], *, capture: bool, eager: int = EAGER_STEPS) -> None:
        self.run, self.capture, self.eager = run, capture, eager
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Result

    def __call__(self) -> Result:
        if not self.capture:
            return self.run()
        if self._graph is None:
            if self.eager > 0:
                self.eager -= 1
                return self.run()
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with _uncollected(), torch.cuda.graph(graph):
                self._result = self.run()
            self._graph = graph
        self._graph.replay()
        return self._result

    @property
    def replays(self) -> bool:
        """Whether the next call is a replay."""
        return self.capture and self._graph is not None


@contextmanager
def _uncollected() -> Iterator[None]:
    """Inside, no garbage is collected: with an older graph in it, the recording of a new one would fail."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def returned_cache(output: Any) -> dict[str, Any]:
    """The caches in what a model returned, by the names under which it takes them back; none where it has none."""
    return {name: output[name] for name in list(output) if name in CACHE_NAMES and output[name] is not None}


class Decoder:
    """Feed tokens that are known, one at a time, over static caches.

    On CUDA the step is captured after a few eager ones and replayed from then on; states are updated in place. With
    capture=False, and for a model whose cache grows with the tokens, every step is eager.
    """

    def __init__(self, model: Any, *, capture: bool = True) -> None:
        self.model = model
        self.cache: dict[str, Any] = {}
        self._ids: torch.Tensor | None = None
        self._mask: torch.Tensor | None = None
        taken = inspect.signature(model.forward).parameters
        # not every model counts its tokens where its first layer is recurrent
        self._counts = "position_ids" in taken
        self._takes, self._owns = next((name for name in CACHE_NAMES if name in taken), None), False
        self._position: torch.Tensor | None = None
        self._stacks: list[Stack] | None = None
        self.captured = Captured(self._step, capture=capture and together(model) and model.device.type == "cuda")

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """ids int64 [B, T], mask [B, T] (0 for padding on the left) -> logits [B, V] of the last token.

        Begins anew: states of an earlier prompt of the same batch size are cleared in place, and stay where they are; a
        cache that grows is dropped.
        """
        if not self.static:
            self.cache = {}
        reset(self.cache.values())
        if self._position is not None:
            self._position.zero_()
        if self._owns:
            self._own(ids)
        self._mask = mask
        positions = {} if mask is None else {"steps": (mask.cumsum(-1) - 1).clamp_min(0), "attention_mask": mask}
        with narrowed(), stored_together():
            return self.forward(ids, logits_to_keep=1, **positions)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [B] -> logits [B, V], overwritten by the next captured step.

        Raises UserError for a model that returns no cache.
        """
        if self._ids is None:
            self._ids = ids.unsqueeze(1).clone()
        self._ids.copy_(ids.unsqueeze(1))
        return self.captured()

    def forward(self, ids: torch.Tensor, steps: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        """ids int64 [B, T] after what was seen so far -> logits [B, V] of the last token, without capture.

        steps [B, T]: positions from here on, where they are not 0, 1, 2, ...
        """
        if self._counts:
            options["position_ids"] = self._positions(ids, steps)
        if self.cache and not self.static and self._mask is not None and "attention_mask" not in options:
            self._mask = torch.cat([self._mask, torch.ones_like(ids)], 1)  # attention looks back at the padding
            options["attention_mask"] = self._mask
        output = self.model(ids, use_cache=True, **options, **self.cache)
        found = returned_cache(output)
        if not found and not self.cache and self._takes:
            self._own(ids)
            output = self.model(ids, use_cache=True, **options, **self.cache)
            layers = [layer for cache in self.cache.values() for layer in cache.layers]
            self._owns = any(getattr(layer, "is_initialized", False) for layer in layers)
        self.cache = found or (self.cache if self._owns else {})
        if not self.cache:
            raise UserError(f"{type(self.model).__name__} returns no cache, so it cannot decode one token at a time")
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _own(self, ids: torch.Tensor) -> None:
        """Begin a cache for a model that takes one and returns none; what such a model keeps in its modules too, a pass
        without a cache makes it forget."""
        self.model(ids[:, :1], use_cache=False)
        assert self._takes is not None
        self.cache = {self._takes: DynamicCache(config=self.model.config)}

    def check_whole(self) -> None:
        """Raises UserError where the cache is not all that the model remembers, so that its bytes say too little."""
        if self._owns:
            raise UserError(f"{type(self.model).__name__} keeps states in its modules, so they cannot be measured")

    @property
    def static(self) -> bool:
        """Whether the cache stays in place from token to token, as a graph needs it."""
        return all(getattr(cache, "is_compileable", False) for cache in self.cache.values())

    def _positions(self, ids: torch.Tensor, steps: torch.Tensor | None) -> torch.Tensor:
        """Positions [B, T] of these tokens; that of the next is kept, in place."""
        if self._position is None:
            self._position = torch.zeros_like(ids[:, :1])
        positions = self._position + (torch.arange(ids.shape[1], device=ids.device) if steps is None else steps)
        self._position.copy_(positions[:, -1:] + 1)
        return positions

    def advance(self, ids: torch.Tensor) -> torch.Tensor:
        """forward of one token each, ids int64 [B, 1], through blocks that go together where they can."""
        if self._stacks is None:
            self._stacks = stacks_of(self.model)
        with joined(self._stacks):
            return self.forward(ids)

    def _step(self) -> torch.Tensor:
        assert self._ids is not None
        logits = self.advance(self._ids)
        self.captured.capture = self.captured.capture and self.static
        return logits


class Continuation:
    """The tokens that a model adds to prompts of one batch size: a prefill, then steps that choose their own tokens.

    Everything a step reads and writes lies on the device: its token, the tokens so far, who has finished. So on CUDA
    the whole step, sampling included, is one graph. It outlives a prompt, since ``begin`` clears the states in place.

    room: tokens that fit; stop: ids after which a sequence only gets ``pad``. tokens int64 [B, room].
    """

    def __init__(
        self,
        model: Any,
        batch: int,
        *,
        room: int,
        sampler: Sampler | None = None,
        stop: Sequence[int] = (),
        pad: int = 0,
        capture: bool = True,
    ) -> None:
        device = entry(model)
        self.decoder, self.room, self.pad = Decoder(model, capture=False), room, pad
        self.sampler = sampler or Sampler(device=device)
        self.tokens = torch.zeros(batch, room, dtype=torch.int64, device=device)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self._stop = torch.tensor(list(stop), dtype=torch.int64, device=device)
        self._next = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, dtype=torch.int64, device=device)
        self.captured = Captured(self._step, capture=capture and together(model) and device.type == "cuda")
        self.count = 0

    def begin(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Read prompts [B, T] (mask 0 for padding on the left) and choose the first token; logits [B, V]."""
        self._position.zero_()
        self.finished.zero_()
        self.count = 1
        return self._choose(self.decoder.prefill(ids, mask))

    def step(self) -> torch.Tensor:
        """Choose one more token for every sequence; logits [B, V], overwritten by the next captured step."""
        assert self.count < self.room
        self.count += 1
        return self.captured()

    def _step(self) -> torch.Tensor:
        logits = self.decoder.advance(self._next)
        self.captured.capture = self.captured.capture and self.decoder.static
        return self._choose(logits)

    def _choose(self, logits: torch.Tensor) -> torch.Tensor:
        token = self.sampler(logits)
        if len(self._stop):
            token = torch.where(self.finished, self.pad, token)
            self.finished |= (token.unsqueeze(1) == self._stop).any(1)
        self.tokens.index_copy_(1, self._position, token.unsqueeze(1))
        self._next.copy_(token.unsqueeze(1))
        self._position += 1
        return logits
