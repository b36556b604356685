"""Hugging Face directories: config.json with a model type; safetensors, or else pytorch_model.bin; whole or sharded."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, __version__

from quamba.errors import UserError
from quamba.layouts import pickles
from quamba.layouts.layout import Index, Layout, Stored, read_json
from quamba.models import ARCHITECTURES
from quamba.pretrained import read_config

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"


def matches(path: Path) -> bool:
    """A config.json that names a model type."""
    file = path / "config.json"
    return file.is_file() and "model_type" in read_json(file)


def config(path: Path) -> Any:
    """The config of the language model: of a checkpoint that sees or hears too, the part that reads and writes text,
    where that is of a known type. Raises UserError as read_config does, and for a type that transformers lacks."""
    stated = read_json(path / "config.json")
    kind = stated["model_type"]
    if "auto_map" not in stated and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        raise UserError(
            f"{path} has the model type {kind!r}, which transformers {__version__} does not have; known types are "
            f"{', '.join(sorted(ARCHITECTURES))}, and of others in transformers the linears alone "
            "(quamba quantize --linears-only)"
        )
    whole = read_config(path)
    if whole.model_type in ARCHITECTURES:
        return whole
    part = whole.get_text_config()
    return part if part.model_type in ARCHITECTURES else whole


def index(path: Path) -> Index:
    """The tensors of all shards. Raises UserError for a file that is missing, and for an index that is not true."""
    for name in (SAFETENSORS, PICKLE):
        if (path / name).is_file():
            return contents(path / name)
        listed = path / f"{name}.index.json"
        if listed.is_file():
            where = weight_map(listed, Path(name).suffix)
            held = {file: contents(path / file) for file in sorted(set(where.values()))}
            for tensor, file in where.items():
                if tensor not in held[file]:
                    raise UserError(f"{listed} says that {file} holds {tensor!r}, which it lacks; download both again")
            return {tensor: held[file][tensor] for tensor, file in where.items()}
    raise UserError(f"{path} holds no weights: neither {SAFETENSORS} nor {PICKLE}, whole or with an index of shards")


def weight_map(listed: Path, suffix: str) -> dict[str, str]:
    """Tensor -> name of its file. Raises UserError when a file lies elsewhere or is missing."""
    where = read_json(listed).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(f'{listed} has no "weight_map" from tensors to files; download it again')
    for tensor, file in where.items():
        if not isinstance(file, str) or Path(file).name != file or Path(file).suffix != suffix:
            raise UserError(f"{listed} puts {tensor!r} into {file!r}, which is no {suffix} file of that directory")
        if not (listed.parent / file).is_file():
            raise UserError(f"{listed.parent} has no {file}, which {listed.name} lists; download it again")
    return where


def contents(file: Path) -> Index:
    """The tensors of one file."""
    return _safetensors(file) if file.suffix == ".safetensors" else pickles.index(file)


def _safetensors(file: Path) -> Index:
    try:
        with safe_open(file, "pt") as opened:
            found = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            told = {name: (tuple(tensor.get_shape()), tensor.get_dtype()) for name, tensor in found.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a readable safetensors file: {error}; download it again") from None
    return {name: Stored(shape, partial(_read, file, name), kind) for name, (shape, kind) in told.items()}


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, "pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(name)
        return tensor.clone()  # what is mapped keeps the address space of its whole file, which may be 5 GB


LAYOUT = Layout(
    name="huggingface",
    sign="a config.json with a model_type (Hugging Face)",
    matches=matches,
    config=config,
    index=index,
    native=True,
)
