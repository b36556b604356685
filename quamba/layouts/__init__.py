"""Layouts of checkpoint files, one file each, found by being here."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from quamba.errors import UserError
from quamba.layouts.layout import Index, Layout, Stored

__all__ = ["Index", "LAYOUTS", "Layout", "Stored", "find"]

LAYOUTS: dict[str, Layout] = {}
for _module in pkgutil.iter_modules(__path__):
    _layout = getattr(importlib.import_module(f"{__name__}.{_module.name}"), "LAYOUT", None)
    if _layout is not None:
        LAYOUTS[_layout.name] = _layout


def find(path: Path) -> Layout:
    """The layout of a directory. Raises UserError when it has none, listing what each would need."""
    for layout in LAYOUTS.values():
        if layout.matches(path):
            return layout
    signs = ", nor ".join(layout.sign for layout in LAYOUTS.values())
    raise UserError(f"{path} is no model directory: it holds neither {signs}")
