"""What a budget is spent on: every linear that a recipe quantises, and what it would take in each scheme."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from quamba import ends, formats, pipeline
from quamba.budget.schemes import Schemes
from quamba.checkpoint import Checkpoint
from quamba.ends import plain
from quamba.errors import UserError
from quamba.formats.format import divides, group_size
from quamba.lending import Lent
from quamba.models.spec import ModelSpec, Proj, Sublayer
from quamba.modules.embedding import Embedding
from quamba.modules.host import HostedBlock, linear_spec, mixer_class
from quamba.modules.linear import Linear
from quamba.recipe import LinearSpec, Recipe
from quamba.skeleton import Skeleton

HEAD = "lm_head"
META = torch.device("meta")


@dataclass(frozen=True)
class Option:
    """A scheme for one part: its name ("" for what the recipe says), what it lays over the recipe's spec, the spec
    that this comes to, and the bytes of everything stored but biases."""

    scheme: str
    changes: dict[str, Any]
    spec: LinearSpec
    bytes: int


@dataclass(frozen=True)
class Part:
    """One linear role of one layer (of the head, layer None): all linears of that role, all experts among them.

    base: bytes that the recipe itself would take; options: what may be chosen, in the order of the list of schemes.
    """

    layer: int | None
    role: str
    weights: int
    base: int
    options: tuple[Option, ...]


Shape = tuple[int, int, int]
"""Experts (1 where there are none), output and input features."""
Types = dict[int | None, torch.dtype]
"""By layer, and None for the head: the checkpoint's type, which biases and whatever is not quantised keep."""


def kept_types(checkpoint: Checkpoint) -> Types:
    """As the pipeline picks them: the type of a block's first tensor."""
    types: Types = {None: checkpoint.tensor(f"{checkpoint.spec.head}.weight").dtype}
    for layer, block in enumerate(checkpoint.spec.blocks):
        names = [f"{norm}.weight" for norm in block.norms]
        mixer = block.sublayers[0].mixer
        first = names[0] if names else mixer.name(mixer.params[0].path)
        types[layer] = checkpoint.tensor(f"{block.path}.{first}").dtype
    return types


def parts(model: ModelSpec, recipe: Recipe, schemes: Schemes, types: Types) -> list[Part]:
    """Every linear whose weights the recipe rounds, in the order of execution; what it keeps as floats is none."""
    made = []
    for layer, block in enumerate(model.blocks):
        roles: dict[str, tuple[LinearSpec, list[Shape]]] = {}
        for sub in block.sublayers:
            for proj in sub.mixer.projs:
                count = sub.mixer.axes[proj.stack].size if proj.stack else 1
                outputs = sum(sub.mixer.size(output.segment) for output in proj.outputs)
                _, shapes = roles.setdefault(proj.role, (_spec(recipe, sub, proj, layer), []))
                shapes.append((count, outputs, sub.mixer.size(proj.input)))
        for role, (spec, shapes) in roles.items():
            made += _part(layer, role, shapes, spec, schemes, types[layer])
    return made + _part(None, HEAD, [(1, model.vocab, model.d_model)], recipe.linear(HEAD), schemes, types[None])


def _spec(recipe: Recipe, sub: Sublayer, proj: Proj, layer: int) -> LinearSpec:
    own = mixer_class(sub.mixer) is not None
    return recipe.linear(proj.role, layer) if own else linear_spec(recipe, proj, layer)


def _part(
    layer: int | None,
    role: str,
    shapes: list[Shape],
    spec: LinearSpec,
    schemes: Schemes,
    dtype: torch.dtype,
) -> list[Part]:
    """One part, or none; shapes: of all linears of the role."""
    if not formats.get(spec.format).has_grid:
        return []
    options: dict[str, Option] = {}
    for name, (changes, offered) in schemes.offered(spec).items():
        inputs = [features for *_, features in shapes]
        if formats.get(offered.format).grouped and not divides(offered.group_size, inputs):
            sizes = {group_size(offered.group_size, features) for features in inputs}
            if len(sizes) > 1:  # no one size says what each would have
                continue
            changes = {**changes, "group_size": sizes.pop()}  # a recipe that asks for the other one is refused
            offered = offered.model_copy(update=changes)
        try:
            stored = [formats.get(offered.format).tensors(features, outs, offered) for _, outs, features in shapes]
        except UserError:  # a size that the format cannot hold
            continue
        # group sizes that do not divide the input fall back on one that does, so some schemes may be the same
        same = repr((offered.model_copy(update={"group_size": 8}), stored))
        size = sum(count * linear_bytes(features, outs, offered, dtype) for count, outs, features in shapes)
        options.setdefault(same, Option(name, changes, offered, size))
    base = sum(count * linear_bytes(features, outs, spec, dtype) for count, outs, features in shapes)
    weights = sum(map(prod, shapes))
    return [Part(layer, role, weights, base, tuple(options.values()) or (Option("", {}, spec, base),))]


def linear_bytes(features: int, outputs: int, spec: LinearSpec, dtype: torch.dtype) -> int:
    """Bytes that a linear [outputs, features] stores, its bias left out."""
    linear = Linear(features, outputs, bias=False, spec=spec, dtype=dtype, device=META)
    return sum(tensor.nbytes for tensor in linear.state_dict().values())


def model_bytes(checkpoint: Checkpoint, recipe: Recipe, types: Types) -> int:
    """Bytes of all tensors that quantising a checkpoint by a recipe writes; nothing is computed."""
    model = checkpoint.spec
    skeleton = Skeleton(checkpoint.config, model) if model.hosted else None
    norm, _ = ends.last_norm(model, recipe, checkpoint, skeleton, torch.device("cpu"))
    made: dict[str, Any] = {"dtype": types[None], "device": META}
    head = Linear(model.d_model, model.vocab, bias=False, spec=recipe.linear(HEAD), **made)
    embedding = Embedding(model.vocab, model.d_model, recipe.embedding, **made)
    modules: list[tuple[Any, torch.dtype]] = [(module, types[None]) for module in (embedding, norm, head)]
    lent = Lent()
    for layer, block in enumerate(model.blocks):
        built = pipeline.build(model, block, recipe, layer, types[layer], META, skeleton, {}, lent)
        if isinstance(built, HostedBlock):
            lent |= built.lend(model.lent(block))
        modules.append((built, types[layer]))
    return sum(
        tensor.numel() * (dtype.itemsize if plain(name, tensor) else tensor.element_size())
        for module, dtype in modules
        for name, tensor in module.state_dict().items()
    ) + sum(checkpoint.tensor(name).nbytes for name in model.params)
