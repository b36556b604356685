"""Architectures, one file each, found by being here."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from quamba.errors import UserError
from quamba.models.spec import Architecture, ModelSpec
from quamba.recipe import Recipe

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


def roles() -> tuple[set[str], set[str]]:
    """Names that a recipe may use: linear roles and activation roles of all architectures."""
    from transformers import AutoConfig

    linears, activations = {"default", "lm_head"}, {"default", "conv_input", "gate"}
    for arch in ARCHITECTURES.values():
        for block in arch.describe(AutoConfig.for_model(arch.model_type, **arch.tiny[0])).blocks:
            for sub in block.sublayers:
                linears |= {proj.role for proj in sub.mixer.projs}
                activations |= {i.role for i in sub.mixer.inputs if i.semantics != "rate"}
    return linears, activations


def check_recipe(recipe: Recipe, model: ModelSpec) -> None:
    """Raises UserError for a role that no architecture has, and for a layer override that covers no layer."""
    known = dict(zip(("linears", "activations"), roles(), strict=True))
    for where in (recipe, *recipe.layers):
        for field, names in known.items():
            for role in getattr(where, field):
                if role not in names:
                    raise UserError(f"recipe {recipe.name}: unknown role {role!r} in {field}; known: {sorted(names)}")
    count = len(model.blocks)
    for override in recipe.layers:
        if not any(override.covers(layer) for layer in range(count)):
            raise UserError(f"recipe {recipe.name}: layers {override.match!r} covers none of the {count} layers")
