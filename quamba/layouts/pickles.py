"""Files of torch.save, opened without running anything that they ask for, and without reading their tensors."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quamba.errors import UserError
from quamba.layouts.layout import Index, Stored


class Ignored:
    """Stands in for an object of some other program, of which nothing is imported, called or kept."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def open_pickle(file: Path, allowed: Sequence[type] = (), ignored: tuple[str, ...] = ()) -> Any:
    """What the file holds; its tensors are mapped, and unmapped when the last of them is dropped.

    allowed: plain classes that may be made beside tensors; ignored: how the full names begin of those for which
    ``Ignored`` stands in. Raises UserError for a file that is no archive of torch.save, and for one that wants
    anything else to run.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file) if ignored else []
        inert = [(Ignored, name) for name in names if name.startswith(ignored)]
        with torch.serialization.safe_globals([*allowed, *inert]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{file} was not opened: {_wanted(file, error)}, and only plain tensors are read") from None
    except Exception as error:  # a broken or hostile pickle raises whatever its opcodes lead to
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{file} is no archive of torch.save that can be read: {reason}") from None


def _wanted(file: Path, error: Exception) -> str:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # the scan meets the same broken pickle
        names = []
    return f"it asks to run {', '.join(names)}" if names else f"its pickle is refused ({str(error).splitlines()[0]})"


def index(file: Path) -> Index:
    """The tensors of a state dict. Raises UserError as open_pickle does, and when the file holds none."""
    held = open_pickle(file)
    if not isinstance(held, dict):
        raise UserError(f"{file} should hold a dict of tensors, and holds a {type(held).__name__}")
    for name, tensor in held.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise UserError(f"{file} should hold plain tensors, and {name!r} is none")
    return {str(name): Stored(tuple(tensor.shape), partial(_read, file, name)) for name, tensor in held.items()}


def _read(file: Path, name: str) -> torch.Tensor:
    tensor: torch.Tensor = open_pickle(file)[name]
    return tensor.detach()
