"""Read a checkpoint lazily, whatever its layout; write a quantised one so that a killed run leaves the old or none."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

from quamba import embedded, layouts
from quamba.conversion import Conversion
from quamba.errors import UserError
from quamba.models import architecture
from quamba.models.spec import BlockSpec
from quamba.skeleton import Skeleton
from quamba.tokenizer import adopt, open_tokenizer

SHARD_BYTES = 5 * 1024**3
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
HUB_PICKLES = ["pytorch_model*.bin", "*model_optim_rng.pt"]
"""Downloaded only where a repository has no safetensors."""


def resolve(source: str | Path) -> Path:
    """The directory that MODEL means: an embedded checkpoint's name, a directory, or a Hub id (downloaded).

    Raises UserError when it is none of them.
    """
    if str(source) in embedded.names():
        return embedded.checkpoint(str(source))
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        names = ", ".join(embedded.names())
        raise UserError(f"model {str(source)!r} is neither a directory, a Hub id, nor an embedded checkpoint ({names})")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(str(source), allow_patterns=HUB_FILES))
        if not any(path.glob("*.safetensors")):
            path = Path(snapshot_download(str(source), allow_patterns=HUB_FILES + HUB_PICKLES))
        return path
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"model {str(source)!r} is no directory here and the Hub did not give it: {error}") from None


class Checkpoint:
    """A model directory whose tensors are read one by one, under the names that its architecture uses today."""

    def __init__(self, source: str | Path, tokenizer: str | Path | None = None) -> None:
        """tokenizer: as quamba.tokenizer.open_tokenizer takes it; None for the checkpoint's own."""
        self.source, self.path = str(source), resolve(source)
        self.layout = layouts.find(self.path)
        self.config: Any = self.layout.config(self.path)
        self.architecture = architecture(self.config)
        self.spec = self.architecture.describe(self.config)
        self._stored = {self._today(name): stored for name, stored in self.layout.index(self.path).items()}
        self.quantised = getattr(self.config, "quantization_config", None) is not None
        self._conversion: Conversion | None = None
        if self.spec.hosted and not self.quantised:
            self._conversion = Conversion(Skeleton(self.config, self.spec).model, self._stored)
        self._given, self._tokenizer = tokenizer, None

    def _today(self, name: str) -> str:
        for old, new in self.architecture.renames:
            name = name.replace(old, new)
        return name

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor in the checkpoint's type. A tied head is the embedding.

        Raises UserError when it is missing or holds NaN or Inf.
        """
        known = self._stored if self._conversion is None else self._conversion.sources
        if name not in known and name == f"{self.spec.head}.weight" and self.config.tie_word_embeddings:
            name = f"{self.spec.embedding}.weight"
        if name not in known:
            raise UserError(f"{self.path} lacks the tensor {name!r}, which a {self.config.model_type} model needs")
        tensor = self._read(name) if self._conversion is None else self._conversion.tensor(name, self._read)
        if not torch.isfinite(tensor).all():
            raise UserError(f"tensor {name!r} of {self.path} holds NaN or Inf")
        return tensor

    def _read(self, name: str) -> torch.Tensor:
        return self._stored[name].read()

    def block(self, block: BlockSpec) -> dict[str, torch.Tensor]:
        """The tensors of one block, by path below it. Raises UserError for a shape that does not fit."""
        shapes: dict[str, tuple[int, ...]] = {}
        for path, sub in block.norms.items():
            leaves = ("weight",) if sub.norm_kind == "rms" else ("weight", "bias")
            shapes |= {f"{path}.{leaf}": (sub.mixer.axes["resid"].size,) for leaf in leaves}
        for sub in block.sublayers:
            shapes |= {sub.mixer.name(param.path): sub.mixer.shape(param) for param in sub.mixer.params}
        tensors = {name: self.tensor(f"{block.path}.{name}") for name in (*shapes, *block.params)}
        for name, shape in shapes.items():
            got = tuple(tensors[name].shape)
            if got != shape:
                raise UserError(
                    f"tensor {block.path}.{name} of {self.path} should be {list(shape)} by its config, is {list(got)}"
                )
        return tensors

    def stored(self) -> dict[str, int]:
        """Bytes in the files of every tensor that the model's modules hold, by its name there."""
        sizes = {name: self._read(name).nbytes for name in self._stored}
        if self._conversion is None:
            return sizes
        return {name: sum(sizes[source] for source, _ in made) for name, made in self._conversion.sources.items()}

    def bytes(self) -> dict[str, int]:
        """Size of the parts at 16 bits per value: layers, embedding, lm_head (0 when tied)."""
        parts = {"layers": 0, "embedding": 0, "lm_head": 0}
        for name in self._stored if self._conversion is None else self._conversion.sources:
            sources = [name] if self._conversion is None else [n for n, _ in self._conversion.sources[name]]
            count = sum(math.prod(self._stored[source].shape) for source in sources)
            parts[part_of(name, self.spec.embedding, self.spec.head)] += 2 * count
        return parts

    def tokenizer(self) -> Any:
        """Raises UserError as quamba.tokenizer.open_tokenizer does. A layout whose config knows no special tokens
        learns them from it."""
        if self._tokenizer is None:
            self._tokenizer = open_tokenizer(self.path, self.layout, self._given)
            if not self.layout.native:
                adopt(self.config, self._tokenizer)
        return self._tokenizer


