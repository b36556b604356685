"""What is known because a file is there."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any


def members(package: str, attribute: str) -> Iterator[Any]:
    """What the modules of a package that is being imported have under a name, those that have it."""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        value = getattr(importlib.import_module(f"{package}.{module.name}"), attribute, None)
        if value is not None:
            yield value
