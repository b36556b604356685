"""Read a Hugging Face checkpoint lazily; write a quantised one so that a killed run leaves the old one or none."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from quamba import embedded
from quamba.conversion import Conversion
from quamba.errors import UserError
from quamba.models import architecture
from quamba.models.spec import BlockSpec
from quamba.skeleton import Skeleton

SHARD_BYTES = 5 * 1024**3
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


def resolve(source: str | Path) -> Path:
    """The directory that MODEL means: an embedded checkpoint's name, a directory, or a Hub id (downloaded).

    Raises UserError when it is none of them.
    """
    if str(source) in embedded.names():
        return embedded.checkpoint(str(source))
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} holds no config.json, so it is not a Hugging Face model directory")
        return path
    if path.exists() or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        names = ", ".join(embedded.names())
        raise UserError(f"model {str(source)!r} is neither a directory, a Hub id, nor an embedded checkpoint ({names})")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"model {str(source)!r} is no directory here and the Hub did not give it: {error}") from None


class Checkpoint:
    """A model directory whose tensors are read one by one, under the names that its architecture uses today."""

    def __init__(self, source: str | Path) -> None:
        self.source, self.path = str(source), resolve(source)
        try:
            self.config: Any = AutoConfig.from_pretrained(self.path)
        except (ValueError, KeyError, OSError) as error:
            raise UserError(f"{self.path}/config.json cannot be read: {str(error).splitlines()[0]}") from None
        self.architecture = architecture(self.config)
        self.spec = self.architecture.describe(self.config)
        self._file = self._locate()
        self.quantised = getattr(self.config, "quantization_config", None) is not None
        self._conversion: Conversion | None = None
        if self.spec.hosted and not self.quantised:
            self._conversion = Conversion(Skeleton(self.config, self.spec).model, self._file)

    def _locate(self) -> dict[str, tuple[Path, str]]:
        """Today's name -> (file, name in the file)."""
        index = self.path / INDEX
        if index.is_file():
            files = sorted({self.path / f for f in json.loads(index.read_text())["weight_map"].values()})
        else:
            files = [self.path / SINGLE]
        found: dict[str, tuple[Path, str]] = {}
        for file in files:
            if not file.is_file():
                raise UserError(f"{self.path} has no {file.name}; only safetensors checkpoints are read")
            try:
                with safe_open(file, "pt") as opened:
                    found |= {self._today(name): (file, name) for name in opened.keys()}  # noqa: SIM118
            except SafetensorError as error:
                raise UserError(f"{file} is not a readable safetensors file: {error}") from None
        return found

    def _today(self, name: str) -> str:
        for old, new in self.architecture.renames:
            name = name.replace(old, new)
        return name

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor in the checkpoint's type. A tied head is the embedding.

        Raises UserError when it is missing or holds NaN or Inf.
        """
        known = self._file if self._conversion is None else self._conversion.sources
        if name not in known and name == f"{self.spec.head}.weight" and self.config.tie_word_embeddings:
            name = f"{self.spec.embedding}.weight"
        if name not in known:
            raise UserError(f"{self.path} lacks the tensor {name!r}, which a {self.config.model_type} model needs")
        tensor = self._read(name) if self._conversion is None else self._conversion.tensor(name, self._read)
        if not torch.isfinite(tensor).all():
            raise UserError(f"tensor {name!r} of {self.path} holds NaN or Inf")
        return tensor

    def _read(self, name: str) -> torch.Tensor:
        file, stored = self._file[name]
        with safe_open(file, "pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(stored)
        return tensor

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
        headers = {file: _header(file) for file, _ in self._file.values()}
        spans = {name: headers[file][stored]["data_offsets"] for name, (file, stored) in self._file.items()}
        sizes = {name: end - start for name, (start, end) in spans.items()}
        if self._conversion is None:
            return sizes
        return {name: sum(sizes[source] for source, _ in made) for name, made in self._conversion.sources.items()}

    def bytes(self) -> dict[str, int]:
        """Size of the parts at 16 bits per value: layers, embedding, lm_head (0 when tied)."""
        parts = {"layers": 0, "embedding": 0, "lm_head": 0}
        for name, (file, stored) in self._file.items():
            with safe_open(file, "pt") as opened:
                count = _product(opened.get_slice(stored).get_shape())
            parts[part_of(name, self.spec.embedding, self.spec.head)] += 2 * count
        return parts

    def tokenizer(self) -> Any:
        """Raises UserError when the directory has none."""
        try:
            return AutoTokenizer.from_pretrained(self.path)
        except (ValueError, OSError) as error:
            raise UserError(f"{self.path} has no tokenizer that can be read: {str(error).splitlines()[0]}") from None


def _header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file that ``safe_open`` has accepted: name -> dtype, shape, data_offsets."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(length))
    return header


def part_of(name: str, embedding: str, head: str) -> str:
    """Which part of the model a tensor counts to."""
    if name.startswith(embedding + "."):
        return "embedding"
    return "lm_head" if name.startswith(head + ".") else "layers"


def _product(values: Any) -> int:
    total = 1
    for value in values:
        total *= value
    return total


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
