"""A model in the comparison, and how it comes into being."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from quamba import memory
from quamba.arena import settle
from quamba.bench.materialise import build, stored_bytes, tie
from quamba.bench.request import Request, TransformersRequest
from quamba.bench.source import Source
from quamba.recipe import FLOAT, Recipe, StateSpec


class Contender(ABC):
    """recipe: what it is called in the report; captures: whether its requests run as CUDA graphs where there is a GPU.

    weight_bytes: of its weights; resident_bytes: what making it took, of the device's memory or of the process.
    """

    recipe: str
    captures = True
    weight_bytes = 0
    resident_bytes = 0

    @abstractmethod
    def request(self, ids: torch.Tensor, generate: int) -> Request:
        """A request for prompts [B, T] that generates so many tokens."""


@dataclass(frozen=True)
class Baseline:
    """make: the contender with weights of a source's sizes; why_not: why it cannot run on a device, None if it can."""

    make: Callable[[Source, torch.dtype, torch.device], Contender]
    why_not: Callable[[torch.device], str | None] = lambda device: None


class Ours(Contender):
    """Our operators under a recipe."""

    def __init__(self, model: Any, recipe: str) -> None:
        self.model, self.recipe = model, recipe
        self.weight_bytes = stored_bytes(model)

    def request(self, ids: torch.Tensor, generate: int) -> Request:
        return TransformersRequest(self.model, ids, generate)


def ours(source: Source, recipe: Recipe, dtype: torch.dtype, device: torch.device) -> Contender:
    """The checkpoint itself where ``recipe`` is its own, else drawn weights of its sizes."""
    own = source.recipe or FLOAT
    if source.path is None or recipe.name != own.name:
        return Ours(build(source.config, recipe, dtype, device), recipe.name)
    from quamba.loading import load

    model, _ = load(source.path, device=device.type, dtype=dtype)
    tie(model, recipe)
    settle(model)  # again, without what was tied
    return Ours(model, recipe.name)


def half(dtype: torch.dtype) -> Recipe:
    """Floats with a state of the activations' width, as other implementations keep it."""
    state = StateSpec(dtype="float32" if dtype == torch.float32 else "float16")
    return FLOAT.model_copy(update={"name": "fp16", "state": state})


def measured(make: Callable[[], Contender], device: torch.device) -> Contender:
    """The contender that ``make`` returns, with what making it took."""
    memory.collect(device)  # what is cut from a cached block holds up to 1 MB of it more than it was asked for
    before = _held(device)
    contender = make()
    memory.release()
    contender.resident_bytes = max(0, _held(device) - before)
    return contender


def _held(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else memory.resident()
