"""Weight formats, one file each, found by being here: what is stored for a linear, its grid, the op that runs it."""

from __future__ import annotations

import importlib
import pkgutil

from quamba.errors import UserError
from quamba.formats.format import Format

FORMATS: dict[str, Format] = {}
for _module in pkgutil.iter_modules(__path__):
    _format = getattr(importlib.import_module(f"{__name__}.{_module.name}"), "FORMAT", None)
    if _format is not None:
        FORMATS[_format.name] = _format


def get(name: str) -> Format:
    """The format of that name. Raises UserError for an unknown one, listing the known."""
    if name not in FORMATS:
        raise UserError(f"unknown linear format {name!r}; known formats are {', '.join(sorted(FORMATS))}")
    return FORMATS[name]
