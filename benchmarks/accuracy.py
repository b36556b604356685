"""Measure what each part of a recipe costs: quantise variants of stock recipes, evaluate each, write one JSON file.

    python benchmarks/accuracy.py PLAN.yaml --text validation.txt --calibration calibration.txt --output results.json

A plan lists runs {model, recipe, name, set: {dotted.key: value}, evaluate: [...]}; recipe is a stock recipe's name, a
whole recipe as a mapping, or "original" for the checkpoint in fp32, and an evaluation is
{windows, window, stepwise, state: {dtype, rounding}}, {tasks: [...]}, or {compare: tokens}, the KL divergence from the
checkpoint in fp32.
Runs go in parallel processes (--jobs); finished ones are kept when the file exists.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import yaml


def variant(stock: str | dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The recipe's data with dotted keys replaced ("linears.default.method": "rtn")."""
    from quamba.recipe import stock_recipes

    data = stock if isinstance(stock, dict) else yaml.safe_load(stock_recipes()[stock].read_text())
    for key, value in changes.items():
        *path, last = key.split(".")
        place = data
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return data


def measure(
    model: Any, tokenizer: Any, what: dict[str, Any], pair: tuple[Any, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """One evaluation: perplexity with the recurrent state stored as ``state`` says, lm-eval tasks, or the divergence
    of ``pair``, the checkpoint's directory and the quantised one's."""
    import quamba
    from quamba import evaluate
    from quamba.recipe import StateSpec

    start = time.perf_counter()
    if "tasks" in what:
        batch_size = what.get("batch_size", 64)
        found = evaluate.tasks(model, tokenizer, what["tasks"], tasks_path=arguments.tasks_path, batch_size=batch_size)
        result: dict[str, Any] = {"tasks": {name: found[name] for name in what["tasks"]}}
    elif "compare" in what:
        apart = quamba.compare(*pair, text=arguments.text, tokens=what["compare"], max_new_tokens=0,
                               device=arguments.device)  # fmt: skip
        result = {"kl_mean": apart.kl_mean, "kl_p99": apart.kl_p99, "top1_agreement": apart.top1_agreement}
    else:
        for module in model.modules():
            if "state" in what and hasattr(module, "state_spec"):
                module.state_spec = StateSpec(**what["state"])
        result = {"perplexity": evaluate.perplexity(
            model, tokenizer, arguments.text, window=what.get("window", 1024), max_windows=what["windows"],
            stepwise=what.get("stepwise", False), batch_size=what.get("batch_size"),
        )}  # fmt: skip
        result["perplexity"]["file"] = Path(arguments.text).name
    return {**what, **result, "seconds": round(time.perf_counter() - start, 1)}


def run_one(run: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Quantise one run and evaluate it in this process."""
    import torch

    import quamba
    from quamba.recipe import parse_recipe

    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        source = run["model"]
        if run["recipe"] != "original":
            source = Path(scratch) / "quantised"
            recipe = parse_recipe(variant(run["recipe"], run.get("set", {})), run["name"])
            report = quamba.quantize(
                run["model"], recipe, source, calibration_text=arguments.calibration, device=arguments.device
            )
            result = {"seconds": round(report.seconds, 1), "peak_memory": report.peak_memory, "sizes": report.sizes}
        model, tokenizer = quamba.load(source, device=arguments.device, dtype=torch.float32)
        result["evaluations"] = [
            measure(model, tokenizer, what, (run["model"], source), arguments) for what in run["evaluate"]
        ]
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    return {**run, "model": Path(run["model"]).name, **result, "device": device, "date": date.today().isoformat()}


def main() -> None:
    """Read the plan, run what is missing, write after every finished run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", help="YAML file with a list of runs, or one run as JSON")
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tasks-path", help="directory of lm-eval YAML files")
    parser.add_argument("--models", type=Path, default=Path("."), help="directory of the models named in the plan")
    arguments = parser.parse_args()
    if arguments.plan.startswith("{"):
        print(json.dumps(run_one(json.loads(arguments.plan), arguments)))
        return
    plan = yaml.safe_load(Path(arguments.plan).read_text())
    done = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    finished = {(r["model"], r["name"]) for r in done}
    waiting = [r for r in plan if (r["model"], r["name"]) not in finished]

    def launch(run: dict[str, Any]) -> None:
        job = json.dumps({**run, "model": str(arguments.models / run["model"])})
        options = ["--text", arguments.text, "--calibration", arguments.calibration, "--device", arguments.device]
        options += ["--tasks-path", arguments.tasks_path] if arguments.tasks_path else []
        command = [sys.executable, __file__, job, *options, "--threads", str(arguments.threads)]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            print(run["model"], run["name"], "FAILED", process.stderr[-1500:], flush=True)
            return
        result = json.loads(process.stdout.splitlines()[-1])
        done.append(result)
        arguments.output.write_text(json.dumps(done, indent=1))
        shown = [
            f"{found['perplexity']['value']:.4f}" if "perplexity" in found
            else f"KL {found['kl_mean']:.6f}" if "kl_mean" in found else json.dumps(found["tasks"])
            for found in result["evaluations"]
        ]  # fmt: skip
        print(run["model"], run["name"], *shown, f"{result.get('seconds')} s", flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(launch, waiting))


if __name__ == "__main__":
    main()
