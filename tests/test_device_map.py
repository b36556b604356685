"""Models that accelerate lays out: quantised ones run the same with parts on disk, which come and go whole."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from quamba import embedded, layouts, quantize
from quamba.cli import app
from quamba.errors import UserError
from quamba.loading import load
from quamba.models import describe
from quamba.modules.block import RecurrentBlock
from quamba.modules.lowbit import LowBit
from quamba.placement import entry, together

IDS = torch.arange(1, 25).view(2, 12)


def half_on_disk(model) -> dict[str, str]:
    """Every other block on disk, everything else in memory."""
    blocks = [block.path for block in describe(model.config).blocks]
    where = {path: "cpu" if i % 2 else "disk" for i, path in enumerate(blocks)}
    for name in [*model.state_dict(), *dict(model.named_buffers())]:
        if not name.startswith(tuple(f"{path}." for path in blocks)):
            where[name.rpartition(".")[0]] = "cpu"
    return where


def everything_on_disk(model) -> dict[str, str]:
    return {name: "disk" for name, _ in model.named_children()}


KINDS = [("w4a8", "mamba2"), ("w8a8", "mamba"), ("w4a16", "jamba"), ("w8a8", "zamba2"), ("w8a8", "gla")]


@torch.no_grad()
@pytest.mark.parametrize("recipe, model_type", KINDS)
def test_parts_on_disk_come_and_go(recipe, model_type, stock):
    folder = stock(recipe, model_type)
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    wanted = whole(IDS, use_cache=False).logits
    for place in (half_on_disk, everything_on_disk):
        model = AutoModelForCausalLM.from_pretrained(folder, device_map=place(whole)).eval()
        for _ in range(2):
            assert torch.equal(model(IDS, use_cache=False).logits, wanted)
        off = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        stored = [name for name in model.state_dict() if name.startswith(describe(model.config).blocks[0].path)]
        assert set(stored) <= set(off) and (place is half_on_disk or len(off) == len(model.state_dict()))
        assert not any(m._bound for m in model.get_submodule(describe(model.config).blocks[0].path).modules()
                       if isinstance(m, LowBit))  # fmt: skip
        assert entry(model) == torch.device("cpu") and not together(model)
        tokens = model.generate(IDS, max_new_tokens=3, do_sample=False)
        assert torch.equal(tokens, whole.generate(IDS, max_new_tokens=3, do_sample=False))


@torch.no_grad()
def test_a_map_of_one_device_needs_no_hooks(stock):
    folder = stock("w4a8", "mamba2")
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    for given in ({"": "cpu"}, "auto"):
        model = AutoModelForCausalLM.from_pretrained(folder, device_map=given).eval()
        assert torch.equal(model(IDS).logits, whole(IDS).logits)
        assert together(model) and entry(model) == torch.device("cpu")
        assert RecurrentBlock.__name__ in model._no_split_modules


def test_an_original_larger_than_memory_is_read_from_its_files(tiny_checkpoint, tmp_path):
    folder, original = tiny_checkpoint("mamba2")
    model, _ = load(folder, device_map=everything_on_disk(original), offload_folder=tmp_path)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, original(IDS).logits)
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_the_command_measures_the_same_with_a_device_map(tmp_path, text):
    quantize("mamba2-tiny", "w4a8", tmp_path / "q", calibration_text=text, samples=2, seqlen=16, device="cpu")
    book = tmp_path / "book.txt"
    book.write_text(embedded.validation_text().read_text(encoding="utf-8")[:300], encoding="utf-8")
    arguments = ["eval", str(tmp_path / "q"), "--perplexity", str(book), "--window", "16", "--device", "cpu", "--json"]
    for name, given in (("plain", []), ("mapped", ["--device-map", "auto"])):
        done = CliRunner().invoke(app, [*arguments, str(tmp_path / name), *given])
        assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "mapped").read_text()) == json.loads((tmp_path / "plain").read_text())


def test_a_device_map_is_for_one_process(monkeypatch, text):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("quamba.ranks.fail", lambda say, status: (say(), exit(status)))
    done = CliRunner().invoke(app, ["eval", "mamba2-tiny", "--perplexity", str(text), "--device-map", "auto"])
    assert done.exit_code == 2 and "--device-map spreads the model of one process" in done.stderr


def test_layouts_that_transformers_does_not_open_take_no_map(tiny_checkpoint, monkeypatch):
    folder, _ = tiny_checkpoint("mamba2")
    foreign = dataclasses.replace(layouts.find(folder), native=False)
    monkeypatch.setattr(layouts, "find", lambda path: foreign)
    with pytest.raises(UserError, match="not in Hugging Face's layout"):
        load(folder, device_map="auto")
