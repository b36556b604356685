"""What a model asks of a device, counted on the meta device: bytes moved and operations done, operator by operator.

Nothing here knows an architecture or a format. The model runs without memory, every call of an operator is
intercepted, and the call counts as one kernel that reads each of its arguments and writes each of its results once:
weights as the format stores them with their scales, states that are updated in place read and written, activations.
What grows with the batch and what with the tokens is told apart by running three sizes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from quamba.bench.materialise import outline, stored_bytes
from quamba.decoding import Decoder
from quamba.errors import UserError
from quamba.models import describe
from quamba.modules.embedding import Embedding
from quamba.modules.state import RecurrentState
from quamba.recipe import Recipe
from quamba_kernels.registry import Backend, intercept

CHUNK = 256
"""Tokens of one chunk of a state-space dual scan: what it computes within a chunk grows with it."""


@dataclass(frozen=True)
class Work:
    """calls: kernels; bytes: read and written; int8, float16: operations (an addition and a multiplication are two);
    exponentials: of the special function units."""

    calls: float = 0.0
    bytes: float = 0.0
    int8: float = 0.0
    float16: float = 0.0
    exponentials: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)))

    def __mul__(self, factor: float) -> Work:
        return Work(*(factor * getattr(self, f.name) for f in fields(Work)))

    def __sub__(self, other: Work) -> Work:
        return self + other * -1


Trace = dict[str, Work]
"""Work by operator; linears by their sizes as well."""


@dataclass(frozen=True)
class Growth:
    """Work of one pass = fixed + batch * sequence + batch * tokens * token, by operator."""

    fixed: Trace
    sequence: Trace
    token: Trace

    def at(self, batch: int, tokens: int) -> Trace:
        """The work of one pass over ``batch`` sequences of ``tokens`` tokens each."""
        return {
            name: self.fixed[name] + self.sequence[name] * batch + self.token[name] * (batch * tokens)
            for name in self.fixed
        }


@dataclass(frozen=True)
class Cost:
    """A model under a recipe. stored: bytes of its weights; state: bytes of one sequence's states; prefill and decode:
    the work of one pass; live: bytes of activations that each operator of a prefill holds in one call."""

    stored: int
    state: int
    prefill: Growth
    decode: Growth
    live: Growth

    def memory(self, batch: int, tokens: int) -> float:
        """Bytes that a device must hold: weights, states, and the activations of the operator that has most."""
        workspace = max(work.bytes for work in self.live.at(batch, tokens).values())
        return self.stored + batch * self.state + workspace


def count(config: Any, recipe: Recipe, dtype: torch.dtype) -> Cost:
    """The cost of a transformers config under a recipe with activations of ``dtype``.

    Raises UserError for a model with layers of transformers' own: their routing depends on values.
    """
    if describe(config).hosted:
        raise UserError(f"Predictions are for models of recurrent layers alone; {config.model_type} has others.")
    model = outline(config, recipe, dtype)
    counter = Counter(model)
    with torch.no_grad():
        one, longer, wider = (counter.run(batch, tokens) for batch, tokens in ((1, 2), (1, 3), (2, 2)))
    return Cost(
        stored_bytes(model), one.state, _growth(one.prefill, longer.prefill, wider.prefill, 2),
        _growth(one.decode, one.decode, wider.decode, 0), _growth(one.live, longer.live, wider.live, 2),
    )  # fmt: skip


def _growth(one: Trace, longer: Trace, wider: Trace, tokens: int) -> Growth:
    """From the work at (batch 1, ``tokens``), (batch 1, one more token) and (batch 2, ``tokens``)."""
    token = {name: longer[name] - work for name, work in one.items()}
    sequence = {name: wider[name] - work - token[name] * tokens for name, work in one.items()}
    fixed = {name: work - sequence[name] - token[name] * tokens for name, work in one.items()}
    return Growth(fixed, sequence, token)


@dataclass
class Pass:
    """What one run was counted as; live: the most bytes of activations that a call in the prefill has."""

    prefill: Trace
    decode: Trace
    state: int
    live: Trace


class Counter:
    """Runs a model on the meta device. The body of an operator runs once for each combination of shapes and types."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._known: dict[Any, tuple[str, Work, Any, float]] = {}
        self._trace: Trace = {}
        self._live: Trace = {}

    def run(self, batch: int, tokens: int) -> Pass:
        """A prefill of [batch, tokens], then one decoded token."""
        decoder = Decoder(self.model, capture=False)
        prefill = self._pass(decoder.prefill, batch, tokens)
        live = self._live
        decoder.check_whole()
        decode = self._pass(decoder.forward, batch, 1)
        layers = [layer for cache in decoder.cache.values() for layer in cache.layers]
        state = sum(layer.bytes for layer in layers if isinstance(layer, RecurrentState))
        return Pass(prefill, decode, state // batch, live)

    def _pass(self, forward: Callable[[torch.Tensor], torch.Tensor], batch: int, tokens: int) -> Trace:
        self._trace, self._live = {}, {}
        with intercept(self._call):
            forward(torch.zeros(batch, tokens, dtype=torch.int64, device="meta"))
        for module in self.model.modules():
            if isinstance(module, Embedding):
                tables = [*module._parameters.values(), *module._buffers.values()]
                row = sum(t[0].numel() * t.element_size() for t in tables if t is not None)
                width = next(t.shape[1] for t in tables if t is not None and t.dim() == 2)
                width *= (module.out_dtype or module.dtype).itemsize
                self._trace["embedding"] = Work(1, batch * tokens * (row + width))
        return self._trace

    def _call(self, backend: Backend, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = backend.fn, _shapes(args), _shapes(tuple(sorted(kwargs.items())))
        if key not in self._known:
            self._known[key] = self._measure(backend, args, kwargs)
        name, work, result, activations = self._known[key]
        if backend.fn.__name__ != "embedding":  # a table, of which a call reads some rows: counted by _pass
            self._trace[name] = self._trace.get(name, Work()) + work
            self._live[name] = Work(bytes=max(activations, self._live.get(name, Work()).bytes))
        return tree_map(lambda x: torch.empty_like(x) if isinstance(x, torch.Tensor) else x, result)

    def _measure(
        self, backend: Backend, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[str, Work, Any, float]:
        given = {id(t): t for t in _tensors((args, kwargs))}
        versions = {key: t._version for key, t in given.items()}
        with intercept(None):  # what a body calls is part of it
            result = backend.fn(*args, **kwargs)
        written = [*_tensors(result), *(t for key, t in given.items() if t._version != versions[key])]
        named = inspect.signature(backend.fn).bind(*args, **kwargs).arguments
        name, work = backend.fn.__name__.strip("_"), Work()
        for family, operations in OPERATIONS.items():
            if family in name:
                name, work = operations(name, named, result)
        moved = sum(_bytes(t) for t in (*given.values(), *written))
        weights = {id(t) for t in _tensors(named.get("weights", ()))}
        activations = sum(_bytes(t) for t in (*given.values(), *written) if id(t) not in weights)
        return name, work + Work(calls=1, bytes=moved), result, activations


def _linear(name: str, named: dict[str, Any], result: Any) -> tuple[str, Work]:
    x = named["x"]
    operations = 2.0 * x.numel() * result.shape[-1]
    unit = Work(int8=operations) if x.dtype == torch.int8 else Work(float16=operations)
    return f"{name} {x.shape[-1]} -> {result.shape[-1]}", unit


def _ssd_scan(name: str, named: dict[str, Any], result: Any) -> tuple[str, Work]:
    """C B^T and its product with x within chunks, the states of chunks, what they give to later tokens."""
    x, (groups, d_state) = named["x"], named["B"].shape[2:]
    inner, tokens = x.shape[2] * x.shape[3], x.shape[0] * x.shape[1]
    return name, Work(float16=tokens * (2.0 * CHUNK * (d_state * groups + inner) + 4.0 * d_state * inner))


def _selective_scan(name: str, named: dict[str, Any], result: Any) -> tuple[str, Work]:
    """exp(dt A) for every channel and state; softplus of dt."""
    channels, d_state = named["A"].shape
    tokens = named["x"].shape[0] * named["x"].shape[1]
    return name, Work(exponentials=float(tokens * channels * (d_state + 2)))


OPERATIONS: dict[str, Callable[[str, dict[str, Any], Any], tuple[str, Work]]] = {
    "linear": _linear,
    "ssd_scan": _ssd_scan,
    "selective_scan": _selective_scan,
}
"""Operators whose arithmetic may take longer than their bytes, by a part of their name; of the others bytes count."""


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _shapes(value: Any) -> Any:
    """What a result's shape can depend on, hashable."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype
    return tuple(_shapes(v) for v in value) if isinstance(value, tuple) else value
