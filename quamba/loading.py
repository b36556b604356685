"""Open a model, original or quantised, ready to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quamba import layouts
from quamba.checkpoint import resolve
from quamba.errors import UserError
from quamba.integrations import transformers as integration


def pick_device(name: str) -> torch.device:
    """"auto" (a GPU where there is one), "cpu" or "cuda". Raises UserError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is unknown; use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda' was asked for, but torch sees no GPU here; use --device cpu")
    return device


def load(source: str | Path, *, device: str = "auto", dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a Hub id, a directory (original or quantised) or an embedded checkpoint, in eval mode.

    dtype: of activations and of unquantised weights; None takes the checkpoint's. An original checkpoint of a known
    architecture runs on the same operators, in floats. Raises UserError for what cannot be opened.
    """
    path, where = resolve(source), pick_device(device)
    config = layouts.find(path).config(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype or "auto")
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be opened: {str(error).splitlines()[0]}") from None
    if getattr(config, "quantization_config", None) is None:
        integration.use_operators(model)
    return model.to(where).eval(), tokenizer
