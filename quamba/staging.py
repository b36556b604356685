"""A directory that appears whole or not at all: written beside its place, fsynced, and put there in one step."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from quamba.errors import UserError

PARTIAL, ASIDE = ".partial", ".aside"
AT_FDCWD, RENAME_EXCHANGE = -100, 2


class Staging:
    """``folder`` is where to write; ``commit`` puts it in the place of ``output``, and until then that stays as it was.

    A run holds a lock on its folder, so that the next one for the same output can tell what a killed run left behind.
    Raises UserError for an output that exists (unless ``overwrite`` and a model lies there), is or holds the directory
    ``source`` that is being read, or cannot be written.
    """

    def __init__(self, output: str | Path, overwrite: bool, source: Path) -> None:
        self.asked, self.overwrite = output, overwrite
        self._made: list[Path] = []
        with self.writing():
            self.output = Path(output).absolute()
            if self.output.is_symlink():
                self.output = self.output.resolve()
            tidy(self.output)
            if self.output.exists():
                self._may_replace(source.resolve())
            try:
                self._make_parents()
                self.folder, self._lock = claim(self.output)
            except OSError:
                self._remove_parents()
                raise

    def _may_replace(self, source: Path) -> None:
        if not self.overwrite:
            raise UserError(f"output {self.asked} exists; give another directory or --overwrite")
        if self.output.resolve() in (source, *source.parents):
            raise UserError(f"output {self.asked} holds the model that is being read; give another directory")
        model = (self.output / "config.json").is_file()
        if not self.output.is_dir() or not model and any(self.output.iterdir()):
            raise UserError(f"output {self.asked} exists and is no model directory, so it is not overwritten")

    def _make_parents(self) -> None:
        for parent in reversed(self.output.parents):
            if not parent.exists():
                parent.mkdir(exist_ok=True)
                self._made.append(parent)

    def _remove_parents(self) -> None:
        for parent in reversed(self._made):
            with suppress(OSError):
                parent.rmdir()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn what the system says against writing into a UserError."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(
                f"output {self.asked} cannot be written: {reason}; give a directory that can, with room for the model"
            ) from None

    def commit(self) -> None:
        """Fsync everything and move it into place; an old output is exchanged for it in one step where Linux can."""
        for path in (*self.folder.rglob("*"), self.folder):
            sync(path)
        if not self.output.exists():
            self.folder.rename(self.output)
        elif not self.overwrite:
            raise UserError(f"output {self.asked} was made by somebody else meanwhile; give another directory")
        elif exchange(self.folder, self.output):
            shutil.rmtree(self.folder, ignore_errors=True)
        else:  # two steps; ``tidy`` undoes the first if the second never came
            aside = self.folder.with_name(self.folder.name + ASIDE)
            self.output.rename(aside)
            try:
                self.folder.rename(self.output)
            except OSError:
                aside.rename(self.output)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        sync(self.output.parent)
        self._made = []

    def close(self) -> None:
        """Remove what was not committed, with the parents that were made for it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        release(self._lock)
        self._remove_parents()


def claim(output: Path) -> tuple[Path, int | None]:
    """A new directory beside ``output``, and the descriptor that holds its lock; None where there are no locks."""
    held, tries = None, 3
    while held is None and tries:  # another run may take it for a leftover, between its making and its lock
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=PARTIAL, dir=output.parent))
        try:
            held, tries = lock(folder), tries - 1
        except OSError:
            break
        if held is None and tries:
            shutil.rmtree(folder, ignore_errors=True)
    publish(folder)
    return folder, held


def lock(folder: Path) -> int | None:
    """The descriptor of a directory, locked until it is closed or the process ends; None if another process has it, or
    it is gone. Raises OSError where the file system knows no locks."""
    try:
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(held), os.stat(folder)):
            return held
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(held)
        raise
    os.close(held)
    return None


def release(held: int | None) -> None:
    """Give back a lock."""
    if held is not None:
        os.close(held)


def tidy(output: Path) -> None:
    """Remove what killed runs left beside ``output``, and put back an old one that was moved aside and not replaced."""
    if not output.parent.is_dir():
        return
    leftover = re.compile(rf"\.{re.escape(output.name)}\.\w{{8}}{re.escape(PARTIAL)}({re.escape(ASIDE)})?")
    for path in sorted(output.parent.iterdir()):
        matched = leftover.fullmatch(path.name)
        if matched is None or path.is_symlink() or not path.is_dir():
            continue
        with suppress(OSError):  # without locks nobody can tell a leftover, so nobody removes one
            held = lock(path)
            if held is not None and matched[1] and not output.exists():
                path.rename(output)
            elif held is not None:
                shutil.rmtree(path, ignore_errors=True)
            release(held)


def exchange(a: Path, b: Path) -> bool:
    """Let two directories change places in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0)


def publish(path: Path) -> None:
    """Let everybody read a file or a directory whom the umask lets: tempfile and safetensors make private ones."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def sync(path: Path) -> None:
    """Wait until a file or a directory is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
