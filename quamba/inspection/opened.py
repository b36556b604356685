"""A model opened to be looked at: its checkpoint, its recipe, its rotation, and where its linears stand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quamba.checkpoint import Checkpoint
from quamba.errors import UserError
from quamba.integrations import transformers as integration
from quamba.loading import load
from quamba.models.spec import ModelSpec
from quamba.modules.linear import Linear
from quamba.recipe import FLOAT, Recipe, parse_recipe
from quamba.transforms.rotate import ResidualRotation, residual_rotation


@dataclass(frozen=True)
class Place:
    """Where a linear stands. layer: index of its block, None for the head; path: its full name in the model."""

    layer: int | None
    role: str
    path: str
    linear: Linear


class Opened:
    """A checkpoint, original or quantised, and the model that runs it.

    recipe: the one that a quantised directory holds; FLOAT for an original. rotation: of the residual stream, None
    where it is not rotated. Raises UserError for what cannot be opened, and for a directory that another tool
    quantised.
    """

    def __init__(self, source: str | Path, device: str, dtype: torch.dtype) -> None:
        self.checkpoint = Checkpoint(source)
        self.spec = self.checkpoint.spec
        self.recipe = _recipe_of(self.checkpoint)
        seed = self.recipe.rotate.seed
        self.rotation: ResidualRotation | None = (
            residual_rotation(self.spec.d_model, seed) if self.recipe.rotate.residual else None
        )
        self.model, self.tokenizer = load(source, device=device, dtype=dtype)
        self.places = list(_places(self.model, self.spec))

    def windows(self, ids: torch.Tensor, batch: int) -> Iterator[torch.Tensor]:
        """ids int64 [windows, T] in batches on the model's device."""
        for part in ids.split(batch):
            yield part.to(self.model.device)

    def upright(self, hidden: torch.Tensor) -> torch.Tensor:
        """A residual stream [..., D] in the basis of the original checkpoint; fp64."""
        return hidden.double() if self.rotation is None else self.rotation.undo(hidden)


def _recipe_of(checkpoint: Checkpoint) -> Recipe:
    if not checkpoint.quantised:
        return FLOAT
    config: dict[str, Any] = checkpoint.config.quantization_config
    method = config.get("quant_method")
    if method != integration.NAME:
        raise UserError(f"{checkpoint.path} was quantised by {method!r}; give an original or one that quamba wrote")
    return parse_recipe(config.get("recipe"), f"in {checkpoint.path}/config.json")


def layer_of(path: str, spec: ModelSpec) -> int | None:
    """Index of the block that a module or tensor belongs to, None outside the blocks."""
    return next((i for i, block in enumerate(spec.blocks) if path.startswith(f"{block.path}.")), None)


def _places(model: Any, spec: ModelSpec) -> Iterator[Place]:
    """Every linear in the order of the model; one that the description does not name has the role of its last name."""
    roles = {
        f"{block.path}.{sub.mixer.path}.{proj.path}": proj.role
        for block in spec.blocks
        for sub in block.sublayers
        for proj in sub.mixer.projs
    }
    roles[spec.head] = "lm_head"
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            yield Place(layer_of(path, spec), roles.get(path, path.rpartition(".")[2]), path, module)
