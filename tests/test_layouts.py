"""Layouts of checkpoint files: what each stands for, what it refuses, and that nothing in a file runs."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import types
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import AutoConfig, AutoTokenizer
from typer.testing import CliRunner

import quamba
from quamba import embedded, layouts, memory
from quamba.checkpoint import Checkpoint, resolve
from quamba.cli import app
from quamba.errors import UserError
from quamba.layouts import pickles
from quamba.models import ARCHITECTURES

TOKENIZER = str(embedded.checkpoint("mamba2-tiny"))
IDS = torch.arange(40)[None]
CASES = {
    "mamba": ({}, {"ssm_cfg": {"d_state": 8, "dt_rank": 8}}),
    "mamba-biased": ({"use_bias": True, "use_conv_bias": False, "conv_kernel": 3, "residual_in_fp32": False,
                      "tie_word_embeddings": False},
                     {"ssm_cfg": {"d_state": 8, "dt_rank": 8, "bias": True, "conv_bias": False, "d_conv": 3,
                                  "use_fast_path": False},
                      "residual_in_fp32": False, "tie_embeddings": False}),
    "mamba2": ({"tie_word_embeddings": True},
               {"ssm_cfg": {"layer": "Mamba2", "d_state": 16, "headdim": 16}, "attn_layer_idx": [], "attn_cfg": {}}),
    "mamba2-groups": ({"n_groups": 2, "use_bias": True, "time_step_limit": (0.01, 0.2)},
                      {"ssm_cfg": {"layer": "Mamba2", "d_state": 16, "headdim": 16, "ngroups": 2, "bias": True,
                                   "dt_limit": [0.01, 0.2], "chunk_size": 32}, "tie_embeddings": False}),
}  # fmt: skip


def write_mamba_ssm(folder: Path, model, settings) -> Path:
    """What mamba_ssm's save_pretrained would have written of a transformers model; the head is stored when tied."""
    folder.mkdir()
    state = {n.replace("backbone.embeddings.", "backbone.embedding."): t for n, t in model.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")
    sizes = {"d_model": 64, "n_layer": 2, "vocab_size": 2041, "rms_norm": True, "fused_add_norm": True}
    (folder / "config.json").write_text(json.dumps({**sizes, "pad_vocab_size_multiple": 16, **settings}))
    return folder


@pytest.fixture(scope="module", params=sorted(CASES))
def pair(request, tiny_checkpoint, tmp_path_factory):
    """(directory as transformers writes it, model, the same as mamba_ssm writes it)."""
    changes, settings = CASES[request.param]
    folder, model = tiny_checkpoint(request.param.split("-")[0], tuple(sorted(changes.items())))
    return folder, model, write_mamba_ssm(tmp_path_factory.mktemp("original") / request.param, model, settings)


def same_bytes(a: Path, b: Path) -> bool:
    return (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def test_mamba_ssm_gives_the_same_logits(pair):
    _, model, original = pair
    ours, tokenizer = quamba.load(original, tokenizer=TOKENIZER, device="cpu")
    assert ours.dtype == torch.float32 and ours.config.eos_token_id == tokenizer.eos_token_id
    with torch.inference_mode():
        assert (ours(IDS).logits - model(IDS).logits).abs().max() < 1e-4


def test_mamba_ssm_gives_the_same_bytes(pair, quantise):
    folder, _, original = pair
    theirs, ours = quantise(folder, "w4a8", "theirs"), quantise(original, "w4a8", "ours", tokenizer=TOKENIZER)
    assert same_bytes(theirs, ours)
    model, tokenizer = quamba.load(ours, device="cpu")
    assert tokenizer("a table")["input_ids"] == AutoTokenizer.from_pretrained(TOKENIZER)("a table")["input_ids"]
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, quamba.load(theirs, device="cpu")[0](IDS).logits)
    written = json.loads((ours / "config.json").read_text())
    assert written["architectures"] == [type(pair[1]).__name__] and written["eos_token_id"] == tokenizer.eos_token_id


def test_mamba_ssm_in_the_default_types_of_its_makers(pair, tmp_path):
    """A_log and D stay in 32 bits where the rest has 16."""
    folder, model, _ = pair
    half = {n: t if n.endswith(("A_log", ".D")) else t.half() for n, t in model.state_dict().items()}
    settings = json.loads((pair[2] / "config.json").read_text())
    original = write_mamba_ssm(tmp_path / "half", types.SimpleNamespace(state_dict=lambda: half), settings)
    assert quamba.load(original, tokenizer=TOKENIZER, device="cpu")[0].dtype == torch.float16


@pytest.fixture
def original(tiny_checkpoint, tmp_path):
    """A small mamba_ssm directory that a test may spoil."""
    changes, settings = CASES["mamba2"]
    _, model = tiny_checkpoint("mamba2", tuple(sorted(changes.items())))
    return write_mamba_ssm(tmp_path / "original", model, settings)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"ssm_cfg": {"layer": "Mamba3"}}, "ssm_cfg cannot be {'layer': 'Mamba3'}"),
        ({"ssm_cfg": {"layer": "Mamba2", "rope": 1}}, "unknown key 'ssm_cfg.rope'"),
        ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "ssm_cfg.D_has_hdim cannot be True"),
        ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 64}}, "ssm_cfg.d_ssm cannot be 64"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 16, "ngroups": 3}}, "ngroups cannot be 3"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 48}}, "transformers refuses"),
        ({"ssm_cfg": {"dt_rank": "few"}}, "ssm_cfg.dt_rank cannot be 'few'"),
        ({"attn_layer_idx": [1]}, "attn_layer_idx cannot be [1]"),
        ({"d_intermediate": 256}, "d_intermediate cannot be 256"),
        ({"rms_norm": False}, "rms_norm cannot be False"),
        ({"d_model": "64"}, "d_model cannot be '64'"),
        ({"moe": 8}, "unknown key 'moe'"),
    ],
)
def test_settings_that_cannot_be_represented_are_refused(original, changes, sentence):
    held = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps({**held, **changes}))
    with pytest.raises(UserError) as error:
        Checkpoint(original, TOKENIZER)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_tensors_that_do_not_fit_the_config_are_refused(original):
    held = json.loads((original / "config.json").read_text())
    for changes, sentence in (({"n_layer": 3}, "the tensor 'backbone.layers.2"), ({"n_layer": 1}, "unknown tensor"),
                              ({"d_model": 32}, "should be [2048, 32]")):  # fmt: skip
        (original / "config.json").write_text(json.dumps({**held, **changes}))
        with pytest.raises(UserError, match=re.escape(sentence)):
            quamba.load(original, tokenizer=TOKENIZER, device="cpu")


