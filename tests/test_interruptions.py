"""A run that is killed, short of room or repeated: the output is the old one, none, or the complete new one."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

import quamba
from quamba.staging import tidy

SERVER = """
import json, os, resource, signal, sys

import torch
torch.set_num_threads(1)
import quamba.cli, quamba.cli.console, quamba.loading, quamba.pipeline, quamba.resume
quamba.resume.SHARE = float("inf")  # keep the hidden states after every layer, however short it was
from transformers import Mamba2ForCausalLM

CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod")


def die_at(last, root):
    seen = 0

    def watch(event, arguments):
        nonlocal seen
        # what rmtree removes it names below a directory that it holds open
        if event in CHANGES and (str(arguments[0]).startswith(root) or not os.path.isabs(str(arguments[0]))):
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def work(arguments, log, limit=None, last=None, root=None, exchange=True):
    if not exchange:
        quamba.staging.exchange = lambda a, b: False
    for stream in (1, 2):
        os.dup2(os.open(log + ".out" if stream == 1 else log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if last is not None:
        die_at(last, root)
    quamba.cli.app(arguments)


for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            work(**json.loads(line))
        except SystemExit as done:
            os._exit(done.code or 0)
        finally:
            os._exit(70)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Server:
    """A process that has imported everything and forks a `quamba` for each request, so that a kill meets the work."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "stderr"
        env = {**os.environ, "PYTHONHASHSEED": "7"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def __call__(self, *arguments: object, after: float | None = None, **options: object) -> int:
        """Run `quamba ARGUMENTS`, killed ``after`` seconds; the exit status, negative for a signal."""
        request = {"arguments": [str(a) for a in arguments], "log": str(self.log), **options}
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        child = int(self.process.stdout.readline())
        if after is not None:
            time.sleep(after)
            with suppress(ProcessLookupError):  # it was done already
                os.kill(child, signal.SIGKILL)
        return int(self.process.stdout.readline())

    @property
    def error(self) -> str:
        """What the last command wrote to stderr."""
        return self.log.read_text()


@pytest.fixture(scope="module")
def quamba_process(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.process.stdin.close()
    server.process.wait()


@pytest.fixture(scope="module")
def job(quamba_process, tiny_checkpoint, text, tmp_path_factory):
    """A small quantisation, and what it writes when nothing happens to it."""
    return Job(quamba_process, tiny_checkpoint("mamba2")[0], text, tmp_path_factory.mktemp("complete"))


class Job:
    """(output, options) -> the status. folders, complete: by recipe, what an undisturbed run writes, and its files."""

    def __init__(self, process: Server, source: Path, text: Path, folder: Path) -> None:
        self.process, self.source, self.text = process, source, text
        self.plain = folder / "plain.yaml"
        self.plain.write_text("summary: Rotated floats, which take no time.")
        self.folders = {"w8a8": folder / "w8a8", str(self.plain): folder / "plain"}
        for recipe, output in self.folders.items():
            assert self(output, recipe=recipe) == 0
        self.complete = {recipe: contents(output) for recipe, output in self.folders.items()}

    def arguments(self, output: Path, *more: object, recipe: str = "w8a8", source: object = None) -> list[object]:
        """The command line."""
        always = ("--samples", 2, "--seqlen", 16, "--calibration", self.text, "--device", "cpu")
        return ["quantize", source or self.source, "--recipe", recipe, "--output", output, *always, *more]

    def __call__(
        self, output: Path, *more: object, recipe: str = "w8a8", source: object = None, **options: object
    ) -> int:
        status = self.process(*self.arguments(output, *more, recipe=recipe, source=source), **options)
        assert status in (0, -signal.SIGKILL), self.process.error
        return status


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of every file; none where there is no directory."""
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


@pytest.mark.parametrize("old", [False, True], ids=["no output", "an old output"])
def test_killed_at_any_time_a_run_leaves_the_old_output_or_none(old, job, tmp_path):
    rng, output, killed = random.Random(0), tmp_path / "q", 0
    start = time.monotonic()
    assert job(tmp_path / "timed") == 0
    duration = time.monotonic() - start
    shutil.rmtree(tmp_path / "timed")
    for attempt in range(6):
        if attempt % 3 == 0:
            shutil.rmtree(output, ignore_errors=True)
            if old:
                shutil.copytree(job.folders[str(job.plain)], output)
        before = contents(output)
        killed += job(output, "--overwrite", after=duration * rng.random()) < 0
        assert contents(output) in (before, job.complete["w8a8"])
    assert killed >= 3
    assert job(output, "--overwrite") == 0
    assert contents(output) == job.complete["w8a8"]
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


@pytest.mark.parametrize("old, exchange", [(False, True), (True, True), (True, False)])
def test_killed_at_every_change_of_a_directory(old, exchange, job, tmp_path):
    """Killed before each step that makes, renames or removes something; ``exchange``: whether the system can do that to
    two directories at once. Where it cannot, the next run puts back what was moved aside."""
    for last in itertools.count(1):
        folder = tmp_path / str(last)
        output = folder / "q"
        folder.mkdir()
        if old:
            shutil.copytree(job.folders["w8a8"], output)
        status = job(output, "--overwrite", recipe=str(job.plain), last=last, root=str(folder), exchange=exchange)
        allowed = [job.complete["w8a8"] if old else {}, job.complete[str(job.plain)]]
        if exchange:
            assert contents(output) in allowed
        tidy(output)
        assert contents(output) in allowed
        assert [path.name for path in folder.iterdir()] == (["q"] if output.exists() else [])
        if status == 0:
            break
    assert last > (10 if old else 4)


def test_a_killed_run_is_resumed_to_the_same_bytes(job, quamba_process, tiny_checkpoint, tmp_path):
    """Killed again and again, each time a few steps further: every run goes on where the last one stood."""
    output, source = tmp_path / "q", tiny_checkpoint("mamba2", (("num_hidden_layers", 5),))[0]
    assert job(tmp_path / "whole", source=source) == 0
    whole, told = contents(tmp_path / "whole"), []
    shutil.rmtree(tmp_path / "whole")
    while not output.exists():
        job(output, "--resume", source=source, last=11, root=str(tmp_path))
        told += re.findall(r"^resuming after (\d) of 5 layers, kept in \S+$", quamba_process.error, re.MULTILINE)
        assert len(told) < 9
    assert len(told) >= 2 and told == sorted(set(told)), told
    assert contents(output) == whole
    assert job(output, "--overwrite", "--resume", source=source) == 0
    assert contents(output) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_a_resumed_run_without_its_key_is_refused_and_an_ordinary_one_starts_anew(job, quamba_process, tmp_path):
    output = tmp_path / "q"
    assert job(output, "--resume", last=9, root=str(tmp_path)) == -signal.SIGKILL
    assert (tmp_path / ".q.progress").is_dir()
    arguments = job.arguments(output, "--resume", "--seed", 1)
    assert quamba_process(*arguments) == 2
    assert re.fullmatch(
        r"Error: \S+/\.q\.progress holds layers of a run that had another calibration text, another seed; repeat what "
        r"that run was given, or delete it to start anew\.\n",
        quamba_process.error,
    )
    assert [path.name for path in tmp_path.iterdir()] == [".q.progress"]
    assert job(output) == 0 and "resuming" not in quamba_process.error
    assert contents(output) == job.complete["w8a8"]
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_one_seed_gives_one_directory_in_any_process(job, tiny_checkpoint, text, tmp_path):
    """The other process has another hash seed and has run nothing else."""
    folder, _ = tiny_checkpoint("mamba2")
    for name in ("first", "second"):
        output = tmp_path / name
        quamba.quantize(folder, "w8a8", output, samples=2, seqlen=16, calibration_text=text, device="cpu")
        assert contents(output) == job.complete["w8a8"]
    quamba.quantize(folder, "w8a8", tmp_path / "third", samples=2, seqlen=16, calibration_text=text, seed=1)
    assert contents(tmp_path / "third")["model.safetensors"] != job.complete["w8a8"]["model.safetensors"]


@pytest.mark.parametrize("old", [False, True], ids=["no output", "an old output"])
@pytest.mark.parametrize("limit", [600, 100_000])
def test_files_that_may_not_grow(limit, old, job, quamba_process, tmp_path):
    """As on a full disk, but by the system's own limit: of the first shard, of the small files."""
    output = tmp_path / "q"
    if old:
        shutil.copytree(job.folders[str(job.plain)], output)
    before = contents(output)
    assert quamba_process(*job.arguments(output, "--overwrite"), limit=limit) == 2
    assert re.fullmatch(r"Error: output \S+/q cannot be written: .*File too large.*\n", quamba_process.error)
    assert contents(output) == before
    assert [path.name for path in tmp_path.iterdir()] == (["q"] if old else [])
