"""The directory beside an output: who may remove it, and what becomes of an old output when something fails."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from quamba import staging
from quamba.errors import UserError
from quamba.staging import Staging, tidy


def made(folder: Path, content: str) -> Path:
    """A directory that looks like a model."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def content(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())


def test_an_output_that_appeared_meanwhile_is_left_alone(tmp_path):
    ours = Staging(tmp_path / "q", False, tmp_path / "source")
    made(ours.folder, "ours")
    made(tmp_path / "q", "theirs")
    with pytest.raises(UserError, match="was made by somebody else meanwhile"):
        ours.commit()
    ours.close()
    assert content(tmp_path / "q") == "theirs" and [p.name for p in tmp_path.iterdir()] == ["q"]


def test_an_old_output_comes_back_when_the_second_of_two_steps_fails(tmp_path, monkeypatch):
    old, rename = made(tmp_path / "q", "old"), Path.rename

    def failing(path: Path, target: Path) -> Path:
        if content(path) == "new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(staging, "exchange", lambda a, b: False)
    monkeypatch.setattr(Path, "rename", failing)
    ours = Staging(old, True, tmp_path / "source")
    made(ours.folder, "new")
    with pytest.raises(UserError, match="cannot be written: Input/output error"), ours.writing():
        ours.commit()
    ours.close()
    assert content(old) == "old" and [p.name for p in tmp_path.iterdir()] == ["q"]


def test_without_locks_nobody_removes_what_may_be_in_use(tmp_path, monkeypatch):
    def none(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    made(tmp_path / ".q.12345678.partial", "somebody's")
    monkeypatch.setattr("fcntl.flock", none)
    ours = Staging(tmp_path / "q", False, tmp_path / "source")
    made(ours.folder, "new")
    ours.commit()
    ours.close()
    assert content(tmp_path / "q") == "new"
    assert {p.name for p in tmp_path.iterdir()} == {"q", ".q.12345678.partial"}


def test_a_link_keeps_pointing(tmp_path):
    made(tmp_path / "target", "old")
    (tmp_path / "q").symlink_to(tmp_path / "target")
    ours = Staging(tmp_path / "q", True, tmp_path / "source")
    made(ours.folder, "new")
    ours.commit()
    ours.close()
    assert (tmp_path / "q").is_symlink() and content(tmp_path / "target") == "new"
    assert {p.name for p in tmp_path.iterdir()} == {"q", "target"}


def test_two_runs_for_one_output_do_not_tidy_each_other_away(tmp_path):
    first = Staging(tmp_path / "q", False, tmp_path / "source")
    (first.folder / "config.json").write_text("{}")
    second = Staging(tmp_path / "q", False, tmp_path / "source")
    assert first.folder.exists() and first.folder != second.folder
    second.close()
    first.commit()
    first.close()
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_only_leftovers_are_tidied_away(tmp_path):
    """Names that look alike belong to somebody else."""
    mine = [".q.12345678.partial", ".q.abcd_fgh.partial.aside"]
    others = [".q.1234567.partial", ".q.12345678.partially", ".qq.12345678.partial", "q.12345678.partial", ".q.run"]
    for name in mine + others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / ".q.87654321.partial").write_text("a file")
    (tmp_path / "q").mkdir()
    tidy(tmp_path / "q")
    assert {path.name for path in tmp_path.iterdir()} == {"q", ".q.87654321.partial", *others}


def test_what_was_moved_aside_comes_back(tmp_path):
    aside = tmp_path / ".q.abcd_fgh.partial.aside"
    aside.mkdir()
    (aside / "config.json").write_text(json.dumps({"old": True}))
    tidy(tmp_path / "q")
    assert json.loads((tmp_path / "q" / "config.json").read_text()) == {"old": True}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_whom_the_umask_lets_may_read_the_output(umask, tiny_checkpoint, quantise):
    folder, before = tiny_checkpoint("mamba2")[0], os.umask(umask)
    try:
        made = quantise(folder, "w8a8")
    finally:
        os.umask(before)
    assert made.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {file.stat().st_mode & 0o777 for file in made.iterdir()} == {0o666 & ~umask}
