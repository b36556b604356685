"""Our operators in floats."""

from __future__ import annotations

import torch

from quamba.bench.contender import Baseline, Contender, half, ours
from quamba.bench.source import Source


def fp16(source: Source, dtype: torch.dtype, device: torch.device) -> Contender:
    """Weights and activations of ``dtype``, the state of the same width."""
    return ours(source, half(dtype), dtype, device)


BASELINES = {"fp16": Baseline(fp16)}
