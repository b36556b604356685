"""Several processes: the bytes and numbers of one, said once, and an end in one sentence when one of them fails."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

import quamba
from quamba import embedded
from quamba.calibrate import Samples
from quamba.cli import app
from quamba.quantizers import Hessian
from quamba.ranks import ALONE, Ranks

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
JOBS = """
import json, sys
import torch
torch.set_num_threads(1)
import quamba, quamba.pipeline
from quamba import resume
from quamba.ranks import joined

resume.SHARE = float("inf")
quantise_block = quamba.pipeline.quantise_block

def stopping(until):
    def stop(block, *rest):
        if block.layer_idx == until:
            raise KeyboardInterrupt
        return quantise_block(block, *rest)

    return stop

with joined(torch.device("cpu")) as ranks:
    for source, recipe, output, options in json.loads(sys.argv[1]):
        if options["resume"]:
            quamba.pipeline.quantise_block = stopping(options["resume"])
            try:
                quamba.quantize(source, recipe, output, ranks=ranks, **options)
            except KeyboardInterrupt:
                pass
            quamba.pipeline.quantise_block = quantise_block
        report = quamba.quantize(source, recipe, output, ranks=ranks, say=lambda line: print(line), **options)
        assert report.sizes["layers"] > 0, report.sizes
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_three_processes_write_the_bytes_of_one(tiny_checkpoint, text, tmp_path):
    """Of ten samples in batches of four; of one batch, which leaves processes without any; of experts; of a block that
    layers share; of layers that hand on more than hidden states; resumed after some layers."""
    common = {"calibration_text": str(text), "seqlen": 24, "device": "cpu"}
    jobs = [
        ("mamba2", "w4a8", {"samples": 10, "resume": False}),
        ("mamba2", "w8a8", {"samples": 10, "resume": 1}),
        ("mamba", "w4a16", {"samples": 3, "resume": False}),
        ("jamba", "w4a8", {"samples": 10, "resume": 1}),
        ("jamba", "w4a8", {"samples": 2, "resume": False}),
        ("zamba2", "w4a8", {"samples": 10, "resume": 2}),
        ("rwkv7", "w8a8", {"samples": 10, "resume": 1}),
        ("hgrn", "w8a8", {"samples": 2, "resume": 1}),
    ]
    given = []
    for i, (model_type, recipe, options) in enumerate(jobs):
        folder, _ = tiny_checkpoint(model_type)
        quamba.quantize(folder, recipe, tmp_path / f"one-{i}", **common, samples=options["samples"])
        given.append((str(folder), recipe, str(tmp_path / f"many-{i}"), {**common, **options}))
    (tmp_path / "jobs.py").write_text(JOBS)
    command = [*TORCHRUN, "3", str(tmp_path / "jobs.py"), json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, timeout=400)
    assert done.returncode == 0, done.stderr
    assert [line.split()[2] for line in done.stdout.splitlines()] == ["1", "1", "2", "1", "1"], done.stdout
    for i in range(len(jobs)):
        assert contents(tmp_path / f"many-{i}") == contents(tmp_path / f"one-{i}"), jobs[i]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_torchrun_runs_the_command_which_prints_once(text, tmp_path):
    arguments = ["quantize", "mamba2-tiny", "--recipe", "w4a8", "--samples", "6", "--seqlen", "32", "--device", "cpu",
                 "--calibration", str(text), "--output", str(tmp_path / "two")]  # fmt: skip
    command = [*TORCHRUN, "2", "-m", "quamba", *arguments]
    two = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, timeout=300)
    assert (two.returncode, two.stderr) == (0, "")
    quamba.quantize(
        "mamba2-tiny", "w4a8", tmp_path / "one", calibration_text=text, samples=6, seqlen=32, device="cpu"
    )
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert two.stdout.count("written to") == two.stdout.count("original MB") == two.stdout.count("time: ") == 1


@pytest.fixture
def tasks(tmp_path):
    """A directory with a task of choices and one of whole texts, over seven documents."""
    pairs = [{"good": f"The {noun} is here.", "bad": f"The {noun} are is."} for noun in ("cat", "dog", "old house",
             "tree", "server", "file", "last word of all")]  # fmt: skip
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    shared = {"dataset_path": "json", "dataset_kwargs": {"data_files": str(data), "cache_dir": str(tmp_path / "cache")},
              "validation_split": "train", "doc_to_text": ""}  # fmt: skip
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    choice = {"task": "choice", "output_type": "multiple_choice", "doc_to_choice": "{{[good, bad]}}",
              "doc_to_target": 0, "metric_list": [{"metric": "acc"}]}  # fmt: skip
    whole = {"task": "whole", "output_type": "loglikelihood_rolling", "doc_to_target": "{{good}}",
             "metric_list": [{"metric": "word_perplexity"}]}  # fmt: skip
    for task in (choice, whole):
        (tasks / f"{task['task']}.yaml").write_text(yaml.safe_dump({**shared, **task}))
    return tasks


