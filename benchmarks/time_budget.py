"""Where the time of a prefill and of a decode step goes, kernel by kernel, from the profiler.

    python benchmarks/time_budget.py mamba2-2.7b --recipe w8a8,w4a8 --batch 1,64 --prompt 2048 --output budget.json

A published size with drawn weights; prefill and step are CUDA graphs, as `quamba bench` times them. "us" is the sum of
a kernel's durations in one replay, "share" that over the replay's own time by events. Kernels that start while the one
before them ends overlap, so shares may add up to more than one.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections import defaultdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from quamba.bench.baselines import BASELINES
from quamba.bench.contender import Contender, ours
from quamba.bench.measure import run
from quamba.bench.source import Source, from_shape, recipes

REPLAYS = 5
WARM = 4


def short(name: str) -> str:
    """A kernel's name without its namespaces and arguments, with what tells its template's kinds apart."""
    bare = re.sub(r"\((anonymous|unnamed)[^()]*\)::|<unnamed>::|\((unsigned )?[\w:]+\)(?=-?\d)", "", name)
    bare = re.sub(r"^.*?\bvoid ", "", bare).split("(")[0]
    head, _, values = bare.partition("<")
    kept = re.sub(r"\(?[\w:]+::\w+\)", "", values)
    return (f"{head.split('::')[-1]}<{kept[:60]}" if values else head.split("::")[-1]) or name[:80]


def replayed(call: Any) -> tuple[float, list[dict[str, Any]]]:
    """Milliseconds of a replay, and a row for each kernel of one, longest first."""
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(REPLAYS):
            call()
        torch.cuda.synchronize()
    sums: dict[str, list[float]] = defaultdict(list)
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            sums[short(event.name)].append(event.device_time)
    total = sorted(times)[REPLAYS // 2]
    rows = [
        {"kernel": name, "count": round(len(us) / REPLAYS, 1), "us_each": sum(us) / len(us), "us": sum(us) / REPLAYS,
         "share": sum(us) / REPLAYS / (total * 1e3)}
        for name, us in sums.items()
    ]  # fmt: skip
    return total, sorted(rows, key=lambda row: -row["us"])


def budget(contender: Contender, batch: int, prompt: int, vocab: int) -> dict[str, Any]:
    """The rows of a prefill and of a step."""
    ids = torch.randint(0, vocab, (batch, prompt), device="cuda")
    request = contender.request(ids, 64)
    request.capture(True)
    for _ in range(WARM):
        run(request, 4)
    parts = {"prefill": request.prefill, "step": request.step}
    found = {}
    for name, call in parts.items():
        total, rows = replayed(call)
        found[name] = {"ms": total, "kernels": rows}
    return found


def table(found: dict[str, Any], most: int) -> str:
    """Markdown."""
    lines = ["| kernel | launches | us each | us | share |", "| --- | ---: | ---: | ---: | ---: |"]
    lines += [
        f"| `{r['kernel']}` | {r['count']:g} | {r['us_each']:.2f} | {r['us']:.0f} | {r['share']:.2f} |"
        for r in found["kernels"][:most]
    ]
    return "\n".join(lines)


def contenders(source: Source, names: list[str]) -> list[Contender]:
    """Recipes, and baselines by their names."""
    device, made = torch.device("cuda"), []
    for name in names:
        if name in BASELINES:
            made.append(BASELINES[name].make(source, torch.float16, device))
        else:
            made.append(ours(source, recipes([name], source)[0], torch.float16, device))
    return made


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("--recipe", default="w4a8", help="recipes, and baselines such as mamba-ssm")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--prompt", default="2048")
    parser.add_argument("--most", type=int, default=16, help="rows that are printed")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    source, rows = from_shape(args.shape), []
    for name in args.recipe.split(","):
        (contender,) = contenders(source, [name])
        for batch in map(int, args.batch.split(",")):
            for prompt in map(int, args.prompt.split(",")):
                found = budget(contender, batch, prompt, source.config.vocab_size)
                rows.append({"recipe": name, "batch": batch, "prompt": prompt, **found})
                for part, one in found.items():
                    print(f"\n{args.shape} {name}, batch {batch}, {part} of {prompt}: {one['ms']:.3f} ms\n")
                    print(table(one, args.most), flush=True)
        del contender
        torch.cuda.empty_cache()
    if args.output:
        about = {"command": shlex.join(sys.argv), "device": torch.cuda.get_device_name(), "torch": torch.__version__,
                 "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "shape": args.shape}  # fmt: skip
        args.output.write_text(json.dumps({**about, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