def part_of(name: str, embedding: str, head: str) -> str:
    """Which part of the model a tensor counts to."""
    if name.startswith(embedding + "."):
        return "embedding"
    return "lm_head" if name.startswith(head + ".") else "layers"


class Writer:
    """A directory written beside its final place, fsynced and renamed. Use as a context; ``finish`` makes it real."""

    def __init__(self, output: str | Path, overwrite: bool) -> None:
        self.output = Path(output).absolute()
        if self.output.exists() and not overwrite:
            raise UserError(f"output {output} exists; give another directory or --overwrite")
        if self.output.exists() and not (self.output / "config.json").is_file() and any(self.output.iterdir()):
            raise UserError(f"output {output} exists and is no model directory, so it is not overwritten")
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix=f".{self.output.name}.", dir=self.output.parent))
        except OSError as error:
            raise UserError(f"output {output} cannot be written: {error.strerror}") from None
        self.folder.chmod(0o755)
        self.sizes: dict[str, int] = {}
        self._shards: list[list[str]] = []
        self._pending: dict[str, torch.Tensor] = {}
        self._bytes = 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Append tensors; a shard is flushed to disk when it is full."""
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            if self._pending and self._bytes + size > SHARD_BYTES:
                self._flush()
            self._pending[name] = tensor.contiguous().cpu()
            self.sizes[name] = size
            self._bytes += size

    def _flush(self) -> None:
        save_file(self._pending, self.folder / f"shard-{len(self._shards)}", metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._bytes = {}, 0

    def finish(self, files: dict[str, str]) -> Path:
        """Flush, name the shards, write the other files (name -> text), fsync, and move into place."""
        self._flush()
        count = len(self._shards)
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for i, name in enumerate(names):
            (self.folder / f"shard-{i}").rename(self.folder / name)
        if count > 1:
            where = {tensor: names[i] for i, shard in enumerate(self._shards) for tensor in shard}
            index = {"metadata": {"total_size": sum(self.sizes.values())}, "weight_map": where}
            files = {**files, INDEX: json.dumps(index, indent=2)}
        for name, text in files.items():
            (self.folder / name).write_text(text, encoding="utf-8")
        for path in self._everything():
            _sync(path)
        if self.output.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{self.output.name}.", dir=self.output.parent)) / "old"
            self.output.rename(old)
            self.folder.rename(self.output)
            shutil.rmtree(old.parent)
        else:
            self.folder.rename(self.output)
        _sync(self.output.parent)
        return self.output

    def _everything(self) -> Iterator[Path]:
        yield from (p for p in self.folder.rglob("*"))
        yield self.folder


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def generation_config(checkpoint: Checkpoint) -> str:
    """The text of generation_config.json: the checkpoint's own, or what its config implies."""
    own = checkpoint.path / "generation_config.json"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    return str(GenerationConfig.from_model_config(checkpoint.config).to_json_string())
