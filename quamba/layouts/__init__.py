"""Layouts of checkpoint files, one file each, found by being here."""

from __future__ import annotations

from pathlib import Path

from quamba.discovery import members
from quamba.errors import UserError
from quamba.layouts.layout import Index, Layout, Stored

__all__ = ["Index", "LAYOUTS", "Layout", "Stored", "find"]

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in members(__name__, "LAYOUT")}


def find(path: Path) -> Layout:
    """The layout of a directory. Raises UserError when it has none, listing what each would need."""
    for layout in LAYOUTS.values():
        if layout.matches(path):
            return layout
    signs = ", nor ".join(layout.sign for layout in LAYOUTS.values())
    raise UserError(f"{path} is no model directory: it holds neither {signs}")
