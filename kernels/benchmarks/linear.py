"""Low-bit linears of three models beside cuBLAS, torch._int_mm, gemlite and humming, on one GPU.

    python kernels/benchmarks/linear.py --output results.json

Prints a table of times and a scoreboard of the targets in targets.py. README.md says how it measures. The file is
written after every shape, so a run that is cut short keeps what it measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import problems
import targets
import torch
from peers import NAMES, Packed, Peer, installed
from problems import FP16, ROWS, SHAPES, Inputs, Problem, Shape, inputs, problem, reference, sampled
from report import Row, add_options, header, write
from timing import LARGE, Captured, Time, capture, copies_needed, copy_bandwidth, in_turns, launches_needed

WIDEST_INPUTS = 128 << 20
"""Bytes of rotating activations."""


class BrokenDevice(RuntimeError):
    """A kernel left the CUDA context unusable: nothing more can be measured in this process."""


class Implementation(NamedTuple):
    """One line of the table: its name, whether a model would bind it here, its tolerance, and how it runs."""

    name: str
    bound: bool
    tolerance: float
    pack: Callable[[Problem], Packed]
    call: Callable[[Problem, int], Callable[[Packed, Inputs], torch.Tensor]]
    finish: Callable[[torch.Tensor, Problem, Inputs], torch.Tensor]


def ours(shape: Shape, op: str) -> list[Implementation]:
    """Every backend of ours that serves the shape, the one that a model would bind first; never the torch body."""
    from quamba_kernels import OPS, Setting
    from quamba_kernels.testing import TOLERANCE

    if op == FP16:
        return []
    group = problems.GROUP if op != "linear_w8a8" else shape.K
    setting = Setting("cuda", torch.float16, {"K": shape.K, "O": shape.O, "S": group})
    usable = [b for b in OPS[op].candidates if b.name != "torch" and b.why_not(setting) is None]
    return [ported(b, op, b is usable[0], TOLERANCE[op].get(torch.float16, 1e-3)) for b in usable]


def ported(backend: Any, op: str, bound: bool, tolerance: float) -> Implementation:
    """A backend of ours as a line of the table, with fp16 outputs."""

    def call(given: Problem, rows: int) -> Callable[[Packed, Inputs], torch.Tensor]:
        if op == "linear_w4a16":
            return lambda packed, x: backend(x.x, packed, out_dtype=torch.float16)
        return lambda packed, x: backend(x.x, x.scale, packed, out_dtype=torch.float16)

    name = f"{targets.OURS}/{backend.name}"
    return Implementation(name, bound, tolerance, lambda given: backend.prepack(given.weights), call, unchanged)


def unchanged(y: torch.Tensor, given: Problem, x: Inputs) -> torch.Tensor:
    """The output as it is."""
    return y


def theirs(peer: Peer) -> Implementation:
    """A peer as a line of the table."""
    return Implementation(peer.name, False, peer.tolerance, peer.pack, peer.call, peer.finish)


def gate(it: Implementation, given: Problem, copies: Sequence[Packed], x: Inputs, want: torch.Tensor) -> float:
    """Relative error of an implementation with its first and its last copy of the weights.

    Raises ValueError when it is above the tolerance.
    """
    from quamba_kernels.testing import error

    rows = x.x.shape[0]
    call, at = it.call(given, rows), sampled(rows).to(x.x.device)
    chosen = Inputs(x.x[at], None if x.scale is None else x.scale[at])
    worst = 0.0
    for packed in (copies[0], copies[-1]):
        poison = torch.full((rows, given.shape.O), torch.nan, dtype=torch.float16, device=x.x.device)
        del poison  # the allocator hands this memory out again for the output: a result that lacks a write is NaN
        worst = max(worst, error(it.finish(call(packed, x)[at], given, chosen), want))
    if not worst <= it.tolerance:
        raise ValueError(f"relative error {worst:.1e} above {it.tolerance:.0e}")
    return worst


def measure(
    it: Implementation, given: Problem, rows: int, xs: Sequence[Inputs], want: torch.Tensor, copies: list[Packed],
    replays: int, bandwidth: float, fp16: Captured | None = None,
) -> Row:  # fmt: skip
    """Gate, then time, in turns with cuBLAS where that is given; a row with status "ok" or "failed"."""
    row = labelled(it, given, rows)
    try:
        row["error"] = gate(it, given, copies, xs[0], want)
        taken, *beside = in_turns([launched(it, given, rows, xs, copies), *([fp16] if fp16 else [])], replays)
    except Exception as error:
        return failed(it, given, rows, error)
    if beside:
        row["fp16_us"] = beside[0].median
    return {**row, "status": "ok", **timed(taken, given.weight_bytes, bandwidth), "copies": len(copies)}


def launched(it: Implementation, given: Problem, rows: int, xs: Sequence[Inputs], copies: list[Packed]) -> Captured:
    """A graph of launches over all copies and inputs."""
    call, held = it.call(given, rows), list(copies)
    launches = launches_needed(len(held), rows, given.weight_bytes)
    return capture(lambda i: call(held[i % len(held)], xs[i % len(xs)]), launches, warm=2)


def timed(taken: Time, weight_bytes: int, bandwidth: float) -> Row:
    """The columns of a time."""
    rate = weight_bytes / taken.median / 1000
    return {
        "us": taken.median, "us_p10": taken.p10, "us_p90": taken.p90, "launches": taken.launches,
        "replays": taken.replays, "gb_s": rate, "copy_share": rate / bandwidth,
    }  # fmt: skip


def fresh_inputs(shape: Shape, op: str, rows: int, copies: int, rng: torch.Generator) -> list[Inputs]:
    """As many different activations as copies of weights, within WIDEST_INPUTS, two at least."""
    size = rows * shape.K * (2 if op in (FP16, "linear_w4a16") else 1)
    count = max(2, min(copies, WIDEST_INPUTS // size))
    return [inputs(shape.K, rows, op, "cuda", rng) for _ in range(count)]


def wanted_rows(arguments: argparse.Namespace, shape: Shape) -> list[int]:
    """Numbers of rows measured for a shape."""
    return [m for m in arguments.rows if arguments.long_heads or shape.role != "lm_head" or m < problems.LONG_PROMPT]


def run_shape(
    shape: Shape, arguments: argparse.Namespace, peers: Sequence[Peer], rng: torch.Generator, bandwidth: float,
    deadline: float, found: list[Row],
) -> None:  # fmt: skip
    """Append all formats and numbers of rows of one shape; stops between measurements at the deadline.

    Raises BrokenDevice when a failure left the device unusable.
    """
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    fp16: dict[int, Captured] = {}  # cuBLAS over many rows, which the others take turns with
    for op in (FP16, *arguments.ops):
        runs = [*ours(shape, op), *(theirs(p) for p in peers if op in p.ops)]
        if not runs:
            continue
        given = problem(shape, op, "cuda", rng)
        tests = {}
        for m in wanted_rows(arguments, shape):
            xs = fresh_inputs(shape, op, m, copies_needed(given.weight_bytes, l2, m), rng)
            tests[m] = xs, reference(given, xs[0])
        for it in runs:
            refuses = {m: p.why_not(op, m) for p in peers if p.name == it.name for m in tests}
            try:
                packed = it.pack(given)
            except Exception as error:
                found += [failed(it, given, m, error) for m in tests if not refuses.get(m)]
                continue
            copies = [packed]
            for m, (xs, want) in sorted(tests.items(), reverse=True):  # many rows need few copies
                if refuses.get(m):
                    continue
                if time.monotonic() > deadline:
                    return
                while len(copies) < copies_needed(given.weight_bytes, l2, m):
                    copies.append(tuple(t.clone() for t in packed))
                found.append(measure(it, given, m, xs, want, copies, arguments.replays, bandwidth, fp16.get(m)))
                print(line(found[-1]), flush=True)
                if found[-1]["status"] == "failed":
                    check_device(found[-1])
                elif it.name == targets.FP16 and m >= LARGE:
                    fp16[m] = launched(it, given, m, xs, copies)
            del copies, packed
            torch.cuda.empty_cache()


def check_device(row: Row) -> None:
    """Raises BrokenDevice when the device no longer answers after this failure."""
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").item()
    except RuntimeError as error:
        raise BrokenDevice(f"{row['implementation']} {row['op']} M={row['M']} broke the device: {error}") from error


def labelled(it: Implementation, given: Problem, rows: int) -> Row:
    """The columns that say what was measured."""
    shape = given.shape
    return {
        "model": shape.model, "role": shape.role, "K": shape.K, "O": shape.O, "S": given.group, "op": given.op,
        "M": rows, "implementation": it.name, "bound": it.bound, "weight_bytes": given.weight_bytes,
    }  # fmt: skip


def failed(it: Implementation, given: Problem, rows: int, error: Exception) -> Row:
    """The row of an implementation that raised: whatever a peer raises is its result."""
    reason = f"{type(error).__name__}: {error}"[:300]
    return {**labelled(it, given, rows), "status": "failed", "reason": reason}


def line(row: Row) -> str:
    """A measurement as it is made."""
    head = f"{row['model']} {row['role']} {row['op']} M={row['M']} {row['implementation']}"
    if row["status"] != "ok":
        return f"{head}: {row['reason']}"
    return f"{head}: {row['us']:.2f} us ({row['us_p10']:.2f}..{row['us_p90']:.2f}), {row['gb_s']:.0f} GB/s"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = {key: list(dict.fromkeys(getattr(s, key) for s in SHAPES)) for key in ("model", "role")}
    made.add_argument("--models", nargs="+", choices=choices["model"], default=choices["model"])
    made.add_argument("--roles", nargs="+", choices=choices["role"], default=choices["role"])
    made.add_argument("--ops", nargs="+", choices=problems.OPS, default=list(problems.OPS))
    made.add_argument("--rows", nargs="+", type=int, default=list(ROWS), metavar="M", help="numbers of tokens")
    made.add_argument("--peers", nargs="*", choices=NAMES, default=list(NAMES), help="none for ours alone")
    made.add_argument("--quick", action="store_true", help="mamba2-2.7b's projections, M = 1, 16, 2048, 7 replays")
    made.add_argument("--long-heads", action="store_true", help=f"lm_head at {problems.LONG_PROMPT} rows and more too")
    made.add_argument("--tune-gemlite", action="store_true", help="tune gemlite for every shape: minutes for each")
    add_options(made, replays=20, budget_s=480.0)
    return made


def tables(rows: Sequence[Row]) -> str:
    """The scoreboard, then the times."""
    return f"{targets.scoreboard(rows)}\n\n{targets.table(rows)}"


def main(arguments: argparse.Namespace) -> int:
    """Measure what the command line asks for; 1 when a backend of ours fails its gate."""
    if not torch.cuda.is_available():
        print("needs a CUDA device, and torch sees none here", file=sys.stderr)
        return 2
    started = time.monotonic()
    if arguments.quick:
        arguments.models, arguments.roles, arguments.rows = ["mamba2-2.7b"], ["in_proj", "out_proj"], [1, 16, 2048]
        arguments.replays = 7
    seed = torch.seed() % (1 << 32) if arguments.seed is None else arguments.seed
    rng = torch.Generator("cuda").manual_seed(seed)
    peers, versions = installed(arguments.peers, arguments.tune_gemlite)
    shapes = [s for s in SHAPES if s.model in arguments.models and s.role in arguments.roles]
    bandwidth = copy_bandwidth()
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    head = header(seed, bandwidth, peers=versions, l2_bytes=l2_bytes)
    print(json.dumps(head), flush=True)
    for peer in peers:
        peer.prepare([(s, op, m) for s in shapes for op in arguments.ops for m in wanted_rows(arguments, s)])
    head["prepare_s"] = time.monotonic() - started
    rows: list[Row] = []
    deadline = started + arguments.budget_s
    for shape in shapes:
        if time.monotonic() > deadline:
            break
        try:
            run_shape(shape, arguments, peers, rng, bandwidth, deadline, rows)
        except BrokenDevice as error:
            write(arguments.output, {**head, "broken": str(error)}, rows, tables(rows))
            print(f"{targets.table(rows)}\n\n{error}; run the rest without it (--peers)", file=sys.stderr)
            return 1
        write(arguments.output, head, rows, tables(rows))
    head |= {"complete": time.monotonic() <= deadline, "copy_gb_s_after": copy_bandwidth(),
             "seconds": time.monotonic() - started}  # fmt: skip
    write(arguments.output, head, rows, tables(rows))
    print(f"{targets.table(rows)}\n\n{targets.scoreboard(rows)}\n")
    print("\n".join(targets.problems_of(rows)))
    ours_failed = [r for r in rows if r["status"] == "failed" and r["implementation"].startswith(targets.OURS)]
    return 1 if ours_failed else 0


if __name__ == "__main__":
    sys.exit(main(parser().parse_args()))
