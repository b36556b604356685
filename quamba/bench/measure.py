"""Time contenders in turn, after a proof that what is timed computes what it should."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quamba import memory
from quamba.bench.contender import Contender
from quamba.bench.energy import EnergyMeter
from quamba.bench.latency import METRICS, Clock, Times, summary, throughput
from quamba.bench.request import Request

GATE_STEPS = 8
"""Decoded tokens that are compared before anything is timed."""
WARM_RUNS = 6
"""More than enough calls for every part to be captured."""
ENERGY_SECONDS = 1.0
"""NVML's counter advances some tens of times a second."""

Progress = Callable[[str, int, int], None]


class WrongOutput(RuntimeError):
    """What was captured does not compute what eager calls compute, so its time means nothing."""


@dataclass(frozen=True)
class Plan:
    """What is measured: every batch with every prompt length, ``generate`` tokens each, ``rounds`` times in turn."""

    batches: Sequence[int]
    prompts: Sequence[int]
    generate: int
    rounds: int = 10
    capture: bool = True
    seed: int = 0


@torch.inference_mode()
def measure(
    contenders: Sequence[Contender], plan: Plan, device: torch.device, vocab: int, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """One entry for each contender, batch and prompt length; see ``summary`` and ``throughput`` for its keys.

    What does not fit the device's memory becomes an entry with ``error``. Raises WrongOutput.
    """
    rows: list[dict[str, Any]] = []
    settings = [(batch, prompt) for batch in plan.batches for prompt in plan.prompts]
    for done, (batch, prompt) in enumerate(settings):
        if progress is not None:
            progress("settings", done, len(settings))
        random = torch.Generator().manual_seed(plan.seed)
        ids = torch.randint(0, vocab, (batch, prompt), generator=random).to(device)
        rows += _setting(contenders, ids, plan, device)
        memory.collect(device)  # graphs of requests that are gone, which refer to themselves
    if progress is not None:
        progress("settings", len(settings), len(settings))
    return rows


def _setting(
    contenders: Sequence[Contender], ids: torch.Tensor, plan: Plan, device: torch.device
) -> list[dict[str, Any]]:
    batch, prompt = ids.shape
    rows: list[dict[str, Any]] = [
        {
            "kind": "measured", "recipe": contender.recipe, "batch": batch, "prompt": prompt,
            "generate": plan.generate, "weight_bytes": contender.weight_bytes,
            "resident_bytes": contender.resident_bytes,
        }
        for contender in contenders
    ]  # fmt: skip
    requests = [_prepare(c, ids, plan, device, row) for c, row in zip(contenders, rows, strict=True)]
    clock, meter = Clock(device), EnergyMeter(device)
    for row, request, found in zip(rows, requests, _time(requests, plan, clock), strict=True):
        if request is None:
            continue
        row |= {"requests": len(found), **summary(found), **throughput(found, batch, prompt, plan.generate)}
        if (energy := joules(request, plan.generate, clock, meter)) is not None:
            row["energy_per_request_j"] = energy / batch
            row["energy_per_output_token_j"] = energy / batch / plan.generate
    return rows


def _prepare(
    contender: Contender, ids: torch.Tensor, plan: Plan, device: torch.device, row: dict[str, Any]
) -> Request | None:
    """A request that passed the gate, with what it took noted in ``row``; None where memory is short."""
    try:
        with memory.watch(device) as peak:
            request = contender.request(ids, plan.generate)
            capture = plan.capture and contender.captures and device.type == "cuda"
            row["gate"] = gate(request, min(GATE_STEPS, plan.generate - 1), capture)
        row["peak_bytes"] = contender.resident_bytes + peak.bytes
        row["state_bytes_per_sequence"] = request.state_bytes
        return request
    except torch.OutOfMemoryError:
        row["error"] = "out of memory"
    memory.collect(device)  # not while the exception holds the frames, and with them the tensors
    return None


def gate(request: Request, steps: int, capture: bool) -> str:
    """Prove the request: eager twice, then captured, on the same prompts. Returns how exact the proof is.

    "bitwise": the logits of the prefill and of every step are equal bit for bit; "tokens": eager runs differ from each
    other in their last bits, so only the chosen tokens are compared; "eager": nothing is captured, as with a cache that
    grows. Leaves the request ready to be timed. Raises WrongOutput.
    """
    request.capture(False)
    first, second = run(request, steps), run(request, steps)
    repeatable = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    _compare(first, second, False, "a second eager run")
    request.capture(capture)
    for _ in range(WARM_RUNS):
        if request.warm:
            break
        run(request, steps)
    if not any(part.capture for part in request.captured):
        return "eager"
    _compare(first, run(request, steps), repeatable, "the captured run")
    return "bitwise" if repeatable else "tokens"


def run(request: Request, steps: int) -> list[torch.Tensor]:
    """Logits [B, V] of a prefill and of the steps after it."""
    found = [request.prefill().clone()]
    found += [request.step().clone() for _ in range(steps)]
    return found


def _compare(wanted: list[torch.Tensor], got: list[torch.Tensor], bitwise: bool, what: str) -> None:
    for step, (a, b) in enumerate(zip(wanted, got, strict=True)):
        where = f"{what} at {'the prefill' if step == 0 else f'step {step}'}"
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise WrongOutput(f"The logits of {where} are not finite.")
        if not torch.equal(a.argmax(-1), b.argmax(-1)) or (bitwise and not torch.equal(a, b)):
            off = (a.float() - b.float()).abs().max().item()
            raise WrongOutput(f"The logits of {where} differ from those of the first eager run by up to {off:.3g}.")


def _time(requests: Sequence[Request | None], plan: Plan, clock: Clock) -> list[list[Times]]:
    """Times of each request; all take turns, so that a drift of the machine meets all alike."""
    times: list[list[Times]] = [[] for _ in requests]
    for _ in range(plan.rounds):
        for i, request in enumerate(requests):
            if request is not None:
                clock.wait()
                times[i].append(one(request, plan.generate, clock))
    return times


def joules(request: Request, generate: int, clock: Clock, meter: EnergyMeter) -> float | None:
    """Of one request: several, one behind the other for ENERGY_SECONDS, share what the counter says of them."""
    clock.wait()
    before = meter.joules()
    if before is None:
        return None
    start, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - start < ENERGY_SECONDS:
        one(request, generate, clock)
        count += 1
    after = meter.joules()
    assert after is not None  # as before
    return (after - before) / count


def one(request: Request, generate: int, clock: Clock) -> Times:
    """Time one request."""
    clock.start()
    request.prefill()
    clock.mark()
    for _ in range(generate - 1):
        request.step()
        clock.mark()
    first, *further = clock.milliseconds()
    return Times(first, tuple(further))


def compare(rows: list[dict[str, Any]], baselines: Sequence[str]) -> None:
    """Add to every entry ``speedup``: baseline -> metric -> the baseline's time over its own, same batch and prompt.

    Times are medians, or predictions.
    """
    for row in rows:
        for name in baselines:
            keys = ("batch", "prompt", "generate")
            other = next((r for r in rows if r["recipe"] == name and all(r[k] == row[k] for k in keys)), {})
            times = {metric: (_of(other, metric), _of(row, metric)) for metric in METRICS}
            ratios = {metric: slow / fast for metric, (slow, fast) in times.items() if slow and fast}
            if ratios:
                row.setdefault("speedup", {})[name] = ratios


def _of(row: dict[str, Any], metric: str) -> float | None:
    return row.get(f"median_{metric}_ms", row.get(f"predicted_{metric}_ms"))
