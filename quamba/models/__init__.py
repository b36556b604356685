"""Architectures, one file each, found by being here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from quamba import formats
from quamba.discovery import members
from quamba.errors import UserError
from quamba.formats.format import divides
from quamba.models.spec import Architecture, Axis, ModelSpec
from quamba.pretrained import UNREADABLE, sentence
from quamba.recipe import Recipe

ARCHITECTURES: dict[str, Architecture] = {arch.model_type: arch for arch in members(__name__, "ARCH")}


def architecture(config: Any) -> Architecture:
    """The architecture of a transformers config. Raises UserError for an unknown model_type, listing the known."""
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UserError(
            f"model type {config.model_type!r} is not supported; known types are {known}; "
            "of others the linears alone can be quantised (quamba quantize --linears-only)"
        )
    return found


def undescribed(config: Any) -> Architecture:
    """The architecture of a config that no file describes: all that is known is where its tokens enter and leave.

    Raises UserError where transformers makes no language model of it.
    """

    def outline(config: Any) -> ModelSpec:
        from transformers import AutoModelForCausalLM

        try:
            with torch.device("meta"):
                model: Any = AutoModelForCausalLM.from_config(config)
            table, head = model.get_input_embeddings(), model.get_output_embeddings()
            names = {id(module): path for path, module in model.named_modules()}
            vocab, width = table.weight.shape
        except UNREADABLE as error:
            raise UserError(f"transformers makes no language model of it: {sentence(error)}") from error
        return ModelSpec(width, vocab, 0.0, names[id(table)], (), "", names.get(id(head), ""))

    return Architecture(config.model_type, outline, ())


def describe(config: Any) -> ModelSpec:
    """The structure of the model that a transformers config stands for. Raises UserError as ``architecture`` does, and
    for a config value that the architecture cannot represent."""
    arch = architecture(config)
    try:
        model = arch.describe(config)
    except (TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise UserError(f"{arch.model_type} config has a value that is not understood: {error}") from None
    if not model.blocks:
        raise UserError(f"{arch.model_type} config has no layers")
    for mixer in {id(sub.mixer): sub.mixer for block in model.blocks for sub in block.sublayers}.values():
        _check_axes(arch.model_type, mixer.axes)
    return model


def _check_axes(name: str, axes: dict[str, Axis]) -> None:
    for axis in axes.values():
        if not isinstance(axis.size, int) or axis.size < 1:
            raise UserError(f"{name} config gives the axis {axis.name!r} a size of {axis.size!r}; expected 1 or more")
    for axis in axes.values():
        among = 1 if axis.share is None else axes[axis.share].size
        if axis.size % among:
            raise UserError(f"{name} config divides {axis.size} {axis.name}s among {among} {axis.share}s, unevenly")


def every() -> Iterator[ModelSpec]:
    """A small model of each architecture."""
    from transformers import AutoConfig

    for arch in ARCHITECTURES.values():
        yield arch.describe(AutoConfig.for_model(arch.model_type, **arch.tiny[0]))


def roles(models: Iterable[ModelSpec]) -> dict[str, set[str]]:
    """Names that a recipe for these models may use: linear roles and activation roles, by the recipe's fields."""
    linears, activations = {"default", "lm_head"}, {"default", "conv_input", "gate"}
    for sub in (sub for model in models for block in model.blocks for sub in block.sublayers):
        linears |= {proj.role for proj in sub.mixer.projs}
        activations |= {i.role for i in sub.mixer.inputs if i.semantics != "rate"}
    return {"linears": linears, "activations": activations}


def fit_recipe(recipe: Recipe, model: ModelSpec) -> Recipe:
    """The recipe as it is for a model of that width.

    Raises UserError for a role that no architecture has (it lists those of the model), a layer override that covers
    no layer, and a group size that divides no linear it is meant for.
    """
    known, own = roles(every()), roles([model])
    for where in recipe.everywhere:
        for field, names in known.items():
            for role in getattr(where, field):
                if role not in names:
                    here = sorted(own[field])
                    raise UserError(f"recipe {recipe.name}: unknown role {role!r} in {field}; this model has {here}")
    count = len(model.blocks)
    for override in recipe.layers:
        if not any(override.covers(layer) for layer in range(count)):
            raise UserError(f"recipe {recipe.name}: layers {override.match!r} covers none of the {count} layers")
    recipe = recipe.for_width(model.d_model)
    asked: dict[int, set[int]] = {}
    for layer, block in enumerate(model.blocks):
        for sub in block.sublayers:
            for proj in sub.mixer.projs:
                spec = recipe.linear(proj.role, layer)
                if formats.get(spec.format).grouped:
                    asked.setdefault(spec.group_size, set()).add(sub.mixer.size(proj.input))
    for size, sizes in asked.items():
        if not divides(size, sizes):
            raise UserError(f"recipe {recipe.name}: group_size {size} divides none of the input sizes {sorted(sizes)}")
    return recipe