def test_a_directory_of_no_layout_lists_what_each_would_need(tmp_path):
    with pytest.raises(UserError) as error:
        quamba.load(tmp_path, device="cpu")
    assert all(layout.sign in str(error.value) for layout in layouts.LAYOUTS.values())
    files = Path(layouts.__file__).parent.glob("*.py")
    assert {file.stem for file in files if "\nLAYOUT = " in file.read_text(encoding="utf-8")} == set(layouts.LAYOUTS)


def test_without_a_tokenizer_the_usual_one_is_looked_for_and_named(original, monkeypatch):
    asked = []

    def nothing(source, **options):
        asked.append(source)
        raise OSError("offline")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", nothing)
    with pytest.raises(UserError, match="EleutherAI/gpt-neox-20b, .* by --tokenizer"):
        quamba.load(original, device="cpu")
    assert asked == ["EleutherAI/gpt-neox-20b"]


def test_a_tokenizer_beside_the_weights_is_used_and_a_larger_one_refused(original):
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(original)
    assert len(Checkpoint(original).tokenizer()) == 2048
    held = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps({**held, "vocab_size": 1024}))
    with pytest.raises(UserError, match="has 2048 tokens, the model 1024"):
        Checkpoint(original).tokenizer()


def test_the_commands_take_a_tokenizer(original, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(embedded.validation_text().read_text(encoding="utf-8")[:400], encoding="utf-8")
    out = tmp_path / "out"
    for arguments in (
        ["eval", original, "--tokenizer", "mamba1-tiny", "--perplexity", text, "--window", 16, "--max-windows", 1],
        ["generate", original, "--tokenizer", TOKENIZER, "--prompt", "The", "--max-new-tokens", 2],
        ["quantize", original, "--tokenizer", "mamba1-tiny", "--recipe", "w8a8", "--output", out, "--samples", 1,
         "--seqlen", 16],
        ["generate", out, "--prompt", "The", "--max-new-tokens", 2],
    ):  # fmt: skip
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("shards", ["5GB", "200KB"])
def test_hugging_face_pickles_give_the_same_bytes(tiny_checkpoint, quantise, tmp_path, shards):
    folder, model = tiny_checkpoint("mamba2")
    pickled = tmp_path / "pickled"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        pickled.mkdir(exist_ok=True)
        (pickled / name).write_bytes((folder / name).read_bytes())
    split = split_torch_state_dict_into_shards(
        model.state_dict(), max_shard_size=shards, filename_pattern="pytorch_model{suffix}.bin"
    )
    assert split.is_sharded == (shards == "200KB")
    for name, held in split.filename_to_tensors.items():
        torch.save({tensor: model.state_dict()[tensor] for tensor in held}, pickled / name)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (pickled / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert same_bytes(quantise(folder, "w8a8", "a"), quantise(pickled, "w8a8", "b"))
    (ours, _), (theirs, _) = (quamba.load(path, device="cpu") for path in (pickled, folder))
    with torch.inference_mode():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("stored", ["model.safetensors", "release/mp_rank_00/model_optim_rng.pt", "pytorch_model.bin"])
def test_pickles_are_downloaded_only_where_there_are_no_safetensors(stored, tmp_path, monkeypatch):
    asked = []

    def download(repository, allow_patterns):
        asked.append([name for name in ("config.json", stored) if any(fnmatch(name, p) for p in allow_patterns)])
        for name in asked[-1]:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve("someone/model") == tmp_path
    first = ["config.json", stored] if stored.endswith("safetensors") else ["config.json"]
    assert asked == [first] if stored.endswith("safetensors") else [first, ["config.json", stored]]


class Hostile:
    """Makes a file when it is unpickled by someone who trusts it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def spoil(layout: str, folder: Path, trace: Path) -> None:
    """Write a directory of a layout whose pickle wants code."""
    if layout == "megatron":
        file = folder / "release" / "mp_rank_00" / "model_optim_rng.pt"
        file.parent.mkdir(parents=True)
        (folder / "latest_checkpointed_iteration.txt").write_text("release")
        torch.save({"model": {}, "args": argparse.Namespace(numpy=Hostile(trace))}, file)
        return
    config = {"d_model": 64, "n_layer": 2, "vocab_size": 96}
    if layout == "huggingface":
        config = AutoConfig.for_model("mamba2", **ARCHITECTURES["mamba2"].tiny[0]).to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"backbone.norm_f.weight": torch.ones(64), "extra": Hostile(trace)}, folder / "pytorch_model.bin")


@pytest.mark.parametrize("layout", sorted(layouts.LAYOUTS))
def test_a_pickle_that_wants_code_is_refused_and_never_runs(layout, tmp_path):
    trace, folder = tmp_path / "trace", tmp_path / "hostile"
    folder.mkdir()
    spoil(layout, folder, trace)
    torch.load(next(folder.rglob("*.[pb][ti]*")), weights_only=False)
    assert trace.exists()
    trace.rmdir()
    for attempt in (quamba.load, Checkpoint):
        with pytest.raises(UserError) as error:
            attempt(folder, tokenizer=TOKENIZER)
        assert "asks to run posix.mkdir, and" in str(error.value) and "\n" not in str(error.value)
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", pickle.dumps({"a": 1}), b"x" * 4096])
def test_what_is_no_archive_of_torch_is_refused(tmp_path, content):
    (tmp_path / "file.bin").write_bytes(content)
    with pytest.raises(UserError, match="is no archive of torch.save"):
        pickles.open_pickle(tmp_path / "file.bin")


@pytest.mark.parametrize("value", [3, [torch.ones(1)], {"a": 3}, {"a": torch.ones(2, 2).to_sparse()},
                                   {"a": torch.ones(2, device="meta")}])  # fmt: skip
def test_what_is_no_state_dict_is_refused(tmp_path, value):
    torch.save(value, tmp_path / "file.bin")
    with pytest.raises(UserError, match="should hold"):
        pickles.index(tmp_path / "file.bin")


def test_what_was_read_does_not_stay_in_memory(tmp_path, monkeypatch):
    file, size = tmp_path / "file.bin", 8 * 1024**2
    torch.save({str(i): torch.full((size // 4,), float(i)) for i in range(16)}, file)
    monkeypatch.setattr(pickles, "BUDGET", 2 * size)
    index = pickles.index(file)
    before, most = memory.resident(), 0
    for i in range(16):
        tensor = index[str(i)].read()
        assert tensor.shape == index[str(i)].shape and tensor.mean() == i
        most = max(most, memory.resident())
    assert 0 < most - before < 8 * size


def test_the_language_model_of_a_checkpoint_that_sees(text, tmp_path):
    """Qwen3.5 comes with a vision tower beside the text model, whose config and tensors lie one level deeper."""
    from transformers.models.qwen3_5 import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    tower = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    inner = {**ARCHITECTURES["qwen3_5_text"].tiny[0], "vocab_size": 2048}
    torch.manual_seed(0)
    model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=inner, vision_config=tower)).eval()
    model.save_pretrained(tmp_path / "whole")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(tmp_path / "whole")
    ids = torch.randint(1, 2048, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        want = model(ids, use_cache=False).logits
        floats, _ = quamba.load(tmp_path / "whole", device="cpu")
        assert torch.allclose(floats(ids, use_cache=False).logits, want, atol=1e-4)
        given = {"calibration_text": text, "samples": 4, "seqlen": 32, "device": "cpu"}
        report = quamba.quantize(tmp_path / "whole", "w8a8", tmp_path / "q", **given)
        got = quamba.load(tmp_path / "q", device="cpu")[0](ids, use_cache=False).logits
    assert float((got - want).norm() / want.norm()) < 0.1
    described = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and "visual" not in name)
    assert report.sizes["layers_original"] == 2 * (described + inner["hidden_size"])
