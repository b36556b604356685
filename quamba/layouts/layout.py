"""The vocabulary in which a layout of checkpoint files describes itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from quamba.errors import UserError


@dataclass(frozen=True)
class Stored:
    """One tensor in a file; nothing of it is in memory before it is read, and nothing once what was read is dropped.
    type: as safetensors names it ("I8"), "" elsewhere."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    type: str = ""


Index = dict[str, Stored]
"""By name, under the names of today's transformers (or older ones that the architecture renames)."""


@dataclass(frozen=True)
class Layout:
    """One file in quamba.layouts.

    sign: what a directory of this layout holds, to finish "holds neither ..."; matches: whether a directory does, true
    for one layout at most; config: the transformers config that the directory stands for; index: its tensors.
    native: transformers opens the directory itself. tokenizer: the Hub id of the one such models use, where the
    directory has none. All of them raise UserError for what is broken or cannot be represented.
    """

    name: str
    sign: str
    matches: Callable[[Path], bool]
    config: Callable[[Path], Any]
    index: Callable[[Path], Index]
    native: bool = False
    tokenizer: str | None = None


def made(kind: Callable[..., Any], origin: Path, **values: Any) -> Any:
    """A transformers config of a causal language model, without special tokens, as only the tokenizer knows them.

    Raises UserError for values that the config refuses.
    """
    # not at the top: while transformers is being imported this module already is, and its models are not there yet
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = kind(**values, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{origin} describes a model that transformers refuses: {reason}") from None
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    return config


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError when it is none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} should hold a JSON object, and holds a {type(value).__name__}")
    return value
