"""Finished layers of a quantisation that is not finished, kept beside its output for another run to go on from there.

A layer's tensors are one file each; of the samples' hidden states, which are large, only the latest are kept. A file is
written, fsynced and renamed, so what a killed run leaves is whole. What a run must have been given to go on with the
layers of another is compared part by part; the same bytes come out as if nobody had interrupted it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import safetensors
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import quamba
import quamba_kernels
from quamba.calibrate import HIDDEN, Samples
from quamba.checkpoint import Checkpoint, Writer
from quamba.errors import UserError
from quamba.ranks import ALONE, Ranks
from quamba.recipe import Recipe
from quamba.staging import claim, lock, release, sync

Tensors = dict[str, torch.Tensor]
KEY = "key.json"
SHARE = 0.05
"""Of the time, what may go into keeping hidden states: they are written again when the last write has paid off."""
HEAD = 2**20


def key(
    checkpoint: Checkpoint, recipe: Recipe, tokens: torch.Tensor, seed: int, device: torch.device
) -> dict[str, str]:
    """What decides a run's bytes, by name: files are known by size, time and first MiB (names, types, shapes)."""
    weights = hashlib.sha256()
    for file in sorted(checkpoint.path.iterdir()):
        if file.suffix in (".json", ".safetensors", ".bin", ".pt"):
            about = file.stat()
            weights.update(f"{file.name} {about.st_size} {about.st_mtime_ns}\n".encode())
            with file.open("rb") as opened:
                weights.update(opened.read(HEAD))
    code = hashlib.sha256()
    for package in (quamba, quamba_kernels):
        for file in sorted(Path(str(package.__file__)).parent.rglob("*.py")):
            code.update(file.read_bytes())
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "model": weights.hexdigest(),
        "recipe": hashlib.sha256(recipe.model_dump_json().encode()).hexdigest(),
        "calibration text": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "calibration windows": "x".join(map(str, tokens.shape)),
        "seed": str(seed),
        "device": f"{device.type}, {hardware}, {torch.get_num_threads()} threads",
        "versions": f"quamba {quamba.__version__}, torch {torch.__version__}, safetensors {safetensors.__version__}",
        "quamba's code": code.hexdigest(),
    }


