"""Post-training quantisation and deployment of recurrent language models."""

import sys
from importlib import import_module
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quamba.loading import load
    from quamba.pipeline import quantize
    from quamba.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["Recipe", "load", "quantize"]

_HOME = {"Recipe": "quamba.recipe", "load": "quamba.loading", "quantize": "quamba.pipeline"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


# Importing quamba makes transformers open quantised directories. The `quamba` command does that when it needs to:
# its help should not wait seconds for torch, and some settings of torch have to be made before it is imported.
if PurePath(sys.argv[0] if getattr(sys, "argv", None) else "").stem != "quamba":
    import_module("quamba.integrations.transformers").register()
