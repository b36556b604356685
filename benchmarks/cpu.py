"""Tokens per second on the CPU beside transformers' own bf16 and fp32, in one run: prefill of 512 tokens, decode of one
sequence.

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


def open_model(source: str) -> Any:
    """transformers' own classes in bf16 or fp32 for "bfloat16:DIR" and "float32:DIR", quamba's in bf16 for DIR."""
    from transformers import AutoModelForCausalLM

    import quamba

    name, colon, path = source.partition(":")
    if colon:
        return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, name)).eval()
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


def peak_memory(source: str) -> int:
    """Peak resident bytes of a process that opens the model, reads 512 tokens and decodes 8."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); import cpu; "
        "cpu.measure(cpu.open_model(sys.argv[1]), 512, 8); "
        # not getrusage: its maximum survives exec, so a child would report its parent's
        "print(1024 * int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]))"
    )
    arguments = [sys.executable, "-c", code, source, str(Path(__file__).parent)]
    return int(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    """Measure all models in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="the original directory first, then quantised ones")
    parser.add_argument("--no-fp32", action="store_true", help="leave transformers in fp32 out")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    original, *quantised = arguments.models
    baselines = ["bfloat16"] if arguments.no_fp32 else ["bfloat16", "float32"]
    sources = [f"{name}:{original}" for name in baselines] + quantised
    opened = [open_model(source) for source in sources]
    samples: list[dict[str, list[float]]] = [{"prefill": [], "decode": []} for _ in opened]
    for round_ in range(arguments.rounds + 1):
        for model, kept in zip(opened, samples, strict=True):
            for name, value in measure(model, arguments.prompt, arguments.tokens).items():
                if round_:  # the first is the warm-up
                    kept[name].append(value)
    rows = []
    for source, kept in zip(sources, samples, strict=True):
        name, colon, path = source.partition(":")
        label = f"{Path(path).name}, transformers {name}" if colon else Path(source).name
        row: dict[str, Any] = {"model": label, "peak_memory": peak_memory(source)}
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
