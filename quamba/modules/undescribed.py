"""The linears of a model that no file describes, and how they are replaced: what is known of them is their names."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from quamba.modules.borrowed import Borrowed
from quamba.modules.host import put
from quamba.modules.linear import Linear
from quamba.recipe import LinearSpec, Recipe


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Path -> module of every nn.Linear; subclasses may use their weight in other ways, and are left alone."""
    return {path: module for path, module in model.named_modules() if type(module) is nn.Linear}


def ties(model: nn.Module) -> dict[str, str]:
    """Path of a linear -> the path of the first one with the same weight, where that is another."""
    by_weight: dict[int, str] = {}
    first = {path: by_weight.setdefault(id(linear.weight), path) for path, linear in linears(model).items()}
    return {path: lender for path, lender in first.items() if path != lender}


def blocks(model: Any) -> list[str]:
    """Paths of the layers: the members of the outermost nn.ModuleList that holds more than half of what linears hold,
    the head left out; none where there is no such list."""
    head = head_of(model)
    sizes = {path: linear.weight.numel() for path, linear in linears(model).items() if path != head}
    for path, module in model.named_modules():
        inside = sum(size for name, size in sizes.items() if name.startswith(f"{path}."))
        if isinstance(module, nn.ModuleList) and 2 * inside > sum(sizes.values()):
            return [f"{path}.{name}" for name, _ in module.named_children()]
    return []


def spec_of(path: str, recipe: Recipe, layers: list[str], head: str) -> LinearSpec:
    """How a linear is stored: its role is its own name, or "lm_head"; the layer is that of its block."""
    layer = next((i for i, block in enumerate(layers) if path.startswith(f"{block}.")), None)
    return recipe.linear("lm_head" if path == head else path.rpartition(".")[2], layer)


def head_of(model: Any) -> str:
    """The path of what turns hidden states into logits, "" where there is none."""
    head = model.get_output_embeddings()
    return next((path for path, module in model.named_modules() if head is not None and module is head), "")


def replace(
    model: Any,
    recipe: Recipe,
    kept: Collection[str],
    tied: dict[str, str],
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> dict[str, Linear]:
    """Put quamba's linears, with empty tensors, in the places of all but those that are kept; by path. tied: path ->
    the path of the linear that stands there too."""
    layers, head, made = blocks(model), head_of(model), dict[str, Linear]()
    for path, old in linears(model).items():
        if path in tied:
            continue
        spec = spec_of(path, recipe, layers, head)
        if path in kept or spec.format == "float":
            continue
        made[path] = Linear(
            old.in_features, old.out_features, bias=old.bias is not None, spec=spec, dtype=dtype, device=device
        )
        put(model, path, made[path])
    for path, lender in tied.items():
        put(model, path, Borrowed(model.get_submodule(lender)))
    return made
