"""Hugging Face directories: config.json with a model type; safetensors, or else pytorch_model.bin; whole or sharded."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from quamba.errors import UserError
from quamba.layouts import pickles
from quamba.layouts.layout import Index, Layout, Stored, read_json

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"


def matches(path: Path) -> bool:
    """A config.json that names a model type."""
    file = path / "config.json"
    return file.is_file() and "model_type" in read_json(file)


def config(path: Path) -> Any:
    """As transformers reads it."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{path}/config.json cannot be read: {str(error).splitlines()[0]}") from None


def files(path: Path) -> list[Path]:
    """The files of weights. Raises UserError when one is missing."""
    for name in (SAFETENSORS, PICKLE):
        listed = path / f"{name}.index.json"
        if listed.is_file():
            found = [path / shard for shard in sorted(set(read_json(listed)["weight_map"].values()))]
        elif (path / name).is_file():
            found = [path / name]
        else:
            continue
        for file in found:
            if not file.is_file():
                raise UserError(f"{path} has no {file.name}, which {listed.name} lists")
        return found
    raise UserError(f"{path} holds no weights: neither {SAFETENSORS} nor {PICKLE}, whole or with an index of shards")


def index(path: Path) -> Index:
    """The tensors of all shards."""
    found: Index = {}
    for file in files(path):
        found |= _safetensors(file) if file.suffix == ".safetensors" else pickles.index(file)
    return found


def _safetensors(file: Path) -> Index:
    try:
        with safe_open(file, "pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{file} is not a readable safetensors file: {error}") from None
    return {name: Stored(shape, partial(_read, file, name)) for name, shape in shapes.items()}


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, "pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(name)
    return tensor


LAYOUT = Layout(
    name="huggingface",
    sign="a config.json with a model_type (Hugging Face)",
    matches=matches,
    config=config,
    index=index,
    native=True,
)
