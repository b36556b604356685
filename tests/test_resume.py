"""Finished layers that an interrupted run kept: who may go on with them, and that the bytes come out the same."""

from __future__ import annotations

from pathlib import Path

import pytest

import quamba
from quamba import checkpoint, pipeline, resume
from quamba.errors import UserError
from quamba.staging import lock


class Interrupted(Exception):
    """Not an error that anybody expects."""


@pytest.fixture
def job(tiny_checkpoint, text, tmp_path, monkeypatch):
    """(layer at which the run ends, options) -> what it said, and the layers that it computed."""
    original, computed = pipeline.quantise_block, []

    def run(until: int | None = None, name: str = "q", recipe: str = "w8a8", model_type: str = "mamba2", **options):
        depth = (("num_hidden_layers", 4),) if model_type == "mamba2" else ()
        folder, _ = tiny_checkpoint(model_type, depth)
        def watched(block, *rest):
            if block.layer_idx == until:
                raise Interrupted
            computed.append(block.layer_idx)
            return original(block, *rest)

        computed.clear()
        said: list[str] = []
        monkeypatch.setattr(pipeline, "quantise_block", watched)
        options = {"samples": 2, "seqlen": 16, "calibration_text": text, "device": "cpu", "say": said.append, **options}
        try:
            quamba.quantize(folder, recipe, tmp_path / name, **options)
        except Interrupted:
            assert until is not None
        return said, list(computed)

    monkeypatch.setattr(resume, "SHARE", float("inf"))
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_goes_on_where_another_ended_even_across_shards(job, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 50_000)
    job(name="whole")
    whole = contents(tmp_path / "whole")
    assert sum(name.endswith(".safetensors") for name in whole) > 3
    assert job(until=2, resume=True) == ([], [0, 1])
    kept = tmp_path / ".q.progress"
    assert sorted(path.name for path in kept.iterdir()) == ["hidden-2", "key.json", "layer-0", "layer-1"]
    assert job(until=3, resume=True) == ([f"resuming after 2 of 4 layers, kept in {kept}"], [2])
    assert job(resume=True) == ([f"resuming after 3 of 4 layers, kept in {kept}"], [3])
    assert contents(tmp_path / "q") == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q", "whole"]


@pytest.mark.parametrize("model_type, until", [("jamba", 3), ("rwkv7", 2), ("hgrn", 1)])
def test_a_hybrid_goes_on_too(model_type, until, job, tmp_path):
    """Its layers are no blocks of ours, and are passed more than hidden states, some of it by earlier layers."""
    job(name="whole", model_type=model_type)
    assert job(until=until, resume=True, model_type=model_type) == ([], list(range(until)))
    said, computed = job(resume=True, model_type=model_type)
    assert said[0].startswith(f"resuming after {until} of ") and computed[0] == until
    assert contents(tmp_path / "q") == contents(tmp_path / "whole")


def test_hidden_states_are_kept_as_often_as_it_pays(job, tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SHARE", 0.0)
    assert job(until=3, resume=True) == ([], [0, 1, 2])
    names = sorted(path.name for path in (tmp_path / ".q.progress").iterdir())
    assert names == ["hidden-1", "key.json", "layer-0", "layer-1", "layer-2"]
    said, computed = job(resume=True)
    assert computed == [1, 2, 3] and said[0].startswith("resuming after 1 of 4 layers")
    job(name="whole")
    assert contents(tmp_path / "q") == contents(tmp_path / "whole")


def test_nothing_is_kept_unless_asked(job, tmp_path):
    job(until=3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change, named", [
    ({"recipe": "w4a16"}, "another recipe"),
    ({"seed": 1}, "another calibration text, another seed"),
    ({"samples": 3}, "another calibration text, another calibration windows"),
])  # fmt: skip
def test_what_was_given_otherwise_is_named(change, named, job, tmp_path):
    job(until=1, resume=True)
    before = contents(tmp_path / ".q.progress")
    with pytest.raises(UserError, match=f"had {named}; repeat what that run was given, or delete it to start anew"):
        job(resume=True, **change)
    assert contents(tmp_path / ".q.progress") == before
    assert job(resume=True)[1] == [1, 2, 3]


def test_another_model_under_the_same_name(job, tiny_checkpoint, tmp_path):
    folder, _ = tiny_checkpoint("mamba2", (("num_hidden_layers", 4),))
    job(until=1, resume=True)
    config = (folder / "config.json").read_text()
    try:
        (folder / "config.json").write_text(config + " ")
        with pytest.raises(UserError, match="had another model; repeat"):
            job(resume=True)
    finally:
        (folder / "config.json").write_text(config)


def test_a_run_that_still_goes_on_keeps_its_layers(job, tmp_path):
    job(until=1, resume=True)
    held = lock(tmp_path / ".q.progress")
    try:
        with pytest.raises(UserError, match="belongs to a run that still goes on"):
            job(resume=True)
        job()  # an ordinary run leaves them alone
        assert (tmp_path / ".q.progress").is_dir()
    finally:
        resume.release(held)


@pytest.mark.parametrize("spoil, sentence", [
    (lambda f: (f / "key.json").write_text("{"), "holds no layers that can be taken over; delete it"),
    (lambda f: (f / "key.json").unlink(), "holds no layers that can be taken over; delete it"),
    (lambda f: (f / "layer-0").unlink(), "cannot be read: .*delete it to start anew"),
    (lambda f: (f / "hidden-2").write_bytes(b"short"), "cannot be read: .*delete it to start anew"),
])  # fmt: skip
def test_progress_that_is_broken_is_refused(spoil, sentence, job, tmp_path):
    job(until=2, resume=True)
    spoil(tmp_path / ".q.progress")
    with pytest.raises(UserError, match=sentence):
        job(resume=True)
    assert not (tmp_path / "q").exists()


def test_a_disk_that_is_full_of_progress(job, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume, "save_file", full)
    with pytest.raises(UserError, match=r"\.q\.progress cannot be written: No space left on device; make room"):
        job(resume=True)
