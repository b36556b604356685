"""A model opened to be looked at: its checkpoint, its recipe, its rotation, and where its linears stand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from quamba import formats
from quamba.checkpoint import Checkpoint
from quamba.errors import UserError
from quamba.formats.format import Format
from quamba.integrations import transformers as integration
from quamba.loading import load
from quamba.models.spec import BlockSpec, MixerSpec, ModelSpec, Proj
from quamba.modules.experts import Experts
from quamba.modules.host import turns_values
from quamba.modules.linear import Linear
from quamba.modules.undescribed import blocks
from quamba.recipe import FLOAT, Recipe, parse_recipe
from quamba.transforms import residual_rotation, residual_rotation_obstacle
from quamba.transforms.rotate import ResidualRotation


@dataclass(frozen=True)
class Place:
    """Where a linear stands.

    layer: index of its block, None for the head; path: its full name in the model; weight: that of the weight in an
    original checkpoint, expert: its index there where the weight is a stack. module: None for a stack of floats, which
    transformers' own code reads. mixer: set where a recipe may rotate what it reads while it runs.
    """

    layer: int | None
    role: str
    path: str
    module: nn.Module | None
    outputs: int
    features: int
    biased: bool
    weight: str
    expert: int | None = None
    mixer: MixerSpec | None = None

    @property
    def format(self) -> Format:
        """How its weight is stored."""
        return self.module.format if isinstance(self.module, Linear) else formats.get("float")

    def stored(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        """The tensors of its format as they lie in the files; a stack as one weight [experts * O, K]."""
        if self.module is None:
            return {"weight": checkpoint.tensor(self.path).flatten(0, -2)}
        names = self.module.names if isinstance(self.module, Linear) else ("weight",)
        return {name: checkpoint.tensor(f"{self.path}.{name}") for name in names}


class Opened:
    """A checkpoint, original or quantised, and the model that runs it.

    recipe: the one that a quantised directory holds; FLOAT for an original. rotation: of the residual stream, None
    where it is not rotated. Of a type that no file describes the blocks are the layers that its modules show. Raises
    UserError for what cannot be opened, and for a directory that another tool quantised.
    """

    def __init__(self, source: str | Path, device: str, dtype: torch.dtype) -> None:
        self.checkpoint = Checkpoint(source, linears_only=None)
        self.spec, self.described = self.checkpoint.spec, self.checkpoint.described
        self.recipe = _recipe_of(self.checkpoint)
        turned, seed = self.recipe.rotate.residual, self.recipe.rotate.seed
        self.rotation: ResidualRotation | None = None
        if turned and self.described and residual_rotation_obstacle(self.spec) is None:
            self.rotation = residual_rotation(self.spec.d_model, seed)
        self.model, self.tokenizer = load(source, device=device, dtype=dtype)
        if not self.described:
            with torch.device("meta"):
                floats: Any = AutoModelForCausalLM.from_config(self.checkpoint.config)
            self.spec = replace(self.spec, blocks=tuple(BlockSpec(path, (), hosted=True) for path in blocks(floats)))
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
    """Every linear in the order of execution; one that the description does not name has the role of its last name."""
    known = {spec.head}
    for layer, block in enumerate(spec.blocks):
        for sub in block.sublayers:
            for proj in sub.mixer.projs:
                for place in _of_projection(model, block, sub.mixer, proj, layer):
                    known.add(place.path)
                    yield place
    for path, module in model.named_modules():
        own = isinstance(module, Linear)
        if path not in known and (own or isinstance(module, nn.Linear)):
            outputs, features = (module.outputs, module.features) if own else (module.out_features, module.in_features)
            role, biased = path.rpartition(".")[2], module.bias is not None
            yield Place(layer_of(path, spec), role, path, module, outputs, features, biased, f"{path}.weight")
    if spec.head:
        head = model.get_submodule(spec.head)
        biased = getattr(head, "bias", None) is not None
        yield Place(None, "lm_head", spec.head, head, spec.vocab, spec.d_model, biased, f"{spec.head}.weight")


def _of_projection(model: Any, block: BlockSpec, mixer: MixerSpec, proj: Proj, layer: int) -> Iterator[Place]:
    """One place, or one for each expert whose linear is quamba's."""
    path, weight = (f"{block.path}.{mixer.name(name)}" for name in (proj.path, proj.weight))
    outputs, features = sum(mixer.size(output.segment) for output in proj.outputs), mixer.size(proj.input)
    turned = mixer if proj is mixer.out_proj and not turns_values(mixer) else None
    if proj.stack is None:
        module = model.get_submodule(path)
        yield Place(layer, proj.role, path, module, outputs, features, proj.bias, weight, mixer=turned)
        return
    owner = path.rpartition(".")[0]
    experts = model.get_submodule(owner)
    if not isinstance(experts, Experts):
        yield Place(layer, proj.role, path, None, outputs * mixer.axes[proj.stack].size, features, False, weight)
        return
    for i, linear in enumerate(experts.linears(proj.role)):
        name = f"{owner}.{proj.role}.{i}"
        yield Place(layer, proj.role, name, linear, outputs, features, False, weight, expert=i, mixer=turned)
