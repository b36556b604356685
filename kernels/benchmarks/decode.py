"""One decode step between the linears, at the sizes of three models, on one GPU: fused in CUDA beside the chain of ops.

    python kernels/benchmarks/decode.py --output decode.json

Times are of CUDA graphs, as in linear.py, over copies of states and constants that together exceed L2: in a model other
layers pass between two visits. "% of copy" is what a step must move once (state and convolution state read and written,
activations, constants), per second, over the bandwidth of a copy. Each implementation has to agree with the torch body,
states included, before it is timed. "chain" is what a mixer runs without the fused op, with whatever backends serve its
parts here.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from report import Row, add_options, header, write
from timing import copies_needed, copy_bandwidth, launches_needed, replay

from quamba_kernels import OPS, Op, Setting
from quamba_kernels.ops import decode as bodies
from quamba_kernels.testing import TOLERANCE, change, disagreement, flat

BATCHES = (1, 16, 64, 128, 256)
STATES = ("fp16", "int8")
MOST_BYTES = 40 << 30
STEPS = ("ssd_decode", "selective_decode", "conv_decode")


class Model(NamedTuple):
    """Sizes of a mixer; P 0: a selective scan over H channels."""

    name: str
    H: int
    P: int
    G: int
    N: int


MODELS = (
    Model("mamba1-2.8b", 5120, 0, 1, 16), Model("mamba2-2.7b", 80, 64, 1, 128), Model("mamba2-8b", 128, 64, 8, 128),
)  # fmt: skip


class Problem(NamedTuple):
    """One call; ``moved``: bytes read and written once."""

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: dict[str, int]
    moved: int


def problems(model: Model, batch: int, state: str, rng: torch.Generator, device: str = "cuda") -> list[Problem]:
    """The steps of a quantised mixer with random contents, activations in fp16: int8 convolution, gate and scan inputs,
    a static scale on the way out; an int8 state is rounded stochastically."""

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=rng, device=device)

    def codes(*size: int) -> torch.Tensor:
        return torch.randint(-127, 128, size, generator=rng, device=device, dtype=torch.int8)

    def scales(*size: int) -> torch.Tensor:
        return torch.rand(size, generator=rng, device=device) * 0.02 + 0.01

    inner, N = model.H * max(model.P, 1), model.N
    heads = (model.H, model.P) if model.P else (model.H,)
    int8 = state == "int8"
    stored = codes(batch, *heads, N) if int8 else normal(batch, *heads, N).half()
    kept = (stored, scales(batch, *heads) if int8 else None, torch.tensor([7, 0], device=device) if int8 else None)
    out = {"block": inner, "out_scale": torch.tensor([0.02], device=device)}
    shape = {"H": model.H, "G": model.G, "N": N, "W": 4, "I": inner, "block": inner}
    twice = 2 * sum(t.numel() * t.element_size() for t in kept[:2] if t is not None)
    channels = inner + (2 * model.G * N if model.P else 0)
    conv = (codes(channels, 4), normal(channels).half())
    window = codes(batch, 3, channels)
    taps = {"weight_scale": scales(channels) * 0.2, "out_scale": scales(channels)}
    if model.P:
        projected = normal(batch, inner + channels + model.H).half()
        given = (projected, window, *kept, *conv, -torch.rand(model.H, generator=rng, device=device) * 2 - 0.1,
                 normal(model.H), normal(model.H), normal(inner).half(), 1e-5)  # fmt: skip
        options = {
            **out, "conv_in_scale": scales(channels), "conv_weight_scale": taps["weight_scale"],
            "conv_out_scale": taps["out_scale"], "x_scale": scales(*heads), "B_scale": scales(model.G),
            "C_scale": scales(model.G), "z_scale": scales(inner), "norm_groups": model.G,
        }  # fmt: skip
        sizes = {**shape, "P": model.P, "norm_groups": model.G}
        moved = twice + 2 * window.numel() + 2 * projected.numel() + batch * inner + 20 * channels + 12 * inner
        return [Problem("ssd_decode", given, options, sizes, moved)]
    x, z = normal(batch, 2 * inner).half().chunk(2, -1)
    first = Problem(
        "conv_decode", (x, window, *conv), {"in_scale": scales(channels), **taps}, {"W": 4},
        2 * window.numel() + 3 * batch * inner + 18 * channels,
    )  # fmt: skip
    B, C = normal(batch, 160 + 2 * N).half()[:, 160:].split(N, -1)
    A = -torch.rand(inner, N, generator=rng, device=device) * 4 - 0.1
    given = (z, *kept, codes(batch, inner), normal(batch, inner).half(), A, B, C, normal(inner))
    options = {**out, **{f"{name}_scale": scales(1) for name in ("x", "B", "C")}, "z_scale": scales(inner)}
    moved = twice + batch * inner * 6 + 4 * A.numel() + 8 * inner
    return [first, Problem("selective_decode", given, options, {"I": inner, "N": N, "block": inner}, moved)]


def implementations(op: str, shape: dict[str, int]) -> dict[str, Callable[..., Any]]:
    """Every fused backend that serves the step, and the chain of ops."""
    setting = Setting("cuda", torch.float16, shape)
    found: dict[str, Callable[..., Any]] = {b.name: b for b in OPS[op].backends if b.why_not(setting) is None}
    return {**found, "chain": chained(op, setting)}


def chained(op: str, setting: Setting) -> Callable[..., Any]:
    """The torch body of a step with each op in it replaced by the backend that a mixer binds for it."""
    parts = {
        name: part.bind(setting) for name, part in vars(bodies).items() if isinstance(part, Op) and name not in STEPS
    }  # fmt: skip

    def run(*args: Any, **kwargs: Any) -> Any:
        with patch.multiple(bodies, **parts):
            return OPS[op].reference(*args, **kwargs)

    return run


def copied(given: Problem) -> Problem:
    """The same with tensors of its own."""
    args, kwargs = change((given.args, given.kwargs), torch.clone)
    return given._replace(args=args, kwargs=kwargs)


def gate(run: Callable[..., Any], given: Problem) -> None:
    """Raises ValueError when a step differs from the torch body's, in what it returns or leaves in a state."""
    mine, other = copied(given), copied(given)
    got = flat((run(*mine.args, **mine.kwargs), mine.args, mine.kwargs))
    want = flat((OPS[given.op].reference(*other.args, **other.kwargs), other.args, other.kwargs))
    if difference := disagreement(got, want, TOLERANCE[given.op][torch.bfloat16]):
        raise ValueError(difference)


