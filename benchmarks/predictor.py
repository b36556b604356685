"""How good the predictions of `quamba bench --predict` are: beside published figures, and beside what was measured.

    python benchmarks/predictor.py benchmarks/published/*.yaml [BENCH.json ...]

A JSON is what `quamba bench --shape ... --json` wrote on a device that is known by its name. Prints one markdown table
a file: found, predicted, predicted / found; and whether the model was said to fit where it did or did not.
"""

from __future__ import annotations

import argparse
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from quamba.bench import cost, source
from quamba.bench.contender import half
from quamba.bench.device import load_device, recognise
from quamba.bench.predict import predict
from quamba.models import describe
from quamba.recipe import Recipe, load_recipe, parse_recipe

DTYPE = torch.float16
FP16 = "fp16"


def read(path: Path) -> tuple[str, list[dict[str, Any]], dict[str, Recipe]]:
    """What a file is called, its rows (device, shape, recipe, batch, prompt; tpot_ms, ttft_ms, fits) and recipes."""
    if path.suffix != ".json":
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        return data["source"], data["rows"], {name: changed(name, **c) for name, c in data["recipes"].items()}
    data = json.loads(path.read_text(encoding="utf-8"))
    device = recognise(data["device_name"])
    if device is None:
        raise SystemExit(f"{path}: {data['device_name']!r} is no known device")
    rows = [
        {"device": device.name, "shape": data["model_id"], "recipe": row["recipe"], "batch": row["batch"],
         "prompt": row["prompt"], "tpot_ms": row["median_tpot_ms"], "ttft_ms": row["median_ttft_ms"]}
        for row in data["results"] if "median_tpot_ms" in row and row["recipe"] not in ("hf", "float")
    ]  # fmt: skip
    for row in rows:
        row["recipe"] = FP16 if row["recipe"].startswith("mamba-ssm") else row["recipe"]
    names = {row["recipe"] for row in rows} - {FP16}
    recipes = {name: beside if (beside := path.with_name(f"{name}.yaml")).exists() else name for name in names}
    return f"{path.name}, {data['device_name']}", rows, {name: load_recipe(file) for name, file in recipes.items()}


def changed(name: str, base: str, linears: dict[str, Any] | None = None, **rest: Any) -> Recipe:
    """A stock recipe with other entries for some roles."""
    data = load_recipe(base).model_dump(mode="json")
    return parse_recipe({**data, "linears": {**data["linears"], **(linears or {})}, **rest}, name)


@cache
def counted(shape: str, recipe: Recipe | str) -> cost.Cost:
    """The cost of a shape; a recipe is hashed by its text, since it holds dictionaries."""
    chosen = parse_recipe(json.loads(recipe), shape) if isinstance(recipe, str) else recipe
    config = source.from_shape(shape).config
    return cost.count(config, chosen.for_width(describe(config).d_model), DTYPE)


def compare(rows: list[dict[str, Any]], recipes: dict[str, Recipe]) -> tuple[list[str], list[float]]:
    """Lines of a table, and predicted / found of every time."""
    lines, ratios = [], []
    for row in rows:
        recipe = half(DTYPE) if row["recipe"] == FP16 else recipes[row["recipe"]]
        found = predict(
            counted(row["shape"], recipe.model_dump_json()), load_device(row["device"]), row["batch"], row["prompt"], 2
        )
        head = f"| {row['device']} | {row['shape']} | {row['recipe']} | {row['batch']} |"
        fits = "fits" if found.fits else "does not fit"
        if row.get("fits") is False:
            lines.append(f"{head} memory | does not fit | {fits}, {found.memory / 1e9:.1f} GB | |")
            continue
        note = "" if found.fits else f" ({fits})"
        for key, value in (("tpot", found.tpot), ("ttft", found.ttft)):
            if f"{key}_ms" in row:
                ratios.append(value / row[f"{key}_ms"])
                what = key.upper() + (f" of {row['prompt']}" if key == "ttft" else "")
                lines.append(f"{head} {what} | {row[f'{key}_ms']:.2f} | {value:.2f}{note} | {ratios[-1]:.2f} |")
    return lines, ratios


def main() -> None:
    """Print a table for every file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    for path in parser.parse_args().files:
        title, rows, recipes = read(path)
        lines, ratios = compare(rows, recipes)
        mean = math.exp(sum(math.log(r) for r in ratios) / len(ratios))
        print(f"{title}: predicted / found {mean:.2f} in geometric mean, {min(ratios):.2f} to {max(ratios):.2f}\n")
        print("| device | model | recipe | batch | what | found ms | predicted ms | ratio |")
        print("| --- | --- | --- | ---: | --- | ---: | ---: | ---: |")
        print("\n".join(lines), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
