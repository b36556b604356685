"""Roofline estimates: how long a device would need for the bytes and operations that were counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quamba.bench.cost import Cost, Trace, Work
from quamba.bench.device import Device


@dataclass(frozen=True)
class Prediction:
    """Milliseconds of a prefill, of a decoded token, and of a whole request; floors leave out the gaps between kernels.

    memory: bytes needed, fits: whether the device has them.
    """

    ttft: float
    tpot: float
    e2el: float
    ttft_floor: float
    tpot_floor: float
    memory: float
    fits: bool


def predict(cost: Cost, device: Device, batch: int, prompt: int, generate: int) -> Prediction:
    """A request of ``batch`` prompts of ``prompt`` tokens that generates ``generate`` tokens for each."""
    prefill, decode = cost.prefill.at(batch, prompt), cost.decode.at(batch, 1)
    first, token = floor(prefill, device), floor(decode, device)
    ttft, tpot = first + gaps(prefill, device), token + gaps(decode, device)
    memory = cost.memory(batch, prompt)
    return Prediction(
        ttft, tpot, ttft + (generate - 1) * tpot, first, token, memory, device.fits(memory)
    )


def floor(trace: Trace, device: Device) -> float:
    """Milliseconds if every operator ran at the device's achievable rates, each as its slowest part."""
    return sum(_slowest(work, device) for work in trace.values()) * 1e3


def gaps(trace: Trace, device: Device) -> float:
    """Milliseconds between the kernels."""
    return sum(work.calls for work in trace.values()) * device.kernel_gap / 1e3


def _slowest(work: Work, device: Device) -> float:
    share = device.achievable
    arithmetic = work.int8 / (device.int8 * share.int8 * 1e12) + work.float16 / (device.fp16 * share.fp16 * 1e12)
    special = work.exponentials / (device.exponentials * 1e12) if device.exponentials else 0.0
    return max(work.bytes / (device.bandwidth * share.bandwidth * 1e9), arithmetic, special)


def row(label: dict[str, Any], cost: Cost, device: Device, batch: int, prompt: int, generate: int) -> dict[str, Any]:
    """A prediction as an entry of the report; its keys say so, lest one is taken for a measurement."""
    found = predict(cost, device, batch, prompt, generate)
    return {
        "kind": "prediction", "device": device.name, **label, "batch": batch, "prompt": prompt, "generate": generate,
        "predicted_ttft_ms": found.ttft, "predicted_tpot_ms": found.tpot, "predicted_e2el_ms": found.e2el,
        "predicted_ttft_floor_ms": found.ttft_floor, "predicted_tpot_floor_ms": found.tpot_floor,
        "predicted_output_throughput": batch * generate / found.e2el * 1e3,
        "weight_bytes": cost.stored, "state_bytes_per_sequence": cost.state, "predicted_memory_bytes": found.memory,
        "device_memory_bytes": device.memory_gib * 2**30, "fits": found.fits,
    }  # fmt: skip
