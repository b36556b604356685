"""Architectures, one file each, found by being here."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from quamba.errors import UserError
from quamba.models.spec import Architecture, ModelSpec

ARCHITECTURES: dict[str, Architecture] = {}
for _module in pkgutil.iter_modules(__path__):
    _arch = getattr(importlib.import_module(f"{__name__}.{_module.name}"), "ARCH", None)
    if _arch is not None:
        ARCHITECTURES[_arch.model_type] = _arch


def architecture(config: Any) -> Architecture:
    """The architecture of a transformers config. Raises UserError for an unknown model_type, listing the known."""
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UserError(f"model type {config.model_type!r} is not supported; known types are {known}")
    return found


def describe(config: Any) -> ModelSpec:
    """The structure of the model that a transformers config stands for. Raises UserError as ``architecture`` does, and
    for a config value that the architecture cannot represent."""
    return architecture(config).describe(config)
