"""Post-training quantisation and deployment of recurrent language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quamba.integrations import on_import

if TYPE_CHECKING:
    from quamba.budget import search
    from quamba.inspection import compare, inspect
    from quamba.loading import load
    from quamba.pipeline import quantize
    from quamba.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["Recipe", "compare", "inspect", "load", "quantize", "search"]

_HOME = {
    "Recipe": "quamba.recipe",
    "compare": "quamba.inspection",
    "inspect": "quamba.inspection",
    "load": "quamba.loading",
    "quantize": "quamba.pipeline",
    "search": "quamba.budget",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


# Importing quamba makes transformers open quantised directories. Not by importing it here, which would cost the help of
# the `quamba` command seconds, and would import torch before the command has made its settings.
on_import.install()
