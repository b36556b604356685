"""Stored weights against what they stand for: the original ones after every exact transform of the recipe."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from quamba.checkpoint import Checkpoint
from quamba.errors import UserError
from quamba.inspection.opened import Opened, Place
from quamba.inspection.order import recover, value_rows
from quamba.models.spec import Sublayer
from quamba.modules.embedding import Embedding
from quamba.modules.host import folds
from quamba.modules.mixer import Mixer
from quamba.pipeline import rotated, transform
from quamba.recipe import FLOAT
from quamba.transforms import permute

SLAB = 2**22
"""Weights compared at once in fp64."""

Rows = Callable[[slice], torch.Tensor]


@dataclass
class Deviation:
    """Sums of squares over weights: of what differs, of what is meant. They add up over linears."""

    squares: float = 0.0
    meant: float = 0.0

    def __add__(self, other: Deviation) -> Deviation:
        return Deviation(self.squares + other.squares, self.meant + other.meant)

    @property
    def relative(self) -> float:
        """||stored - meant|| / ||meant||; 0 where both are zero."""
        return math.sqrt(self.squares / self.meant) if self.meant else 0.0 if not self.squares else math.inf


def rounding(place: Place, stored: dict[str, torch.Tensor]) -> Deviation:
    """What rounding to nearest alone would do on the grid that is stored: a step has a noise of step^2 / 12."""
    total = Deviation()
    for part in _slabs(place.outputs, place.features):
        tensors = {name: tensor[part] for name, tensor in stored.items()}
        noise = 0.0
        if place.format.has_grid:
            step = place.format.step(tensors).double()
            noise = float(step.square().sum()) * (place.features / step.shape[1]) / 12
        total += Deviation(noise, float(place.format.dequantize(tensors).double().square().sum()))
    return total


class Originals:
    """What the weights of a quantised model stand for, read from the checkpoint that it was made of.

    Raises UserError when that checkpoint is quantised itself or of another shape.
    """

    def __init__(self, quantised: Opened, source: str) -> None:
        self.quantised, self.checkpoint = quantised, Checkpoint(source, linears_only=not quantised.described)
        ours, theirs = quantised.spec, self.checkpoint.spec
        if self.checkpoint.quantised:
            raise UserError(f"{source} is quantised; give as original the checkpoint that the model was made of")
        if not quantised.described:  # its layers are read off the modules
            theirs = replace(theirs, blocks=ours.blocks)
        shapes = [(len(s.blocks), s.d_model, s.vocab) for s in (ours, theirs)]
        if shapes[0] != shapes[1] or self.checkpoint.config.model_type != quantised.checkpoint.config.model_type:
            said = [
                f"{config.model_type} of {layers} layers, width {width}, {vocab} tokens"
                for config, (layers, width, vocab) in zip(
                    (quantised.checkpoint.config, self.checkpoint.config), shapes, strict=True
                )
            ]
            raise UserError(f"the original should be what the model was made of, a {said[0]}; {source} is a {said[1]}")

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """Full name -> fp64 tensor of one block, in the basis and the order of the stored one."""
        block, recipe = self.quantised.spec.blocks[index], self.quantised.recipe
        if not self.quantised.described:
            names = [place.weight for place in self.quantised.places if place.layer == index]
            return {name: self.checkpoint.tensor(name).double() for name in names}
        tensors = self.checkpoint.block(block)
        found: dict[str, torch.Tensor] = {}
        for sub in block.sublayers:
            exact = self._ordered(block.path, sub, transform(tensors, sub, recipe, self.quantised.rotation))
            exact = rotated(exact, sub, recipe, index)
            found |= {f"{block.path}.{name}": tensor for name, tensor in exact.items()}
        return found

    def _ordered(self, path: str, sub: Sublayer, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        mixer = self.quantised.model.get_submodule(f"{path}.{sub.mixer.path}".rstrip("."))
        sites = mixer.sites.values() if isinstance(mixer, Mixer) else ()
        if not any(site.static and site.spec.granularity == "cluster" for site in sites):
            return tensors
        proj = next(p for p in sub.mixer.projs if value_rows(sub.mixer, p))
        name = sub.mixer.name(proj.path)
        place = next(p for p in self.quantised.places if p.path == f"{path}.{name}")
        stored = place.format.dequantize(place.stored(self.quantised.checkpoint))
        rows, heads = value_rows(sub.mixer, proj), sub.mixer.sizes["H"]
        return permute(tensors, sub, recover(stored, tensors[f"{name}.weight"], rows, heads))

    def deviation(self, place: Place, stored: dict[str, torch.Tensor], meant: Rows) -> Deviation:
        """Of a linear's stored weight from the rows [o, K] that ``meant`` gives."""
        total = Deviation()
        for part in _slabs(place.outputs, place.features):
            got = place.format.dequantize({name: tensor[part] for name, tensor in stored.items()})
            total += _between(got, meant(part))
        return total

    def head(self) -> Rows:
        """The rows of the head with the last norm folded and the stream's rotation."""
        spec = self.quantised.spec
        weight = self.checkpoint.tensor(f"{spec.head}.weight")
        gain: torch.Tensor | float = 1.0
        if self.quantised.described and folds(self.quantised.recipe, spec.final_norm_kind):
            gain = self.checkpoint.tensor(f"{spec.final_norm}.weight").double() + spec.final_gain_offset

        def rows(part: slice) -> torch.Tensor:
            return self._rotated(weight[part].double() * gain)

        return rows

    def embedding(self) -> Deviation:
        """Of the stored embedding."""
        spec = self.quantised.spec
        stored = self.quantised.recipe.embedding if self.quantised.described else FLOAT.embedding
        table = Embedding(spec.vocab, spec.d_model, stored, dtype=torch.float32)
        for name, tensor in table.state_dict().items():
            tensor.copy_(self.quantised.checkpoint.tensor(f"{spec.embedding}.{name}"))
        meant, total = self.checkpoint.tensor(f"{spec.embedding}.weight"), Deviation()
        for part in _slabs(spec.vocab, spec.d_model):
            ids = torch.arange(part.start, min(part.stop, spec.vocab))
            total += _between(table(ids), self._rotated(meant[part].double()))
        return total

    def _rotated(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self.quantised.rotation is None else self.quantised.rotation.columns(rows)


def _between(stored: torch.Tensor, meant: torch.Tensor) -> Deviation:
    return Deviation(float((stored.double() - meant).square().sum()), float(meant.square().sum()))


def _slabs(outputs: int, features: int) -> list[slice]:
    rows = max(1, SLAB // features)
    return [slice(start, start + rows) for start in range(0, outputs, rows)]
