"""Search mixed precision under budgets, and measure what is found beside uniform assignments of the same size.

    python benchmarks/budget.py --models DIR --text validation.txt --calibration calibration.txt --device cuda \\
        --output results.json --jobs 6

For every model the losses are measured once. Then come, each quantised by the ordinary pipeline and evaluated on the
same text (benchmarks/accuracy.py): the stock recipe and W4A8 with one group size for all linears, with what is found
for their sizes; what is found for the budget; and assignments that fill the same budget without looking: in random
order, and from either end.
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
    """The runs of one model: what is found with the losses measured once, and what it is compared with."""
    import torch

    from quamba.budget import amount, search
    from quamba.budget.found import choose, compose
    from quamba.recipe import load_recipe

    torch.set_num_threads(arguments.threads)
    start, budget, recipe = time.perf_counter(), amount.parse(arguments.budget), load_recipe("w4a8")
    found = search(arguments.models / model, recipe, arguments.budget, schemes=arguments.schemes,
                   calibration_text=arguments.calibration, device=arguments.device)  # fmt: skip
    seconds = round(time.perf_counter() - start, 1)
    weights, parts = sum(part.weights for part in found.parts), found.parts
    evaluate = [{"windows": arguments.windows, "batch_size": 8}, {"compare": arguments.compare}]

    def run(name: str, made: Any, linears: int, **more: Any) -> dict[str, Any]:
        data = made if isinstance(made, str) else made.model_dump(mode="json")
        bits = {"bits": round(8 * linears / weights, 4)} if linears else {}
        return {"model": model, "recipe": data, "name": name, "evaluate": evaluate, **bits, **more}

    def searched(name: str, room: int) -> dict[str, Any]:
        made = choose(recipe, budget, parts, found.losses, room, found.fixed)
        chosen = [[part.layer, part.role, option.scheme] for part, option in zip(parts, made.choice, strict=True)]
        return run(f"searched, {name}", made.recipe, made.linears, expected=made.expected, choice=chosen)

    def assigned(name: str, taken: list[Any]) -> dict[str, Any]:
        losses = [found.losses[part.layer, part.role][part.options.index(option)]
                  for part, option in zip(parts, taken, strict=True)]  # fmt: skip
        made = compose(recipe, budget, parts, taken)
        return run(name, made, sum(option.bytes for option in taken), expected=sum(losses))

    room, stock = budget.for_linears(weights, found.fixed), sum(part.base for part in parts)
    table = [[part.layer, part.role, part.weights, [[option.scheme, option.bytes, loss] for option, loss in zip(
        part.options, found.losses[part.layer, part.role], strict=True)]] for part in parts]  # fmt: skip
    runs = [
        run("original", "original", 0),
        searched(arguments.budget, room) | {"search_seconds": seconds, "losses": table},
        run("stock w4a8", recipe, stock),
        searched("size of stock w4a8", stock),
    ]
    for scheme in arguments.uniform:
        same = [[option for option in part.options if option.scheme == scheme] for part in parts]
        # a part in which two group sizes come to the same has one of them, the smallest
        taken = [s[0] if s else min(p.options, key=lambda o: o.bytes) for p, s in zip(parts, same, strict=True)]
        runs.append(assigned(f"uniform {scheme}", taken))
        runs.append(searched(f"size of uniform {scheme}", sum(option.bytes for option in taken)))
    orders: dict[str, list[int]] = {"from the first": list(range(len(parts))), "from the last": list(range(len(parts)))}
    orders["from the last"].reverse()
    for seed in range(arguments.random):
        orders[f"at random, seed {seed}"] = random.Random(seed).sample(range(len(parts)), len(parts))
    return runs + [assigned(f"filled {name}, {arguments.budget}", fill(parts, order, room)) for name, order in
                   orders.items()]  # fmt: skip


def main() -> None:
    """Search, write the plan beside the output, and have it measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="directory of the models")
    parser.add_argument("--model", nargs="+", default=["mamba1-36m", "mamba2-50m"])
    parser.add_argument("--budget", default="4.5")
    parser.add_argument("--uniform", nargs="+", default=["w4a8-g16", "w4a8-g32", "w4a8-g64"], help="names of schemes")
    parser.add_argument("--schemes", default="same-inputs")
    parser.add_argument("--random", type=int, default=2, help="how many random assignments")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--compare", type=int, default=16384, help="tokens of text on which KL divergences are taken")
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
    for run in sorted(json.loads(arguments.output.read_text()), key=lambda run: run["model"]):
        perplexity, apart = (found for found in run["evaluations"])
        print(f"{run['model']:12} {run['name']:36} {run.get('bits', ''):8} {perplexity['perplexity']['value']:.4f} "
              f"KL {apart['kl_mean']:.6f} (expected {run.get('expected', 0):.6f})")  # fmt: skip


if __name__ == "__main__":
    main()
