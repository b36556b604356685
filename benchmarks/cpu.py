"""Tokens per second on the CPU beside transformers' own bf16, in one run: prefill of 512 tokens, decode at batch 1.

    python benchmarks/cpu.py ORIGINAL QUANTISED [QUANTISED ...] --output results.json

Every model is measured --rounds times in turn, so that a drift of the machine meets all alike; the median is reported.
Peak memory is the resident set of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch


def open_model(source: str, original: bool) -> Any:
    """transformers' own classes for the original, quamba's for the others; bf16 activations for both."""
    from transformers import AutoModelForCausalLM

    import quamba

    if original:
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    return quamba.load(source, device="cpu", dtype=torch.bfloat16)[0]


@torch.inference_mode()
def measure(model: Any, prompt: int, tokens: int) -> dict[str, float]:
    """Tokens per second of one prefill and of greedy decoding after it."""
    ids = torch.randint(10, 1000, (1, prompt), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    output = model(ids, use_cache=True, logits_to_keep=1)
    prefill = prompt / (time.perf_counter() - start)
    cache, token = output.cache_params, output.logits[:, -1:].argmax(-1)
    start = time.perf_counter()
    for _ in range(tokens):
        output = model(token, cache_params=cache, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    return {"prefill": prefill, "decode": tokens / (time.perf_counter() - start)}


def peak_memory(source: str, original: bool) -> int:
    """Peak resident bytes of a process that opens the model, reads 512 tokens and decodes 8."""
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[3]); import cpu; "
        "cpu.measure(cpu.open_model(sys.argv[1], sys.argv[2] == 'True'), 512, 8); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    arguments = [sys.executable, "-c", code, source, str(original), str(Path(__file__).parent)]
    return int(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    """Measure all models in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="the original directory first, then quantised ones")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    opened = [open_model(source, i == 0) for i, source in enumerate(arguments.models)]
    samples: list[dict[str, list[float]]] = [{"prefill": [], "decode": []} for _ in opened]
    for round_ in range(arguments.rounds + 1):
        for model, kept in zip(opened, samples, strict=True):
            for name, value in measure(model, arguments.prompt, arguments.tokens).items():
                if round_:  # the first is the warm-up
                    kept[name].append(value)
    rows = []
    for i, (source, kept) in enumerate(zip(arguments.models, samples, strict=True)):
        row: dict[str, Any] = {"model": Path(source).name, "peak_memory": peak_memory(source, i == 0)}
        for name, values in kept.items():
            row[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
            row[f"{name}_ratio"] = row[name]["median"] / statistics.median(samples[0][name])
        rows.append(row)
        print(
            f"| {row['model']} | {row['prefill']['median']:.0f} | {row['prefill_ratio']:.2f}x | "
            f"{row['decode']['median']:.1f} | {row['decode_ratio']:.2f}x | {row['peak_memory'] / 1e6:.0f} |", flush=True
        )  # fmt: skip
    if arguments.output:
        capability = torch.backends.cpu.get_cpu_capability()
        header = {"date": date.today().isoformat(), "threads": arguments.threads, "cpu": capability,
                  "prompt": arguments.prompt, "tokens": arguments.tokens, "torch": torch.__version__}  # fmt: skip
        arguments.output.write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
