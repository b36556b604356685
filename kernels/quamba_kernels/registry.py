"""One op, one signature, many backends. The torch body is the definition.

A backend is a file in ``backends/`` found by its name. For each op it serves it registers a function of the same
signature and a ``why_not`` that says in a sentence why it cannot serve a setting. Modules bind once, when they are
built: ``ops.linear_w8a8.bind(setting)``.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

OPS: dict[str, Op] = {}

ENVIRONMENT = "QUAMBA_BACKEND"


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot serve the setting."""


@dataclass(frozen=True)
class Setting:
    """Where an op will run: what a backend may look at before it accepts.

    device: "cpu" or "cuda"; dtype: the 16/32-bit type of activations; shape: named sizes of the op (for a linear
    ``K`` in features, ``O`` out features, ``S`` group size).
    """

    device: str
    dtype: torch.dtype = torch.float32
    shape: dict[str, int] = field(default_factory=dict)


def identity(weights: tuple[Any, ...]) -> tuple[Any, ...]:
    """Keep the canonical layout of the weights."""
    return weights


def _nothing_ahead(weights: tuple[torch.Tensor, ...], rows: int) -> AbstractContextManager[None]:
    return nullcontext()


def _always(setting: Setting) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of one op; ``unpack(prepack(w)) == w`` for the weights of a linear, or the blocks of a stack.

    ``ahead(weights, rows)`` surrounds what runs before a linear of so many rows, and the linear: inside, other ops of
    the backend may make ready what the linear would begin with.
    """

    name: str
    fn: Callable[..., Any]
    why_not: Callable[[Setting], str | None] = _always
    rank: int = 50
    prepack: Callable[[tuple[Any, ...]], tuple[Any, ...]] = identity
    unpack: Callable[[tuple[Any, ...]], tuple[Any, ...]] = identity
    ahead: Callable[[tuple[torch.Tensor, ...], int], AbstractContextManager[None]] = _nothing_ahead

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _handler is not None:
            return _handler(self, args, kwargs)
        return self.fn(*args, **kwargs)


Handler = Callable[[Backend, tuple[Any, ...], dict[str, Any]], Any]

_handler: Handler | None = None


@contextmanager
def intercept(handler: Handler | None) -> Iterator[None]:
    """Inside, every call of a bound operator goes to ``handler(backend, args, kwargs)``, whose result it returns; with
    None calls run again. For counting what a model does without running it; not for threads."""
    global _handler
    before, _handler = _handler, handler
    try:
        yield
    finally:
        _handler = before


@dataclass
class Op:
    """An operation: its torch body and the backends that may replace it, lowest rank first, torch last."""

    reference: Callable[..., Any]
    backends: list[Backend] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.reference.__name__

    def backend(self, name: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: register an implementation.

        Raises TypeError when its parameters differ from the torch body's, ValueError when the name is taken.
        """

        def register(fn: Callable[..., Any]) -> Callable[..., Any]:
            want, got = inspect.signature(self.reference), inspect.signature(fn)
            if list(want.parameters) != list(got.parameters):
                raise TypeError(f"{self.name}/{name}: parameters {got} differ from the torch body's {want}")
            if name == "torch" or any(b.name == name for b in self.backends):
                raise ValueError(f"{self.name}/{name} is registered twice")
            self.backends = sorted([*self.backends, Backend(name, fn, **options)], key=lambda b: b.rank)
            return fn

        return register

    @property
    def candidates(self) -> list[Backend]:
        """All implementations in order of preference; the torch body is the last."""
        return [*self.backends, Backend("torch", self.reference, rank=1000)]

    def explain(self, setting: Setting) -> dict[str, str | None]:
        """Backend name -> the reason it is passed over (None: usable), in order of preference."""
        return {b.name: b.why_not(setting) for b in self.candidates}

    def bind(self, setting: Setting) -> Backend:
        """The implementation for this setting: the first usable one, or the one forced by ``QUAMBA_BACKEND``.

        ``QUAMBA_BACKEND=torch`` forces every op, ``QUAMBA_BACKEND=linear_w8a8=cpu,ssd_scan=torch`` single ones.
        Raises BackendUnavailable when a forced backend cannot serve the setting.
        """
        reasons = self.explain(setting)
        usable = [name for name, reason in reasons.items() if reason is None]
        chosen = forced_backend(self.name) or usable[0]
        if chosen not in usable:
            reason = reasons.get(chosen, f"{self.name} has no such backend")
            raise BackendUnavailable(
                f"{self.name}: {ENVIRONMENT} asks for {chosen!r}, but {reason}. Usable here: {', '.join(usable)}"
            )
        return next(b for b in self.candidates if b.name == chosen)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the torch body."""
        return self.reference(*args, **kwargs)


def forced_backend(op_name: str) -> str | None:
    """The backend that the environment asks for, for one op.

    Raises BackendUnavailable when the variable cannot be read or names an op that does not exist.
    """
    text = os.environ.get(ENVIRONMENT, "").strip()
    if not text or "=" not in text:
        return text or None
    parts = [part.strip().partition("=") for part in text.split(",")]
    if not all(name and sign and backend for name, sign, backend in parts):
        raise BackendUnavailable(f"{ENVIRONMENT}={text!r} is neither a backend nor a list op=backend,op=backend")
    wanted = {name: backend for name, _, backend in parts}
    unknown = sorted(set(wanted) - set(OPS))
    if unknown:
        raise BackendUnavailable(f"{ENVIRONMENT} names unknown ops {unknown}; known are {', '.join(sorted(OPS))}")
    return wanted.get(op_name)


def op(reference: Callable[..., Any]) -> Op:
    """Decorator: make a torch function the definition of an op."""
    return OPS.setdefault(reference.__name__, Op(reference))


def doctor(dtype: torch.dtype = torch.bfloat16) -> list[dict[str, Any]]:
    """Every op on every device present: which backend serves it, and why each other one does not."""
    rows = []
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        setting = Setting(device, dtype)
        for name, entry in sorted(OPS.items()):
            reasons = entry.explain(setting)
            chosen = next(n for n, reason in reasons.items() if reason is None)
            rows += [
                {"op": name, "device": device, "backend": backend, "usable": reason is None, "reason": reason,
                 "chosen": backend == chosen}
                for backend, reason in reasons.items()
            ]
    return rows
