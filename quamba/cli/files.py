"""Results that a command writes beside what it prints."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from quamba.errors import UserError
from quamba.staging import publish


def check_place(path: Path | None) -> None:
    """Raise UserError unless a file can come to lie there; asked before minutes of work are spent on it."""
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise UserError(f"'{path}' cannot be written: there is no directory '{path.parent}'.")
    if path.is_dir():
        raise UserError(f"'{path}' cannot be written: it is a directory.")


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Write plain data as indented JSON, which has no infinity and no NaN: they become null. Errors as in ``write``."""
    write(path, (json.dumps(_finite(results), indent=2, allow_nan=False) + "\n").encode())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(path: Path, content: bytes) -> None:
    """Write a file at once: a reader sees the old one or the whole new one.

    Raises UserError if the directory takes no file.
    """
    try:
        handle, partial = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UserError(f"'{path}' cannot be written: {error.strerror}.") from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        publish(Path(partial))
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
