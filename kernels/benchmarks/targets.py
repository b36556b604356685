"""What the linears are meant to reach, as data, and the table that says whether they do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]
OURS = "quamba"
"""The prefix of our backends in the column of implementations: quamba/cuda, quamba/triton."""
FP16 = "cublas-fp16"


class Target(NamedTuple):
    """At least ``at_least`` of ``measure`` for these ops and numbers of rows, on weights of ``min_bytes`` and more.

    measure: "copy", the weights' bytes per second over the copy bandwidth; "peer", how many times as fast as the best
    peer; "fp16", as cuBLAS in fp16.
    """

    regime: str
    ops: tuple[str, ...]
    rows: tuple[int, int]
    measure: str
    at_least: float
    min_bytes: int = 0


W4, W8 = ("linear_w4a8", "linear_w4a16"), ("linear_w8a8",)
MANY = 1 << 30
TARGETS = (
    # 13.5 MB of int4 codes and their factors are the "14 MB" of Mamba2-2.7B's in_proj
    Target("M = 1..4, W4: share of copy bandwidth", W4, (1, 4), "copy", 0.65, 13_500_000),
    Target("M = 1..4, W4: times the best peer", W4, (1, 4), "peer", 1.2),
    Target("M = 1..4, W8: share of copy bandwidth", W8, (1, 4), "copy", 0.75),
    Target("M = 1..4, W8: times the best peer", W8, (1, 4), "peer", 1.2),
    Target("M = 16..64, W4: times the best peer", W4, (16, 64), "peer", 1.0),
    Target("M = 16, W4: times cuBLAS fp16", W4, (16, 16), "fp16", 2.5),
    Target("M >= 2048, W8A8 and W4A8: times cuBLAS fp16", ("linear_w8a8", "linear_w4a8"), (2048, MANY), "fp16", 1.6),
    Target("M >= 2048, W4A16: times cuBLAS fp16", ("linear_w4a16",), (2048, MANY), "fp16", 0.95),
)


def place(row: Row) -> tuple[Any, ...]:
    """The shape and the number of rows of a measurement."""
    return row["model"], row["role"], row["M"]


def best(rows: Iterable[Row]) -> Row | None:
    """The fastest of the measurements that passed the gate."""
    return min((r for r in rows if r["status"] == "ok"), key=lambda r: r["us"], default=None)


class Verdict(NamedTuple):
    """One target at one place: what was reached (None: a side was not measured) and whether that is enough."""

    target: Target
    reached: float | None
    passed: bool | None


class Comparison(NamedTuple):
    """Our bound backend at one place in one format, beside the others there."""

    ours: Row
    others: list[Row]
    peer: Row | None
    fp16: Row | None

    def reached(self, measure: str) -> float | None:
        """The value of a target's measure; None where a side is missing or failed."""
        if self.ours["status"] != "ok":
            return None
        if measure == "copy":
            return float(self.ours["copy_share"])
        if measure == "fp16" and "fp16_us" in self.ours:  # in turns with ours
            return float(self.ours["fp16_us"] / self.ours["us"])
        other = self.peer if measure == "peer" else self.fp16
        return other["us"] / self.ours["us"] if other else None

    def verdicts(self) -> list[Verdict]:
        """Every target that speaks of this place; a failed gate of ours misses them all."""
        found = []
        for target in TARGETS:
            low, high = target.rows
            small = self.ours["weight_bytes"] < target.min_bytes
            if self.ours["op"] not in target.ops or not low <= self.ours["M"] <= high or small:
                continue
            reached = self.reached(target.measure)
            missing = None if self.ours["status"] == "ok" else False
            found.append(Verdict(target, reached, missing if reached is None else reached >= target.at_least))
        return found


def comparisons(rows: Sequence[Row]) -> list[Comparison]:
    """Our measurements (the backend that a model would bind) in the order they were made, each with its rivals.

    cuBLAS in fp16 counts among the peers, so that none is left out where it is the fastest.
    """
    found = []
    for row in rows:
        if not row["implementation"].startswith(OURS) or not row["bound"]:
            continue
        here = [r for r in rows if place(r) == place(row)]
        others = [r for r in here if r["op"] == row["op"] and r is not row]
        fp16 = best(r for r in here if r["implementation"] == FP16)
        peers = [r for r in others if not r["implementation"].startswith(OURS)] + ([fp16] if fp16 else [])
        found.append(Comparison(row, others, best(peers), fp16))
    return found


def number(value: float | None, form: str) -> str:
    """A value in a cell of the table, a dash for None."""
    return "-" if value is None else format(value, form)


def table(rows: Sequence[Row]) -> str:
    """Markdown: one line for each shape, format and number of rows."""
    lines = [
        "| model | linear | op | M | us | p10..p90 | GB/s | % of copy | best peer | x peer | x fp16 | targets |",
        "|---|---|---|---:|---:|---:|---:|---:|---|---:|---:|---|",
    ]
    for c in comparisons(rows):
        row, good = c.ours, c.ours["status"] == "ok"
        marks = {True: "PASS", False: "MISS", None: "?"}
        verdicts = "; ".join(f"{marks[v.passed]} {v.target.at_least:g} {v.target.measure}" for v in c.verdicts())
        spread = f"{row['us_p10']:.1f}..{row['us_p90']:.1f}" if good else row["reason"]
        peer = f"{c.peer['implementation']} {c.peer['us']:.1f}" if c.peer else "-"
        cells = [
            row["model"], row["role"], row["op"].removeprefix("linear_"), str(row["M"]),
            number(row["us"] if good else None, ".1f"), spread, number(row["gb_s"] if good else None, ".0f"),
            number(100 * row["copy_share"] if good else None, ".0f"), peer, number(c.reached("peer"), ".2f"),
            number(c.reached("fp16"), ".2f"), verdicts or "-",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def scoreboard(rows: Sequence[Row]) -> str:
    """Markdown: how many places meet each target, and the worst."""
    lines = ["| target | at least | places | met | worst | where |", "|---|---:|---:|---:|---:|---|"]
    found = [(c, v) for c in comparisons(rows) for v in c.verdicts()]
    for target in TARGETS:
        mine = [(c, v) for c, v in found if v.target is target and v.passed is not None]
        met = sum(bool(v.passed) for _, v in mine)
        worst = min(((v.reached or 0.0, c.ours) for c, v in mine), key=lambda pair: pair[0], default=None)
        where = f"{worst[1]['model']} {worst[1]['role']} {worst[1]['op']} M={worst[1]['M']}" if worst else "-"
        low = number(worst[0] if worst else None, ".2f")
        lines.append(f"| {target.regime} | {target.at_least:g} | {len(mine)} | {met} | {low} | {where} |")
    return "\n".join(lines)


def problems_of(rows: Sequence[Row]) -> list[str]:
    """A sentence for each implementation that failed the gate or could not run."""
    return [
        f"{r['implementation']} {r['op']} {r['model']} {r['role']} M={r['M']}: {r['reason']}"
        for r in rows if r["status"] == "failed"
    ]  # fmt: skip
