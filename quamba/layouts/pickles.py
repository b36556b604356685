"""Files of torch.save, opened without running anything that they ask for, and without reading their tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from quamba.errors import UserError
from quamba.layouts.layout import Index, Stored

BUDGET, OPENINGS = 64 * 1024**2, 64
"""Bytes read from a mapped file before it is unmapped, more where a file would be opened more often than that:
opening takes a tenth of a second, and what was read counts as this process's memory for as long as it is mapped."""


class Ignored:
    """Stands in for an object of some other program, of which nothing is imported, called or kept."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def open_pickle(file: Path, allowed: Sequence[type] = (), ignored: tuple[str, ...] = ()) -> Any:
    """What the file holds; its tensors are mapped, and unmapped when the last of them is dropped.

    allowed: plain classes that may be made beside tensors; ignored: how the full names begin of those for which
    ``Ignored`` stands in. Raises UserError for a file that is no archive of torch.save, and for one that asks for
    anything else.
    """
    try:
        with safe_globals(list(allowed)):
            asked = get_unsafe_globals_in_checkpoint(file)
        refused = sorted(name for name in asked if not (ignored and name.startswith(ignored)))
        if not refused:
            with safe_globals([*allowed, *((Ignored, name) for name in asked)]):
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a broken or hostile pickle raises whatever its opcodes lead to
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{file} is no archive of torch.save (1.6 or later) that can be read: {reason}") from None
    raise UserError(f"{file} was not opened, as it asks to run {', '.join(refused)}, and only plain tensors are read")


class Mapped:
    """The state dict of a file, mapped while it is read from."""

    def __init__(self, file: Path, held: Any, reopen: Callable[[], dict[str, Any]]) -> None:
        """held: what was opened of the file; reopen: maps it anew. Raises UserError unless it holds plain tensors."""
        if not isinstance(held, dict):
            raise UserError(f"{file} should hold a dict of tensors, and holds a {type(held).__name__}")
        for name, tensor in held.items():
            if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
                raise UserError(f"{file} should hold plain tensors, and {name!r} is none")
        self.shapes = {str(name): tuple(tensor.shape) for name, tensor in held.items()}
        self.types = {str(name): tensor.dtype for name, tensor in held.items()}
        self._held: dict[str, Any] | None = held
        self._reopen = reopen
        self._budget, self._read = max(BUDGET, file.stat().st_size // OPENINGS), 0

    def tensor(self, name: str) -> torch.Tensor:
        """A copy, so that the file is unmapped when the budget is spent, whoever holds what was read."""
        if self._held is None:
            self._held = self._reopen()
        tensor: torch.Tensor = self._held[name].detach().clone()
        self._read += tensor.nbytes
        if self._read > self._budget:
            self._held, self._read = None, 0
        return tensor


def index(file: Path) -> Index:
    """The tensors of a state dict. Raises UserError as ``open_pickle`` and ``Mapped`` do."""
    mapped = Mapped(file, open_pickle(file), partial(open_pickle, file))
    return {name: Stored(shape, partial(mapped.tensor, name)) for name, shape in mapped.shapes.items()}
