"""What a recurrent layer keeps between tokens, in static tensors updated in place, inside transformers' cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from quamba.recipe import StateSpec
from quamba_kernels import Backend
from quamba_kernels.ops.state import load_state

DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}


class RecurrentState(LinearAttentionLayer):
    """conv [B, W - 1, C] and recurrent [B, ..., N] with its row scales [B, ...]; rng int64 [2] for stochastic rounding.

    Takes the place of the layer that transformers' DynamicCache made, so that generate, beam search and batch
    selection find what they expect.
    """

    dtype: Any  # transformers infers None for these two
    device: Any

    def __init__(
        self, conv: torch.Tensor, shape: tuple[int, ...], spec: StateSpec, layer: int, device: torch.device
    ) -> None:
        super().__init__()
        self.dtype, self.device = conv.dtype, device
        self.conv_states[0] = conv
        self.recurrent_states[0] = torch.zeros(shape, dtype=DTYPES[spec.dtype], device=device)
        self.scale = torch.ones(shape[:-1], dtype=torch.float32, device=device) if spec.dtype == "int8" else None
        stochastic = spec.dtype == "int8" and spec.rounding == "stochastic"
        self.rng = torch.tensor([spec.seed * 65537 + layer, 0], device=device) if stochastic else None
        self.conv_kernel_size[0] = conv.shape[1] + 1
        self.is_conv_states_initialized[0] = self.is_recurrent_states_initialized[0] = True

    @property
    def conv(self) -> torch.Tensor:
        """The last inputs of the convolution."""
        conv = self.conv_states[0]
        assert conv is not None
        return conv

    @property
    def recurrent(self) -> torch.Tensor:
        """The stored state."""
        recurrent = self.recurrent_states[0]
        assert recurrent is not None
        return recurrent

    @property
    def filled(self) -> bool:
        """Whether tokens have been seen."""
        return bool(self.has_previous_state[0])

    def seen(self) -> None:
        """Note that tokens have been seen."""
        self.has_previous_state[0] = True

    @property
    def bytes(self) -> int:
        """Memory of the state, scales included."""
        tensors = [self.conv, self.recurrent, *([self.scale] if self.scale is not None else [])]
        return sum(t.numel() * t.element_size() for t in tensors)

    def forget(self) -> list[torch.Tensor]:
        """Note that no token has been seen; what to clear. A prompt, or a first token, writes the stored state before
        it is read: a captured step, which does not ask, must not be replayed before."""
        self.has_previous_state[0] = False
        return [self.conv] if self.rng is None else [self.conv, self.rng[1:]]

    def reset(self) -> None:
        for tensor in self.forget():
            tensor.zero_()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self.scale is not None:
            self.scale = self.scale.index_select(0, beam_idx.to(self.scale.device))

    def update_conv_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("a quantised mixer updates its own convolution state")

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("a quantised mixer updates its own recurrent state")

    def value(self) -> torch.Tensor:
        """The recurrent state in fp32."""
        return load_state(self.recurrent, self.scale)


Waiting = tuple[Backend, torch.Tensor, RecurrentState]
"""An op's backend, and the state h that it is to store."""


class Deferred:
    """States after a prompt that wait to be stored together with those of other layers: a launch each costs more than
    the storing. What waits is bounded, whatever the depth and the batch."""

    LAYERS, BYTES = 16, 2**26

    def __init__(self) -> None:
        self._waiting: list[Waiting] = []

    def add(self, store: Backend, h: torch.Tensor, state: RecurrentState) -> None:
        """Store h [B, ..., N] fp32 into ``state`` by ``store``, of the op quantize_states, at ``flush`` or before."""
        if self._waiting and not _alike(self._waiting[0], (store, h, state)):
            self.flush()
        self._waiting.append((store, h, state))
        if len(self._waiting) == self.LAYERS or (len(self._waiting) + 1) * h.numel() * h.element_size() > self.BYTES:
            self.flush()

    def flush(self) -> None:
        """Store all that waits."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            store = waiting[0][0]
            parts = zip(*((h, state.recurrent, state.scale, state.rng) for _, h, state in waiting), strict=True)
            store(*(None if part[0] is None else part for part in parts))


_DEFERRED: ContextVar[Deferred | None] = ContextVar("deferred", default=None)


def deferred() -> Deferred | None:
    """Where states after a prompt wait; None where each is to be stored at once."""
    return _DEFERRED.get()


@contextmanager
def stored_together() -> Iterator[None]:
    """Inside, for this thread, a prompt's states are stored for several layers at a time, and all at the end: for
    callers that read none before."""
    waiting = Deferred()
    before = _DEFERRED.set(waiting)
    try:
        yield
        waiting.flush()
    finally:
        _DEFERRED.reset(before)


def _alike(one: Waiting, other: Waiting) -> bool:
    """Whether two states can be stored together."""
    (store, h, state), (also, g, beside) = one, other
    kinds = [(part.recurrent.dtype, part.scale is None, part.rng is None) for part in (state, beside)]
    return store == also and (h.shape, h.device) == (g.shape, g.device) and kinds[0] == kinds[1]


# is_croppable: a property of one of transformers' own two bases, an attribute of the other
class HybridState(RecurrentState, LinearAttentionAndFullAttentionLayer):  # type: ignore[override]  # is_croppable
    """The state of a layer that has attention beside its recurrence: keys and values lie here too."""

    def adopt(self, layer: DynamicLayer) -> None:
        """Take over keys and values that attention has written already."""
        if layer.keys is not None and layer.values is not None:
            DynamicLayer.lazy_initialization(self, layer.keys, layer.values)
            self.keys, self.values = layer.keys, layer.values

    def forget(self) -> list[torch.Tensor]:
        DynamicLayer.reset(self)
        return super().forget()


def reset(caches: Iterable[Any]) -> None:
    """Reset caches in place: where all layers are recurrent, what they clear together in a launch for each type."""
    cleared: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = defaultdict(list)
    for cache in caches:
        layers = getattr(cache, "layers", [])
        if not layers or not all(isinstance(layer, RecurrentState) for layer in layers):
            cache.reset()
            continue
        for tensor in (tensor for layer in layers for tensor in layer.forget()):
            cleared[tensor.dtype, tensor.device].append(tensor)
    for tensors in cleared.values():
        torch._foreach_zero_(tensors)
