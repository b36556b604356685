"""A module that stands at several places of a model and exists once."""

from __future__ import annotations

from typing import Any

from torch import nn


class Borrowed(nn.Module):
    """Calls a module that another block holds: it has no tensors and no submodules of its own, so that they are stored,
    moved and counted once."""

    def __init__(self, lender: nn.Module) -> None:
        super().__init__()
        self._lender = [lender]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the lender gives for the same arguments."""
        return self._lender[0](*args, **kwargs)
