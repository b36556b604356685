"""Weight formats, one file each, found by being here: what is stored for a linear, its grid, the op that runs it."""

from __future__ import annotations

from quamba.discovery import members
from quamba.errors import UserError
from quamba.formats.format import Format

FORMATS: dict[str, Format] = {made.name: made for made in members(__name__, "FORMAT")}


def get(name: str) -> Format:
    """The format of that name. Raises UserError for an unknown one, listing the known."""
    if name not in FORMATS:
        raise UserError(f"unknown linear format {name!r}; known formats are {', '.join(sorted(FORMATS))}")
    return FORMATS[name]
