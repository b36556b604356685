"""What `--budget` says: bits per weight of the quantised linears, or bytes of the whole model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from quamba.errors import UserError

UNITS = {
    "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
}  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """A plain number counts bits per weight: everything that the quantised linears store (codes, scales, scales of
    their inputs; biases left out) over their weights. With a unit it counts bytes of all tensors of the model."""

    text: str
    amount: float
    unit: int | None

    def for_linears(self, weights: int, fixed: int) -> int:
        """The bytes that the linears may take: they have so many weights, and everything else takes ``fixed`` bytes."""
        if self.unit is None:
            return math.floor(self.amount * weights / 8)
        return math.floor(self.amount * self.unit) - fixed

    def __str__(self) -> str:
        return self.text if self.unit is not None else f"{self.text} bits per weight of the linears"

    def told(self, linears: int, weights: int, fixed: int, rounding: Callable[[float], int]) -> str:
        """What linears of so many bytes come to in what this budget counts; bits per weight rounded to 4 digits."""
        if self.unit is None:
            return f"{rounding(8e4 * linears / weights) / 1e4:g} bits per weight"
        return f"{linears + fixed}B"


def parse(text: str) -> Budget:
    """"4.5" (bits per weight), "30MB", "28.5MiB", "31000000B". Raises UserError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", text)
    if found is None:
        raise UserError(f"budget {text!r} is no amount; give bits per weight as in 4.5, or bytes as in 30MB")
    number, unit = found.groups()
    if unit and unit not in UNITS:
        raise UserError(
            f"budget {text!r} has the unknown unit {unit!r}; known are {', '.join(UNITS)}, and none for bits per weight"
        )
    if float(number) == 0:
        raise UserError(f"budget {text!r} leaves nothing; give bits per weight as in 4.5, or bytes as in 30MB")
    return Budget(text.strip(), float(number), UNITS[unit] if unit else None)
