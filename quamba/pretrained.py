"""What transformers makes of a directory that may come from anyone: none of its code runs, no error is a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from quamba.errors import UserError

UNREADABLE = (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError)
"""What transformers raises for a directory that is not as it expects."""


def read_config(folder: Path) -> Any:
    """The transformers config of a directory. Raises UserError when config.json is none, or names code to run."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever a config class makes of values that it does not expect
        raise UserError(f"{folder / 'config.json'} cannot be read: {sentence(error)}") from None


def sentence(error: Exception) -> str:
    """What a library's error says, in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__
