"""Sizes that a config may ask for, checked before anything is made by it."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any

from quamba.errors import UserError
from quamba.layouts.layout import read_json

LARGEST = 2**31 - 1
"""No axis of a tensor and no token id is larger."""
LARGEST_FLOAT = 3.4e38
"""Of fp32; infinity may say that there is no limit."""
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


def check_sizes(folder: Path, tensors: int) -> None:
    """Compare the numbers of config.json, if there is one, with the number of tensors beside it.

    Raises UserError for a size that cannot be. A config's class may make lists of one entry per layer, and a
    description has one part per layer, so this comes before both; every other size is compared with a tensor's.
    """
    file = folder / "config.json"
    for key, value in _numbers(read_json(file)) if file.is_file() else ():
        limit = LARGEST_FLOAT if isinstance(value, float) else LARGEST
        if limit < abs(value) < inf:
            raise UserError(f"{file} asks for a {key!r} beyond {limit:.3g}, which nothing in a model can be")
        if key in LAYER_COUNTS and value > tensors:
            raise UserError(f"{file} asks for {key}={value}, but the weights beside it are {tensors} tensors")


def _numbers(value: Any) -> Iterator[tuple[str, int | float]]:
    """(key, value) of every number of a config, with those of its inner configs; a stack, for they may be deep."""
    waiting = [("", value)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(key, inner) for inner in value]
        elif isinstance(value, (int, float)):
            yield key, value