@pytest.mark.slow
def test_torchrun_measures_what_one_process_measures(tasks, tmp_path, monkeypatch):
    """The perplexity to the last bit; log-likelihoods of tasks in batches of other lengths, so nearly."""
    book = tmp_path / "book.txt"
    book.write_text(embedded.validation_text().read_text(encoding="utf-8")[:1500], encoding="utf-8")
    arguments = ["eval", "mamba1-tiny", "--perplexity", str(book), "--window", "32", "--device", "cpu",
                 "--batch-size", "2", "--tasks", "choice,whole", "--tasks-path", str(tasks), "--json"]  # fmt: skip
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    alone = CliRunner().invoke(app, [*arguments, str(tmp_path / "one")])
    assert alone.exit_code == 0, alone.output
    command = [*TORCHRUN, "2", "-m", "quamba", *arguments, str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one", "two"))
    assert two["perplexity"] == one["perplexity"] and one["perplexity"]["windows"] > 6
    assert two["tasks"]["choice"] == one["tasks"]["choice"]
    nearly = {metric: pytest.approx(value, rel=1e-5) for metric, value in one["tasks"]["whole"].items()}
    assert two["tasks"]["whole"] == nearly
    assert len(done.stdout.splitlines()) == len(alone.stdout.splitlines())


JOB = ["quantize", "mamba2-tiny", "--recipe", "w8a8", "--samples", "6", "--seqlen", "16", "--device", "cpu",
       "--output"]  # fmt: skip
FAILING = """
import os, signal, sys
from quamba import pipeline
from quamba.cli import app

quantise_block = pipeline.quantise_block

def failing(block, *rest):
    if os.environ["RANK"] == "1" and block.layer_idx == 2:
        if sys.argv[1] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        rest[4].hidden[0, 3, 3] = float("nan")
    return quantise_block(block, *rest)

pipeline.quantise_block = failing
app(sys.argv[2:] + (["--calibration", "missing.txt"] if sys.argv[1] == "early" and os.environ["RANK"] == "1" else []))
"""


@pytest.mark.slow
@pytest.mark.parametrize("mood, codes, sentence", [
    ("early", [2, 2], "There is no calibration file 'missing.txt'."),
    ("killed", [2, -9], "rank 0 has lost another process of this run"),
])  # fmt: skip
def test_what_ends_one_process_ends_all_with_one_sentence(mood, codes, sentence, tmp_path):
    """Started by hand, so that nobody but the processes themselves can end the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "failing.py").write_text(FAILING)
    started = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "failing.py"), mood, *JOB, str(tmp_path / "q")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**ONE_THREAD, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=150) for process in started]
    assert [process.returncode for process in started] == codes, said
    assert [out for out, _ in said] == ["", ""]
    errors = "".join(err for _, err in said)
    assert errors.startswith(f"Error: {sentence}") and errors.count("\n") == 1, errors
    assert [path.name for path in tmp_path.iterdir()] == ["failing.py"]


@pytest.mark.slow
def test_under_torchrun_the_failed_rank_says_why_and_nothing_is_left(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    command = [*TORCHRUN, "2", str(tmp_path / "failing.py"), "nan", *JOB, str(tmp_path / "q")]
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, timeout=150)
    assert done.returncode == 1  # torchrun's own, whatever its processes end with
    assert "exitcode  : 2 " in done.stderr and done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and "layer 2 (backbone.layers.2): NaN or Inf in its activations" in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["failing.py"]


def test_shares_are_disjoint_and_complete():
    items = list(range(11))
    for size in (1, 2, 3, 16):
        ranks = [Ranks(rank, size) for rank in range(size)]
        shares = [each.share(items) for each in ranks]
        assert sorted(sum(shares, [])) == items
        assert max(map(len, shares)) == ranks[0].rounds(len(items))
        assert all(item in shares[ranks[0].owner(index)] for index, item in enumerate(items))


def test_the_first_samples_are_the_same_for_any_number_of_ranks():
    tokens = torch.arange(10).unsqueeze(1)
    for size in (1, 2, 3, 4):
        first, batches = [], []
        for rank in range(size):
            ranks = Ranks(rank, size)
            own = Samples(Samples.share(tokens, 4, ranks), 4, torch.device("cpu"), ranks, 10)
            first += own.first(6).hidden.flatten().tolist()
            batches += [batch.flatten().tolist() for batch in own]
            assert len(list(own.rounds())) == ranks.rounds(3)
        assert sorted(first) == list(range(6))
        assert sorted(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_hessian_with_a_batch_that_nobody_ended_is_refused():
    hessian = Hessian(8, "cpu", ALONE)
    hessian.update(torch.ones(3, 8))
    with pytest.raises(AssertionError, match="not ended"):
        _ = hessian.mean
    hessian.end_batch()
    assert (hessian.mean == 1).all()
