"""`quamba.inspect`: what every layer and role of a model costs, how far its weights and activations lie from easy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from quamba import calibration
from quamba.errors import UserError
from quamba.inspection.activations import Spread, Survey, spread
from quamba.inspection.opened import Opened, Place, layer_of
from quamba.inspection.weights import Deviation, Originals, Rows, rounding

Progress = Callable[[str, int, int], None]
REST, EMBEDDING = "rest", "embedding"
BATCH = 2
"""Windows that run together: the float32 logits of each are held."""


@dataclass(frozen=True)
class Row:
    """One role of one layer: a linear, several of one role together (experts), "embedding", or "rest".

    layer: index of the block, None outside the blocks. stored_as: the weight format, or the type of floats.
    parameters: weights and biases that the row stands for; 0 for "rest" and for a head tied to the embedding.
    bytes: of everything stored for it in the files. bits: 8 * bytes / parameters, scales included; None without
    parameters. weight_error: ||stored - exact|| / ||exact|| against the original after the exact transforms of the
    recipe, None without an original or where that has no tensor of the name. rounding: what rounding to nearest on the
    stored grid would cost, in the same unit: root mean square of step / sqrt(12) over that of the weights; None for
    floats. input: what it reads, None where no text ran, nothing reached it, or transformers' own code reads it.
    """

    layer: int | None
    role: str
    stored_as: str
    parameters: int
    bytes: int
    bits: float | None
    weight_error: float | None
    rounding: float | None
    input: Spread | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the statistics of the input beside the others."""
        return {
            "layer": self.layer, "role": self.role, "stored_as": self.stored_as, "parameters": self.parameters,
            "bytes": self.bytes, "bits": self.bits, "weight_error": self.weight_error, "rounding": self.rounding,
            "input": None if self.input is None else _numbers(self.input),
        }  # fmt: skip


@dataclass(frozen=True)
class Rotation:
    """An activation before and after its Hadamard rotation. role: "residual", the stream as it enters the layer, or the
    role of a linear whose input is rotated."""

    layer: int
    role: str
    before: Spread
    after: Spread


