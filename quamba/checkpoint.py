"""Read a checkpoint lazily, whatever its layout; write a quantised one so that a killed run leaves the old or none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

from quamba import embedded, layouts
from quamba.conversion import Conversion
from quamba.errors import UserError
from quamba.layouts.layout import read_json
from quamba.layouts.limits import check_sizes
from quamba.models import ARCHITECTURES, architecture, describe, undescribed
from quamba.models.spec import BlockSpec
from quamba.pretrained import UNREADABLE, sentence
from quamba.skeleton import Skeleton
from quamba.staging import Staging, publish
from quamba.tokenizer import adopt, open_tokenizer

SHARD_BYTES = 5 * 1024**3
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
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

    def __init__(
        self, source: str | Path, tokenizer: str | Path | None = None, *, linears_only: bool | None = False
    ) -> None:
        """tokenizer: as quamba.tokenizer.open_tokenizer takes it; None for the checkpoint's own. linears_only: of the
        model's structure nothing needs to be known, as in a directory of which only the linears were quantised; None
        where no file describes its type."""
        self.source, self.path = str(source), resolve(source)
        self.layout = layouts.find(self.path)
        found = self.layout.index(self.path)
        check_sizes(self.path, len(found))
        self.config: Any = self.layout.config(self.path)
        stated = getattr(self.config, "quantization_config", None)
        self.quantised = stated is not None
        if linears_only is None:
            linears_only = self.config.model_type not in ARCHITECTURES
        self.described = not linears_only and not (isinstance(stated, dict) and "linears_only" in stated)
        self.architecture = architecture(self.config) if self.described else undescribed(self.config)
        self.spec = describe(self.config) if self.described else self.architecture.describe(self.config)
        self._stored = {self._today(name): stored for name, stored in found.items()}
        self._conversion: Conversion | None = None
        if self.spec.hosted and not self.quantised:
            try:
                self._conversion = Conversion(Skeleton(self.config, self.spec).model, self._stored)
            except UNREADABLE as error:
                raise UserError(f"{self.path} stands for no {self.config.model_type}: {sentence(error)}") from error
        self._given, self._tokenizer = tokenizer, None

    def _today(self, name: str) -> str:
        for old, new in self.architecture.renames:
            name = name.replace(old, new)
        return name

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor in the checkpoint's type. A tied head is the embedding.

        Raises UserError when it is missing, holds NaN or Inf, or is no float in an original.
        """
        key = self._key(name)
        tensor = self._read(key) if self._conversion is None else self._conversion.tensor(key, self._read)
        if not self.quantised and tensor.dtype not in FLOATS:
            raise UserError(f"tensor {name!r} of {self.path} is {tensor.dtype}; expected a float of 16, 32 or 64 bits")
        if not torch.isfinite(tensor).all():
            raise UserError(f"tensor {name!r} of {self.path} holds NaN or Inf")
        return tensor

    def _read(self, name: str) -> torch.Tensor:
        return self._stored[name].read()

    def _key(self, name: str) -> str:
        """The known name of a tensor that the model needs."""
        known = self._stored if self._conversion is None else self._conversion.sources
        if name not in known and name == f"{self.spec.head}.weight" and self.config.tie_word_embeddings:
            name = f"{self.spec.embedding}.weight"
        if name not in known:
            raise UserError(f"{self.path} lacks the tensor {name!r}, which a {self.config.model_type} model needs")
        return name

    def check(self) -> None:
        """Compare every tensor that the config implies with what is stored, before memory is asked for by the config.

        Raises UserError for one that is missing or of another shape; one that is made of others is not looked at.
        """
        table = (self.spec.vocab, self.spec.d_model)
        self._check_shape(f"{self.spec.embedding}.weight", table)
        self._check_shape(f"{self.spec.head}.weight", table)
        self._check_shape(f"{self.spec.final_norm}.weight", (self.spec.d_model,))
        for block in self.spec.blocks:
            for name, shape in _shapes(block).items():
                self._check_shape(f"{block.path}.{name}", shape)
            self._check_borrowed(block)

    def _check_borrowed(self, block: BlockSpec) -> None:
        """Raises UserError where a block holds other weights than those that it should borrow."""
        if block.borrows is None:
            return
        here, lender = f"{block.path}.{block.borrows[0]}.", f"{block.borrows[1]}."
        known = self._stored if self._conversion is None else self._conversion.sources
        for name in known:
            if name.startswith(here) and not torch.equal(
                self.tensor(name), self.tensor(lender + name.removeprefix(here))
            ):
                raise UserError(f"{name} of {self.path} differs from that of {lender[:-1]}, whose weights it should be")

    def _check_shape(self, name: str, shape: tuple[int, ...], got: tuple[int, ...] | None = None) -> None:
        key = self._key(name)
        if got is None:
            stored = key if self._conversion is None else self._conversion.as_stored(key)
            got = shape if stored is None else self._stored[stored].shape
        if got != shape:
            raise UserError(f"tensor {name} of {self.path} should be {list(shape)} by its config, is {list(got)}")

    def block(self, block: BlockSpec) -> dict[str, torch.Tensor]:
        """The tensors of one block, by path below it. Raises UserError for a shape that does not fit."""
        shapes = _shapes(block)
        tensors = {name: self.tensor(f"{block.path}.{name}") for name in (*shapes, *block.params)}
        for name, shape in shapes.items():
            self._check_shape(f"{block.path}.{name}", shape, tuple(tensors[name].shape))
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


