"""What is measured: a checkpoint, or a published size with drawn weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from quamba.errors import UserError
from quamba.recipe import FLOAT, Recipe, load_recipe, parse_recipe


@dataclass(frozen=True)
class Source:
    """name: of the checkpoint or the size; config: transformers', without quantisation; path: of real weights, None
    for a published size; recipe: of a quantised checkpoint, else None."""

    name: str
    config: Any
    path: Path | None = None
    recipe: Recipe | None = None


@cache
def shapes() -> dict[str, dict[str, Any]]:
    """Name -> source, model_type and config of the published sizes."""
    text = (resources.files(__package__) / "shapes.yaml").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = yaml.safe_load(text)["shapes"]
    return found


def from_shape(name: str) -> Source:
    """A published size. Raises UserError for an unknown one, listing the known."""
    from transformers import AutoConfig

    if name not in shapes():
        raise UserError(f"There is no shape '{name}'; known are {', '.join(shapes())}.")
    entry = shapes()[name]
    return Source(name, AutoConfig.for_model(entry["model_type"], **entry["config"]))


def from_model(model: str | Path) -> Source:
    """A Hub id, a directory, original or quantised, or an embedded checkpoint. Raises UserError for what is none."""
    from quamba.checkpoint import Checkpoint

    checkpoint = Checkpoint(model)
    config, stored = checkpoint.config, getattr(checkpoint.config, "quantization_config", None)
    recipe = None
    if stored is not None:
        plain = stored if isinstance(stored, dict) else stored.to_dict()
        recipe = parse_recipe(plain["recipe"], f"{checkpoint.path}/config.json")
        del config.quantization_config
    return Source(Path(str(model)).name, config, checkpoint.path, recipe)


def recipes(names: list[str], source: Source) -> list[Recipe]:
    """The recipes that those names mean, as they are for the source's width: stock ones, YAML files, or "float".
    Without names: the source's own, floats for an original, every stock recipe for a published size.

    Raises UserError as load_recipe does, and for names beside a quantised checkpoint.
    """
    from quamba.models import describe, fit_recipe

    if source.recipe is not None:
        if names:
            raise UserError(f"{source.name} is quantised and brings its recipe; leave --recipe out.")
        return [source.recipe]
    if not names:
        names = [FLOAT.name] if source.path is not None else ["w8a8", "w4a8", "w4a16"]
    chosen = [FLOAT if name in (FLOAT.name, "fp16") else load_recipe(name) for name in names]
    return [fit_recipe(recipe, describe(source.config)) for recipe in chosen]
