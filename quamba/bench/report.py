"""What is printed and written: one JSON document, and markdown tables in the manner of llama-bench."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import date
from typing import Any

import torch

Row = dict[str, Any]

LATENCY = ("model", "recipe", "size", "device", "batch", "test", "ms", "p90 ms", "t/s")
MEMORY = ("recipe", "batch", "prompt", "weights MB", "resident MB", "peak MB", "state KB per sequence")
PREDICTED = (
    "model", "recipe", "size", "device", "batch", "test", "predicted ms", "floor ms", "t/s", "memory GB", "fits",
)  # fmt: skip


def document(
    rows: Sequence[Row], *, model: str, device: torch.device | None, dtype: torch.dtype, settings: Row
) -> Row:
    """Everything that is known about a run. device is None where nothing was run."""
    import quamba

    where: Row = {} if device is None else {"device": device.type, "device_name": device_name(device)}
    if device is not None and device.type == "cpu":
        where["threads"] = torch.get_num_threads()
    return {
        "quamba": quamba.__version__, "date": date.today().isoformat(), "torch": torch.__version__, **where,
        "model_id": model, "dtype": str(dtype).removeprefix("torch."), **settings, "results": list(rows),
    }  # fmt: skip


def device_name(device: torch.device) -> str:
    """As the driver or the operating system calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def tables(report: Row, baselines: Sequence[str]) -> str:
    """Markdown: times and ratios, then memory, of what was measured; one table of what was predicted."""
    measured = [r for r in report["results"] if r["kind"] == "measured"]
    predicted = [r for r in report["results"] if r["kind"] == "prediction"]
    parts, ratios = [], [f"vs {name}" for name in baselines]
    if measured:
        lines = [line for row in measured for line in _times(row, report, baselines)]
        parts += [_markdown((*LATENCY, *ratios), lines), _markdown(MEMORY, [_memory(row) for row in measured])]
    if predicted:
        lines = [line for row in predicted for line in _predicted(row, report["model_id"], baselines)]
        parts.append("Predictions, nothing was run:\n\n" + _markdown((*PREDICTED, *ratios), lines))
    return "\n\n".join(parts)


def _tests(row: Row) -> list[tuple[str, str]]:
    """The three rows of a setting, as llama-bench names them, with their metric."""
    prompt, generate = f"pp{row['prompt']}", f"tg{row['generate']}"
    return [(f"{prompt} (TTFT)", "ttft"), (f"{generate} @ d{row['prompt']} (TPOT)", "tpot"),
            (f"{prompt}+{generate} (TTLT)", "e2el")]  # fmt: skip


RATES = {"ttft": "prefill_throughput", "tpot": "decode_throughput", "e2el": "output_throughput"}


def _times(row: Row, report: Row, baselines: Sequence[str]) -> list[list[str]]:
    head = [report["model_id"], row["recipe"], _gigabytes(row["weight_bytes"]), report["device"], str(row["batch"])]
    lines = []
    for test, metric in _tests(row):
        if "error" in row:
            lines.append([*head, test, row["error"], "", "", *("" for _ in baselines)])
            continue
        lines.append([
            *head, test, f"{row[f'median_{metric}_ms']:.3f}", f"{row[f'p90_{metric}_ms']:.3f}",
            f"{row[RATES[metric]]:.1f}", *_ratios(row, metric, baselines),
        ])  # fmt: skip
    return lines


def _ratios(row: Row, metric: str, baselines: Sequence[str]) -> list[str]:
    found = [row.get("speedup", {}).get(name, {}).get(metric) for name in baselines]
    return ["" if ratio is None else f"{ratio:.2f}x" for ratio in found]


def _memory(row: Row) -> list[str]:
    sizes = [row[key] / 1e6 if key in row else None for key in ("weight_bytes", "resident_bytes", "peak_bytes")]
    state = row.get("state_bytes_per_sequence")
    return [row["recipe"], str(row["batch"]), str(row["prompt"]), *("" if s is None else f"{s:.1f}" for s in sizes),
            "" if state is None else f"{state / 1e3:.1f}"]  # fmt: skip


def _predicted(row: Row, model: str, baselines: Sequence[str]) -> list[list[str]]:
    head = [model, row["recipe"], _gigabytes(row["weight_bytes"]), row["device"], str(row["batch"])]
    lines = []
    per_pass = {"ttft": row["prompt"], "tpot": 1, "e2el": row["generate"]}
    for test, metric in _tests(row):
        time, floor = row[f"predicted_{metric}_ms"], row.get(f"predicted_{metric}_floor_ms")
        lines.append([
            *head, test, f"{time:.3f}", "" if floor is None else f"{floor:.3f}",
            f"{row['batch'] * per_pass[metric] / time * 1e3:.1f}", f"{row['predicted_memory_bytes'] / 1e9:.2f}",
            "yes" if row["fits"] else "no", *_ratios(row, metric, baselines),
        ])  # fmt: skip
    return lines


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3f} GB"


def _markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---" if column in ("model", "recipe", "device", "test") else "---:" for column in columns]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *lines))