def measure(run: Callable[..., Any], given: Problem, replays: int, bandwidth: float) -> Row:
    """Gate, then time; columns of a row with status "ok" or "failed"."""
    try:
        gate(run, given)
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        held = sum(t.numel() * t.element_size() for t in flat((given.args, given.kwargs)))
        copies = [copied(given) for _ in range(min(copies_needed(held, l2, 1), max(2, MOST_BYTES // held)))]

        def launch(i: int) -> Any:
            chosen = copies[i % len(copies)]
            return run(*chosen.args, **chosen.kwargs)

        taken = replay(launch, launches_needed(len(copies), 1, given.moved), replays, warm=2)
    except Exception as error:
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
    rate = given.moved / taken.median / 1000
    return {
        "status": "ok", "us": taken.median, "us_p10": taken.p10, "us_p90": taken.p90, "copies": len(copies),
        "launches": taken.launches, "gb_s": rate, "copy_share": rate / bandwidth,
    }  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Markdown: one line a step, fused and chained side by side."""
    lines = ["| model | step | state | batch | implementation | us | p10..p90 | GB/s | % of copy |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for row in rows:
        head = f"| {row['model']} | {row['op']} | {row['state']} | {row['batch']} | {row['implementation']} "
        if row["status"] != "ok":
            lines.append(f"{head}| {row['reason']} | | | |")
            continue
        spread = f"{row['us_p10']:.2f}..{row['us_p90']:.2f}"
        lines.append(f"{head}| {row['us']:.2f} | {spread} | {row['gb_s']:.0f} | {100 * row['copy_share']:.0f} |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [model.name for model in MODELS]
    made.add_argument("--models", nargs="+", choices=names, default=names)
    made.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), metavar="B")
    made.add_argument("--states", nargs="+", choices=STATES, default=list(STATES))
    made.add_argument("--no-chain", action="store_true", help="the fused steps alone")
    add_options(made, replays=20, budget_s=400.0)
    return made


def main(arguments: argparse.Namespace) -> int:
    """Measure what the command line asks for; 1 when the fused step fails its gate."""
    if not torch.cuda.is_available():
        print("needs a CUDA device, and torch sees none here", file=sys.stderr)
        return 2
    started = time.monotonic()
    seed = torch.seed() % (1 << 32) if arguments.seed is None else arguments.seed
    rng = torch.Generator("cuda").manual_seed(seed)
    bandwidth = copy_bandwidth()
    head = header(seed, bandwidth)
    print(json.dumps(head), flush=True)
    rows: list[Row] = []
    chosen = [m for m in MODELS if m.name in arguments.models]
    wanted = [(m, b, s) for m in chosen for b in arguments.batches for s in arguments.states]
    for model, batch, state in wanted:
        if time.monotonic() - started > arguments.budget_s:
            break
        for given in problems(model, batch, state, rng):
            for name, run in implementations(given.op, given.shape).items():
                if name == "chain" and arguments.no_chain:
                    continue
                labels = {"model": model.name, "op": given.op, "state": state, "batch": batch, "implementation": name}
                rows.append({**labels, "bytes": given.moved, **measure(run, given, arguments.replays, bandwidth)})
                print(table(rows[-1:]).splitlines()[-1], flush=True)
                torch.cuda.empty_cache()
        write(arguments.output, head, rows, table(rows))
    else:
        head["complete"] = True
    write(arguments.output, {**head, "seconds": time.monotonic() - started}, rows, table(rows))
    print(table(rows))
    return 1 if any(row["status"] == "failed" and row["implementation"] != "chain" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(parser().parse_args()))