class FinishedLayers:
    """The directory ``.OUTPUT.progress`` of the runs with one key, a context while this run has it to itself.

    done: how many layers it holds with the hidden states after the last of them. Raises UserError when what lies there
    was made with another key, belongs to a run that still goes on, or cannot be written.
    """

    def __init__(self, output: Path, wanted: dict[str, str], ranks: Ranks = ALONE) -> None:
        self.output, self.folder, self.ranks = output, place(output), ranks
        self._lock: int | None = None
        self._cost, self._saved = 0.0, -float("inf")
        self.done: int = ranks.tell(self._open(wanted) if ranks.first else 0)

    def _open(self, wanted: dict[str, str]) -> int:
        """Take the directory, making it where there is none; the number of layers in it."""
        with self._writing():
            if not self.folder.exists():
                self._begin(wanted)
            held = lock(self.folder)
        if held is None:
            raise UserError(f"{self.folder} belongs to a run that still goes on; wait for it or give another output")
        self._lock = held
        try:
            self._compare(wanted)
        except UserError:
            self.__exit__()
            raise
        kept = [path.name.partition("-")[2] for path in self.folder.glob("hidden-*")]
        return max((int(layers) for layers in kept if layers.isdigit()), default=0)

    def __enter__(self) -> FinishedLayers:
        return self

    def __exit__(self, *error: object) -> None:
        release(self._lock)
        self._lock = None

    def _compare(self, wanted: dict[str, str]) -> None:
        try:
            found = json.loads((self.folder / KEY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(f"{self.folder} holds no layers that can be taken over; delete it") from None
        other = [name for name, value in wanted.items() if found.get(name) != value]
        if other:
            raise UserError(
                f"{self.folder} holds layers of a run that had another {', another '.join(other)}; "
                "repeat what that run was given, or delete it to start anew"
            )

    def _begin(self, wanted: dict[str, str]) -> None:
        made, held = claim(self.output)
        try:
            (made / KEY).write_text(json.dumps(wanted, indent=2), encoding="utf-8")
            sync(made / KEY)
            made.rename(self.folder)
            sync(self.folder.parent)
        finally:
            release(held)

    def restore(self, writer: Writer, samples: Samples) -> int:
        """Give the finished layers to the writer, set the samples to what they are after the last, and return how many
        layers they are. Called by all ranks."""
        samples.take(self._after(writer, samples) if self.ranks.first else None)
        return self.done

    def _after(self, writer: Writer, samples: Samples) -> Tensors:
        """What was kept of the samples after the finished layers, which the writer takes."""
        try:
            for layer in range(self.done):
                writer.add(self._read(f"layer-{layer}"))
            found = self._read(f"hidden-{self.done}")
            got = tuple(found[HIDDEN].shape)
        except (OSError, SafetensorError, LookupError, TypeError, RuntimeError) as error:
            raise UserError(f"{self.folder} cannot be read: {error}; delete it to start anew") from None
        wanted = (samples.count, *samples.hidden.shape[1:])
        if got != wanted:
            raise UserError(f"{self.folder} holds hidden states {list(got)}, not {list(wanted)}; delete it")
        return found

    def layer(self, layer: int) -> Tensors:
        """The tensors of a finished layer, by full name. Called by all ranks."""
        found = self._read(f"layer-{layer}") if self.ranks.first else None
        tensors = {}
        for name, (shape, dtype) in self.ranks.outline(found).items():
            tensors[name] = torch.empty(shape, dtype=dtype) if found is None else found[name]
            self.ranks.publish(tensors[name], 0)
        return tensors

    def keep(self, layer: int, tensors: Tensors, samples: Samples) -> None:
        """Keep a finished layer and, where the last time has paid off, the samples' hidden states after it."""
        start = time.monotonic()
        if self.ranks.first:
            with self._writing():
                self._write(f"layer-{layer}", tensors)
            start = time.monotonic()
        if not self.ranks.tell(not (start - self._saved) * SHARE < self._cost):
            return
        whole = samples.whole()
        if whole is not None:
            with self._writing():
                self._write(f"hidden-{layer + 1}", whole)
                for old in self.folder.glob("hidden-*"):
                    if old.name != f"hidden-{layer + 1}":
                        old.unlink()
        self._saved = time.monotonic()
        self._cost = self._saved - start

    def _write(self, name: str, tensors: Tensors) -> None:
        partial = self.folder / f"{name}.partial"
        order = {"order": json.dumps(list(tensors))}  # safetensors sorts by type, and shards fill in order
        save_file({n: t.contiguous().cpu() for n, t in tensors.items()}, partial, metadata=order)
        sync(partial)
        partial.rename(self.folder / name)
        sync(self.folder)

    def _read(self, name: str) -> Tensors:
        with safe_open(self.folder / name, "pt") as opened:
            return {n: opened.get_tensor(n) for n in json.loads(opened.metadata()["order"])}

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"{self.folder} cannot be written: {reason}; make room, or run without --resume") from None


def place(output: Path) -> Path:
    """Where the progress towards an output is kept."""
    return output.with_name(f".{output.name}.progress")


def forget(output: Path) -> None:
    """Remove the progress towards an output that is complete, unless a run still goes on with it."""
    folder = place(output)
    with suppress(OSError):
        held = lock(folder) if (folder / KEY).is_file() else None
        if held is not None:
            scratch, other = claim(output)
            folder.rename(scratch / "progress")  # first, so that no part of it is taken for all
            shutil.rmtree(scratch, ignore_errors=True)
            release(other)
            release(held)