def _shapes(block: BlockSpec) -> dict[str, tuple[int, ...]]:
    """Path below the block -> shape of every tensor that its sublayers read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, sub in block.norms.items():
        shapes |= {f"{path}.{leaf}": (sub.width,) for leaf in sub.norm_tensors}
    for sub in block.sublayers:
        shapes |= {sub.mixer.name(param.path): sub.mixer.shape(param) for param in sub.mixer.params}
    return shapes


def part_of(name: str, embedding: str, head: str) -> str:
    """Which part of the model a tensor counts to."""
    if name.startswith(embedding + "."):
        return "embedding"
    return "lm_head" if name.startswith(head + ".") else "layers"


class Writer:
    """A directory of tensors that appears whole. Use as a context; ``finish`` makes it real.

    Raises UserError as Staging does; ``source`` is the directory that is read meanwhile.
    """

    def __init__(self, output: str | Path, overwrite: bool, source: Path) -> None:
        self.staging = Staging(output, overwrite, source)
        self.output, self.folder = self.staging.output, self.staging.folder
        self.sizes: dict[str, int] = {}
        self._shards: list[list[str]] = []
        self._pending: dict[str, torch.Tensor] = {}
        self._bytes = 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self.staging.close()

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
        with self.staging.writing():
            shard = self.folder / f"shard-{len(self._shards)}"
            save_file(self._pending, shard, metadata={"format": "pt"})
            publish(shard)
        self._shards.append(list(self._pending))
        self._pending, self._bytes = {}, 0

    def finish(self, files: dict[str, str]) -> Path:
        """Flush, name the shards, write the other files (name -> text), and move into place."""
        self._flush()
        count = len(self._shards)
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if count > 1:
            where = {tensor: names[i] for i, shard in enumerate(self._shards) for tensor in shard}
            index = {"metadata": {"total_size": sum(self.sizes.values())}, "weight_map": where}
            files = {**files, INDEX: json.dumps(index, indent=2)}
        with self.staging.writing():
            for i, name in enumerate(names):
                (self.folder / f"shard-{i}").rename(self.folder / name)
            for name, text in files.items():
                (self.folder / name).write_text(text, encoding="utf-8")
            self.staging.commit()
        return self.output


class Onlooker(Writer):
    """Stands where another rank has the Writer: takes the same calls, and writes nothing."""

    def __init__(self, output: str | Path) -> None:
        self.output, self.sizes = Path(output).absolute(), {}

    def __exit__(self, *error: object) -> None: ...

    def add(self, tensors: dict[str, torch.Tensor]) -> None: ...

    def finish(self, files: dict[str, str]) -> Path:
        return self.output


def generation_config(checkpoint: Checkpoint) -> str:
    """The text of generation_config.json: the checkpoint's own, or what its config implies.

    Raises UserError when the checkpoint's own is no JSON object.
    """
    own = checkpoint.path / "generation_config.json"
    if own.is_file():
        read_json(own)
        return own.read_text(encoding="utf-8")
    return str(GenerationConfig.from_model_config(checkpoint.config).to_json_string())
