"""From a budget to a recipe: parts, losses, the best assignment, and the recipe that says it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quamba import calibration
from quamba.budget.allocate import allocate
from quamba.budget.amount import Budget, parse
from quamba.budget.measure import Losses, Measurement
from quamba.budget.parts import Option, Part, kept_types, model_bytes, parts
from quamba.budget.schemes import DEFAULT, Schemes, load_schemes
from quamba.checkpoint import Checkpoint
from quamba.errors import UserError
from quamba.loading import pick_device
from quamba.models import fit_recipe
from quamba.recipe import Recipe, laid_over, load_recipe, parse_recipe

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Found:
    """recipe: what quantising by gives the size; choice: for each part the option taken.

    linears, fixed: bytes of the parts, and of everything else that will be stored; losses: nats per token of every
    option of every part alone, by layer and role.
    """

    recipe: Recipe
    parts: tuple[Part, ...]
    choice: tuple[Option, ...]
    losses: Losses
    linears: int
    fixed: int

    @property
    def bits(self) -> float:
        """Bits per weight of the parts."""
        return 8 * self.linears / sum(part.weights for part in self.parts)

    @property
    def schemes(self) -> list[str]:
        """Names of the schemes that were offered, in the order of their list."""
        return list(dict.fromkeys(option.scheme for part in self.parts for option in part.options))

    @property
    def expected(self) -> float:
        """Sum of the losses of what was taken, in nats per token."""
        return sum(
            self.losses[part.layer, part.role][part.options.index(option)]
            for part, option in zip(self.parts, self.choice, strict=True)
        )


@torch.inference_mode()
def search(
    source: str | Path,
    recipe: str | Path | Recipe,
    budget: str,
    *,
    schemes: str | Path | Schemes = DEFAULT,
    tokenizer: str | Path | None = None,
    calibration_text: str | Path | None = None,
    samples: int | None = None,
    seqlen: int | None = None,
    seed: int = 0,
    device: str = "auto",
    progress: Progress | None = None,
) -> Found:
    """The recipe of least loss among those that give every linear of ``recipe`` one of the schemes, within a budget.

    budget: "4.5" (bits per weight of the linears that the recipe quantises) or "30MB" (all tensors of the model).
    Everything else is as quamba.quantize takes it. Losses are assumed to add up. Raises UserError for what the user
    got wrong, among it a budget that is less than the smallest schemes need or more than the largest can use.
    """
    amount, tell = parse(budget), progress or (lambda phase, done, total: None)
    recipe, checkpoint, where = load_recipe(recipe), Checkpoint(source, tokenizer), pick_device(device)
    offered = load_schemes(schemes)
    if checkpoint.quantised:
        raise UserError(f"{checkpoint.path} is quantised already; give the original checkpoint")
    recipe = fit_recipe(recipe, checkpoint.spec)
    checkpoint.check()
    types = kept_types(checkpoint)
    found = parts(checkpoint.spec, recipe, offered, types)
    if not found:
        raise UserError(f"recipe {recipe.name} quantises no linear of {checkpoint.path}, so there is nothing to choose")
    fixed = model_bytes(checkpoint, recipe, types) - sum(part.base for part in found)
    room = check(amount, found, fixed)
    tokens = calibration.windows(
        calibration.read_text(calibration_text), checkpoint.tokenizer(), samples or recipe.calibration.samples,
        seqlen or recipe.calibration.seqlen, seed, checkpoint.spec,
    )  # fmt: skip
    measurement = Measurement(
        checkpoint, recipe, found, tokens, offered.samples, where, lambda done, total: tell("search", done, total)
    )
    return choose(recipe, amount, found, measurement.run(), room, fixed)


def check(budget: Budget, found: Sequence[Part], fixed: int) -> int:
    """The bytes that the parts may take. Raises UserError for a budget that no assignment, or every one, fits."""
    weights = sum(part.weights for part in found)
    least, most = (sum(pick(option.bytes for option in part.options) for part in found) for pick in (min, max))
    room = budget.for_linears(weights, fixed)
    if room < least:
        enough = budget.told(least, weights, fixed, math.ceil)
        raise UserError(
            f"budget {budget.text} is less than the smallest schemes need; give {enough} or more, "
            "or schemes that take less"
        )
    if room > most:
        largest = budget.told(most, weights, fixed, math.floor)
        hint = "; bytes need a unit, as in 30MB" if budget.unit is None and budget.amount > 1000 else ""
        raise UserError(f"budget {budget.text} is more than the largest schemes can use, {largest}{hint}")
    return room


def choose(recipe: Recipe, budget: Budget, found: Sequence[Part], losses: Losses, room: int, fixed: int) -> Found:
    """The best assignment within so many bytes, as a recipe."""
    table = [
        [(option.bytes, loss) for option, loss in zip(part.options, losses[part.layer, part.role], strict=True)]
        for part in found
    ]
    choice = tuple(part.options[at] for part, at in zip(found, allocate(table, room), strict=True))
    taken = sum(option.bytes for option in choice)
    made = compose(recipe, budget, found, choice)
    return Found(made, tuple(found), choice, losses, taken, fixed)


def compose(recipe: Recipe, budget: Budget, found: Sequence[Part], choice: Sequence[Option]) -> Recipe:
    """The recipe that stores each part as chosen: its schemes laid over the recipe's own words, layer by layer."""
    data = recipe.model_dump(mode="json")
    layers: dict[int, dict[str, dict[str, Any]]] = {}
    for part, option in zip(found, choice, strict=True):
        if part.layer is None:
            data["linears"][part.role] = laid_over(data["linears"].get(part.role, {}), option.changes)
        elif option.spec != recipe.linear(part.role, part.layer):
            layers.setdefault(part.layer, {})[part.role] = option.changes
    overrides: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for layer, changes in layers.items():
        # of several overrides of a layer the last one counts alone, so it takes over what the recipe's own says
        last = next((o for o in reversed(recipe.layers) if o.covers(layer)), None)
        own = {} if last is None else last.model_dump(mode="json", exclude={"match"})
        override = laid_over(own, {"linears": changes})
        overrides.setdefault(repr(override), (override, []))[1].append(layer)
    data["layers"] += [{"match": _spans(where), **override} for override, where in overrides.values()]
    data["name"] = f"{recipe.name}-{budget.text.replace(' ', '')}"
    data["summary"] = f"{recipe.name} with a scheme for each linear, chosen by measured loss within {budget}."
    return parse_recipe(data, "searched")


def _spans(layers: list[int]) -> str:
    """[0, 1, 2, 7] as "0-2,7"."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)
