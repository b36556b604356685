"""Speed-up of a decoded token over a baseline, by batch, with the roofline as a dashed line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quamba.bench.cost import Cost, Work
from quamba.bench.device import Device
from quamba.bench.predict import floor
from quamba.errors import UserError

Row = dict[str, Any]


def ceiling(cost: Cost, base: Cost, batch: int, device: Device | None) -> float:
    """The speed-up if both ran at their floors on ``device``; without one, if bytes alone took time."""
    both = [c.decode.at(batch, 1) for c in (base, cost)]
    if device is None:
        slow, fast = (sum(trace.values(), Work()).bytes for trace in both)
    else:
        slow, fast = (floor(trace, device) for trace in both)
    return slow / fast


def speedups(rows: Sequence[Row], base: str) -> dict[str, dict[int, float]]:
    """recipe -> batch -> time per token of ``base`` over its own, at the shortest prompt; measured or predicted."""
    shortest = min(row["prompt"] for row in rows)
    times: dict[str, dict[int, float]] = {}
    for row in rows:
        time = row.get("median_tpot_ms", row.get("predicted_tpot_ms"))
        if row["prompt"] == shortest and time is not None:
            times.setdefault(row["recipe"], {})[row["batch"]] = time
    reference = times.get(base, {})
    return {
        recipe: {batch: reference[batch] / time for batch, time in found.items() if batch in reference}
        for recipe, found in times.items()
        if recipe != base
    }


def draw(
    path: Path, rows: Sequence[Row], costs: Mapping[str, Cost], *, base: str, title: str, device: Device | None
) -> None:
    """Write a PNG (or what the suffix says). costs: by recipe, for the dashed lines.

    Raises UserError without matplotlib, and where ``base`` was not measured.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib (pip install quamba[plot])") from None
    found = speedups(rows, base)
    if not any(found.values()):
        raise UserError(f"--plot shows speed-ups over {base}, which was not measured beside anything; add it")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for recipe, points in found.items():
        batches = sorted(points)
        (line,) = axes.plot(batches, [points[b] for b in batches], marker="o", label=recipe)
        if recipe in costs and base in costs:
            bound = [ceiling(costs[recipe], costs[base], b, device) for b in batches]
            axes.plot(batches, bound, linestyle="--", marker="_", color=line.get_color(), label=f"{recipe}, roofline")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set(xlabel="batch", ylabel=f"tokens per second, of {base}", title=title)
    axes.set_xscale("log", base=2)
    ticks = sorted({b for points in found.values() for b in points})
    axes.set_xticks(ticks, [str(b) for b in ticks])
    axes.legend(fontsize="small")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be written: {error}") from None