@dataclass(frozen=True)
class Inspection:
    """What ``inspect`` found. tokens: how many ran. weight_error and rounding: as in a row, of all linears."""

    model: str
    original: str | None
    model_type: str
    recipe: str
    tokens: int
    rows: tuple[Row, ...]
    rotations: tuple[Rotation, ...] = field(repr=False)
    weight_error: float | None
    rounding: float | None

    @property
    def quantised(self) -> bool:
        """Whether any weight lies on a grid."""
        return any(row.rounding is not None for row in self.rows)

    @property
    def bytes(self) -> int:
        """Of all tensors in the files."""
        return sum(row.bytes for row in self.rows)

    @property
    def parameters(self) -> int:
        """Of linears and embedding; norms, convolutions and the like are left out."""
        return sum(row.parameters for row in self.rows)

    @property
    def bits(self) -> float:
        """Per parameter, over the rows that have parameters."""
        return 8 * sum(row.bytes for row in self.rows if row.parameters) / max(self.parameters, 1)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes by role, summed over layers, in the order of the model."""
        found: dict[str, int] = {}
        for row in self.rows:
            found[row.role] = found.get(row.role, 0) + row.bytes
        return found

    def as_dict(self) -> dict[str, Any]:
        """What `quamba inspect --json` writes."""
        return {
            "model": self.model, "original": self.original, "model_type": self.model_type, "recipe": self.recipe,
            "tokens": self.tokens,
            "rows": [row.as_dict() for row in self.rows],
            "totals": {
                "parameters": self.parameters, "bytes": self.bytes, "bits": self.bits,
                "weight_error": self.weight_error, "rounding": self.rounding,
            },
            "sizes": self.sizes,
            "rotations": [
                {"layer": r.layer, "role": r.role, "before": _numbers(r.before), "after": _numbers(r.after)}
                for r in self.rotations
            ],
        }  # fmt: skip


def _numbers(found: Spread) -> dict[str, float]:
    return {
        "peak": found.peak, "rms": found.rms, "outlier_ratio": found.outlier_ratio,
        "outlier_channels": found.outlier_channels,
    }  # fmt: skip


@torch.inference_mode()
def inspect(
    model: str | Path,
    original: str | Path | None = None,
    *,
    text: str | Path | None = None,
    samples: int = 8,
    seqlen: int = 512,
    seed: int = 0,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> Inspection:
    """Look into a Hub id, a directory (original or quantised) or an embedded checkpoint.

    original: the checkpoint that a quantised model was made of, for weight errors. text: as ``calibration_text`` of
    quamba.quantize; samples windows of seqlen tokens are drawn from it with the seed, 0 samples measure no activation.
    A quantised model is measured as it runs, on its quantised inputs. Raises UserError for what the user got wrong and
    for NaN or Inf in an activation.
    """
    if samples < 0 or seqlen < 1:
        raise UserError(f"samples are at least 0 and their length at least 1, got {samples} of {seqlen} tokens")
    tell = progress or (lambda phase, done, total: None)
    words = calibration.read_text(text) if samples else ""
    opened = Opened(model, device, dtype)
    if original is not None and not opened.checkpoint.quantised:
        raise UserError(f"{model} is an original checkpoint; another one can only be given beside a quantised model")
    originals = None if original is None else Originals(opened, str(original))
    survey = Survey(opened)
    if samples:
        ids = calibration.windows(words, opened.tokenizer, samples, seqlen, seed)
        survey.run(ids, BATCH, tell)
    weights = Weights(opened, originals)
    found = []
    for layer in [*range(len(opened.spec.blocks)), None]:
        tell("weights", len(opened.spec.blocks) if layer is None else layer, len(opened.spec.blocks))
        found += weights.rows(layer, survey)
    return Inspection(
        str(model), None if original is None else str(original), opened.checkpoint.config.model_type,
        opened.recipe.name, samples * seqlen, tuple(found), tuple(_rotations(opened, survey)),
        None if originals is None else weights.error.relative, weights.grid.relative if weights.grid.squares else None,
    )  # fmt: skip


def _rotations(opened: Opened, survey: Survey) -> list[Rotation]:
    groups = {(layer, "residual"): [rotated] for layer, rotated in enumerate(survey.streams)}
    for place in opened.places:
        if place.path in survey.outputs and place.layer is not None:
            groups.setdefault((place.layer, place.role), []).append(survey.outputs[place.path])
    found = []
    for (layer, role), group in groups.items():
        before, after = spread([r.before for r in group]), spread([r.after for r in group])
        if before is not None and after is not None:
            found.append(Rotation(layer, role, before, after))
    return found


class Weights:
    """Rows of the layers, read from the files; what linears have shown so far adds up in ``error`` and ``grid``."""

    def __init__(self, opened: Opened, originals: Originals | None) -> None:
        self.opened, self.originals = opened, originals
        self.sizes = opened.checkpoint.stored()
        self.error, self.grid = Deviation(), Deviation()

    def rows(self, layer: int | None, survey: Survey) -> list[Row]:
        """Of one layer, or of what stands outside the blocks: its linears by role, then the rest."""
        places = [place for place in self.opened.places if place.layer == layer]
        meant = self.originals.layer(layer) if self.originals is not None and layer is not None else {}
        found = [] if layer is not None else [self._embedding()]
        for role in dict.fromkeys(place.role for place in places):
            group = [place for place in places if place.role == role]
            found.append(self._linears(group, meant, spread([survey.linears[place.path] for place in group])))
        owned = {name for path in [p.path for p in places] + [self.opened.spec.embedding] for name in self._below(path)}
        rest = sum(
            size for name, size in self.sizes.items()
            if layer_of(name, self.opened.spec) == layer and name not in owned
        )  # fmt: skip
        return [*found, Row(layer, REST, "", 0, rest, None, None, None, None)] if rest else found

    def _linears(self, group: list[Place], meant: dict[str, torch.Tensor], seen: Spread | None) -> Row:
        size, parameters, error, grid = 0, 0, Deviation(), Deviation()
        for place in group:
            own = self._bytes(place.path)
            size += own
            if not own:  # tied to the embedding
                continue
            parameters += place.features * place.outputs + (place.outputs if place.biased else 0)
            stored = place.stored(self.opened.checkpoint)
            grid += rounding(place, stored)
            exact = self._exact(place, meant)
            if exact is not None and self.originals is not None:
                error += self.originals.deviation(place, stored, exact)
        self.error, self.grid = self.error + error, self.grid + grid
        first, on_grid = group[0], group[0].format.has_grid
        name = first.format.name if on_grid else self._type(first.path)
        return Row(
            first.layer, first.role, name if parameters else "tied", parameters, size, _bits(size, parameters),
            error.relative if error.meant else None, grid.relative if on_grid else None, seen,
        )  # fmt: skip

    def _exact(self, place: Place, meant: dict[str, torch.Tensor]) -> Rows | None:
        if place.path == self.opened.spec.head and self.originals is not None:
            return self.originals.head()
        weight = meant.get(place.weight)
        if weight is None:
            return None
        return (weight.flatten(0, -2) if place.expert is None else weight[place.expert]).__getitem__

    def _embedding(self) -> Row:
        spec = self.opened.spec
        size, parameters, error = self._bytes(spec.embedding), spec.vocab * spec.d_model, None
        if self.originals is not None:
            error = self.originals.embedding().relative
        return Row(
            None, EMBEDDING, self._type(spec.embedding), parameters, size, _bits(size, parameters), error, None, None
        )

    def _bytes(self, path: str) -> int:
        return sum(self.sizes[name] for name in self._below(path))

    def _type(self, path: str) -> str:
        """The type of the largest tensor below a path, as torch calls it."""
        own = self._below(path)
        if not own:
            return ""
        return str(self.opened.checkpoint.tensor(max(own, key=self.sizes.__getitem__)).dtype).removeprefix("torch.")

    def _below(self, path: str) -> list[str]:
        return [name for name in self.sizes if name == path or name.startswith(f"{path}.")]


def _bits(size: int, parameters: int) -> float | None:
    return 8 * size / parameters if parameters else None
