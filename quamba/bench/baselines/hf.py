"""transformers' own model, eager, as its ``generate`` runs it."""

from __future__ import annotations

from typing import Any

import torch

from quamba.bench.contender import Baseline, Contender, Ours
from quamba.bench.source import Source


class Transformers(Ours):
    """Nothing of ours; its steps are not captured, since transformers does not."""

    captures = False


def hf(source: Source, dtype: torch.dtype, device: torch.device) -> Contender:
    """A fresh model of the source's config."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(source.config, dtype=dtype).eval()
    return Transformers(model, "hf")


BASELINES = {"hf": Baseline(hf)}
