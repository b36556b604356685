"""Int4 weights of two levels that a kernel writes out as int8 beside its own work, for a linear over many rows.

A linear announces, by ``ahead``, that it is going to need its weight so; the next kernel that has room takes it along.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from quamba_kernels.cuda.arguments import Arguments, fields
from quamba_kernels.ops.linear import NIBBLES


class QuambaExpansion(Arguments):
    """The struct of csrc/expansion.h; all zeros where there is nothing to expand."""

    _fields_ = fields("w multiplier y", "", "O K S")


class Announced:
    """A weight w int32 [O, K/8] with its multipliers int8 [O, K/S]; ``codes`` int8 [O, K] once a kernel writes them."""

    def __init__(self, w: Tensor, w_multiplier: Tensor) -> None:
        self.w, self.w_multiplier = w, w_multiplier
        self.codes: Tensor | None = None

    def taken(self) -> QuambaExpansion:
        """What the kernel that takes it along is given."""
        O, K = self.w.shape[0], self.w.shape[1] * NIBBLES
        self.codes = torch.empty(O, K, dtype=torch.int8, device=self.w.device)
        a = QuambaExpansion(O=O, K=K, S=K // self.w_multiplier.shape[1])
        a.w, a.multiplier, a.y = self.w.data_ptr(), self.w_multiplier.data_ptr(), self.codes.data_ptr()
        return a


_ANNOUNCED: ContextVar[Announced | None] = ContextVar("announced", default=None)


@contextmanager
def ahead(w: Tensor, w_multiplier: Tensor) -> Iterator[None]:
    """Inside, kernels of this thread may expand the weight, and ``expanded`` has it once one did."""
    before = _ANNOUNCED.set(Announced(w, w_multiplier))
    try:
        yield
    finally:
        _ANNOUNCED.reset(before)


def waiting(device: torch.device) -> QuambaExpansion:
    """What the kernel launched next on a device takes along: what is announced there and not yet taken, if anything."""
    found = _ANNOUNCED.get()
    if found is None or found.codes is not None or found.w.device != device:
        return QuambaExpansion()
    return found.taken()


def expanded(w: Tensor) -> Tensor | None:
    """The codes int8 [O, K] of a weight that some kernel took along."""
    found = _ANNOUNCED.get()
    return found.codes if found is not None and found.w.data_ptr() == w.data_ptr() else None
