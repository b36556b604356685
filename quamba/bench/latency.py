"""Clocks, and what is said about a series of times, under the names that vLLM's benchmarks use."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

METRICS = ("ttft", "tpot", "itl", "e2el")
"""Time to the first token, per further token of a request, between two tokens, and to the last token (TTLT)."""


class Clock:
    """Marks on the way of a device; on CUDA events, which the host does not wait for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[Any] = []

    def start(self) -> None:
        """Wait for the device, forget all marks and set the first."""
        self._marks = []
        self.wait()
        self.mark()

    def mark(self) -> None:
        """Note the time at which the work given so far is done."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def wait(self) -> None:
        """Wait until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def milliseconds(self) -> list[float]:
        """Between neighbouring marks."""
        self.wait()
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self.device.type == "cuda":
            return [start.elapsed_time(end) for start, end in pairs]
        return [1e3 * (end - start) for start, end in pairs]


@dataclass(frozen=True)
class Times:
    """Milliseconds of one request of a batch: of the prefill with the first token, then of each further token."""

    first: float
    further: tuple[float, ...]

    @property
    def all(self) -> float:
        """To the last token."""
        return self.first + sum(self.further)


def summary(requests: Sequence[Times]) -> dict[str, float]:
    """mean_ttft_ms, median_ttft_ms, std_ttft_ms, p90_ttft_ms, p99_ttft_ms, and the same for tpot, itl and e2el.

    itl is over all tokens of all requests, the others over requests. Percentiles are interpolated between neighbours.
    """
    series = {
        "ttft": [r.first for r in requests],
        "tpot": [sum(r.further) / len(r.further) for r in requests],
        "itl": [token for r in requests for token in r.further],
        "e2el": [r.all for r in requests],
    }
    found: dict[str, float] = {}
    for name in METRICS:
        values = np.asarray(series[name])
        found[f"mean_{name}_ms"] = float(values.mean())
        found[f"median_{name}_ms"] = float(np.median(values))
        found[f"std_{name}_ms"] = float(values.std())
        found[f"p90_{name}_ms"] = float(np.percentile(values, 90))
        found[f"p99_{name}_ms"] = float(np.percentile(values, 99))
    return found


def throughput(requests: Sequence[Times], batch: int, prompt: int, generate: int) -> dict[str, float]:
    """Requests and tokens per second, one request of the batch after the other."""
    seconds = sum(r.all for r in requests) / 1e3
    count = batch * len(requests)
    return {
        "request_throughput": count / seconds,
        "output_throughput": count * generate / seconds,
        "total_token_throughput": count * (prompt + generate) / seconds,
        "prefill_throughput": count * prompt / (sum(r.first for r in requests) / 1e3),
        "decode_throughput": count * (generate - 1) / (sum(sum(r.further) for r in requests) / 1e3),
    }
