"""Search mixed precision under budgets, and measure what is found beside uniform assignments of the same size.

    python benchmarks/budget.py --models DIR --text validation.txt --calibration calibration.txt --device cuda \\
        --output results.json --jobs 6

For every model the losses are measured once. Then come, each quantised by the ordinary pipeline and evaluated on the
same windows (benchmarks/accuracy.py): the recipes found for the budgets, W4A8 with one group size everywhere, the
stock recipe, and assignments that fill the same budget without looking: in random order, and from either end.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

ACCURACY = Path(__file__).with_name("accuracy.py")


def fill(parts: Sequence[Any], order: Iterable[int], room: int) -> list[Any]:
    """For each part an option: all as small as can be, then in the given order the largest that still fits."""
    taken = [min(part.options, key=lambda option: option.bytes) for part in parts]
    for index in order:
        left = room - sum(option.bytes for option in taken) + taken[index].bytes
        taken[index] = max((o for o in parts[index].options if o.bytes <= left), key=lambda option: option.bytes)
    return taken


def plan(model: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs of one model: searches with the losses measured once, and what they are compared with."""
    import torch

    from quamba.budget import amount, search
    from quamba.budget.search import choose, compose
    from quamba.recipe import load_recipe

    torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    source, recipe = arguments.models / model, load_recipe("w4a8")
    first, *others = arguments.budgets
    found = search(source, recipe, first, schemes=arguments.schemes, calibration_text=arguments.calibration,
                   device=arguments.device)  # fmt: skip
    seconds = round(time.perf_counter() - start, 1)
    weights = sum(part.weights for part in found.parts)
    stock = sum(part.base for part in found.parts)
    evaluate = [{"windows": arguments.windows, "batch_size": 8}]

    def run(name: str, made: Any, linears: int, **more: Any) -> dict[str, Any]:
        data = made if isinstance(made, str) else made.model_dump(mode="json")
        bits = {"bits": round(8 * linears / weights, 4)} if linears else {}
        return {"model": model, "recipe": data, "name": name, "evaluate": evaluate, **bits, **more}

    runs = [run("original", "original", 0), run("stock w4a8", recipe, stock)]
    for text in (first, *others, f"{stock + found.fixed}B"):
        budget = amount.parse(text)
        made = choose(recipe, budget, found.parts, found.losses, budget.for_linears(weights, found.fixed), found.fixed)
        name = f"searched, {text}" if text != f"{stock + found.fixed}B" else "searched, size of stock w4a8"
        losses = [[part.layer, part.role, option.scheme] for part, option in zip(made.parts, made.choice, strict=True)]
        runs.append(run(name, made.recipe, made.linears, expected=made.expected, choice=losses))
    budget = amount.parse(first)
    room, count = budget.for_linears(weights, found.fixed), len(found.parts)
    orders: dict[str, list[int]] = {"from the first": list(range(count)), "from the last": list(range(count))[::-1]}
    for seed in range(arguments.random):
        orders[f"at random, seed {seed}"] = random.Random(seed).sample(range(count), count)
    for name, order in orders.items():
        taken = fill(found.parts, order, room)
        made = compose(recipe, budget, found.parts, taken)
        runs.append(run(f"filled {name}, {first}", made, sum(option.bytes for option in taken)))
    for scheme in found.schemes:
        same = [[option for option in part.options if option.scheme == scheme] for part in found.parts]
        # a part in which two group sizes come to the same has one of them, the smallest
        taken = [s[0] if s else min(p.options, key=lambda o: o.bytes) for p, s in zip(found.parts, same, strict=True)]
        if sum(map(len, same)) > count // 2:
            made = compose(recipe, budget, found.parts, taken)
            runs.append(run(f"uniform {scheme}", made, sum(option.bytes for option in taken)))
    table = [[part.layer, part.role, part.weights, [[o.scheme, o.bytes, loss] for o, loss in zip(
        part.options, found.losses[part.layer, part.role], strict=True)]] for part in found.parts]  # fmt: skip
    runs[2] |= {"search_seconds": seconds, "losses": table}
    return runs


def main() -> None:
    """Search, write the plan beside the output, and have it measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="directory of the models")
    parser.add_argument("--model", nargs="+", default=["mamba1-36m", "mamba2-50m"])
    parser.add_argument("--budgets", nargs="+", default=["4.5"], help="others are compared at the first")
    parser.add_argument("--schemes", default="same-inputs")
    parser.add_argument("--random", type=int, default=2, help="how many random assignments")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    place = arguments.output.with_suffix(".plan.yaml")
    if not place.exists():
        with ProcessPoolExecutor(arguments.jobs) as pool:
            made = list(pool.map(plan, arguments.model, [arguments] * len(arguments.model)))
        place.write_text(yaml.safe_dump([run for runs in zip_longest(*made) for run in runs if run], sort_keys=False))
        print(f"{place}: {sum(map(len, made))} runs", flush=True)
    command = [sys.executable, str(ACCURACY), str(place), "--text", arguments.text, "--calibration",
               arguments.calibration, "--output", str(arguments.output), "--device", arguments.device, "--jobs",
               str(arguments.jobs), "--threads", str(arguments.threads), "--models", str(arguments.models)]  # fmt: skip
    subprocess.run(command, check=True)
    for run in json.loads(arguments.output.read_text()):
        value = run["evaluations"][0]["perplexity"]["value"]
        print(f"{run['model']:12} {run['name']:36} {run.get('bits', ''):8} {value:.4f}")


if __name__ == "__main__":
    main()
