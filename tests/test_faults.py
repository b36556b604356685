"""Bad input, item by item, through the command line: one sentence that names the thing, status 2, nothing written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from quamba.cli import app

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "backbone.embeddings.weight"
IN_PROJ = "backbone.layers.1.mixer.in_proj.weight"


def header(folder: Path, change: Callable[[dict[str, Any]], object], length: int | None = None) -> None:
    """Rewrite the header of the weights, and lie about its length where one is given."""
    data = (folder / WEIGHTS).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    parsed = json.loads(data[8 : 8 + size])
    change(parsed)
    text = json.dumps(parsed).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data[8 + size :])


def overlap(parsed: dict[str, Any]) -> None:
    """Two tensors of one size in one place."""
    parsed[IN_PROJ]["data_offsets"] = parsed[IN_PROJ.replace("1", "0", 1)]["data_offsets"]


def entry(name: str, **values: Any) -> Callable[[Path], None]:
    """Change what the header says of one tensor."""
    return lambda folder: header(folder, lambda parsed: parsed[name].update(values))


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Change the weights themselves."""

    def changed(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS, metadata={"format": "pt"})

    return changed


def value(name: str, index: int, number: float) -> Callable[[Path], None]:
    """Set one number of a tensor."""
    return tensors(lambda held: held[name].view(-1)[index : index + 1].fill_(number))


def config(**values: Any) -> Callable[[Path], None]:
    """Change config.json."""

    def changed(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return changed


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Write a file."""
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    """Name the weights as a shard, and change where the index says that tensors lie."""

    def changed(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "a.safetensors")
        where = dict.fromkeys(load_file(folder / "a.safetensors"), "a.safetensors")
        change(where)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))

    return changed


def remove(*names: str) -> Callable[[Path], None]:
    """Delete files."""
    return lambda folder: [(folder / name).unlink() for name in names]


class Bomb:
    """Leaves a trace when it is unpickled without care."""

    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def bomb(save: Callable[[Any, Path], object]) -> Callable[[Path], None]:
    """Weights as a pickle that wants code."""

    def changed(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        save({EMBEDDING: Bomb()}, folder / "pytorch_model.bin")

    return changed


TABLE = torch.ones(64, 64)
MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (remove(WEIGHTS), "holds no weights: neither model.safetensors nor pytorch_model.bin"),
    "no config": (remove("config.json"), "is no model directory"),
    "empty weights": (write(WEIGHTS, b""), "not a readable safetensors file: .*header too small; download it again"),
    "weights cut off": (lambda f: os.truncate(f / WEIGHTS, 20_000), "model.safetensors is not a readable"),
    "header cut off": (lambda f: os.truncate(f / WEIGHTS, 100), "model.safetensors is not a readable"),
    "no header": (write(WEIGHTS, b"PK\x03\x04" * 100), "model.safetensors is not a readable"),
    "weights are a directory": (lambda f: [(f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()], "holds no weights"),
    "header lies about a size": (entry(IN_PROJ, shape=[10**6, 64]), "not a readable .*invalid shape, data type"),
    "header overflows": (entry(IN_PROJ, shape=[2**62, 2**62]), "not a readable .*overflow"),
    "header overlaps": (lambda f: header(f, overlap), "not a readable .*invalid offset"),
    "header leaves a gap": (lambda f: header(f, lambda h: h.pop(IN_PROJ)), "not a readable .*invalid offset"),
    "unknown dtype": (entry(IN_PROJ, dtype="F99"), "not a readable .*unknown variant `F99`"),
    "gigantic header": (lambda f: header(f, lambda h: None, 2**60), "not a readable .*header too large"),
    "header of 200 MB": (lambda f: header(f, lambda h: None, 2**28), "not a readable .*header too large"),
    "integers for weights": (entry(IN_PROJ, dtype="I32"), f"{IN_PROJ}.* is torch.int32; expected a float of 16, 32"),
    "missing tensor": (tensors(lambda t: t.pop(IN_PROJ)), f"lacks the tensor '{IN_PROJ}', which a mamba2 model needs"),
    "wrong shape": (
        tensors(lambda t: t.update({IN_PROJ: torch.zeros(296, 63)})),
        rf"tensor {IN_PROJ} of \S+ should be \[296, 64\] by its config, is \[296, 63\]",
    ),
    "NaN in a weight": (value(IN_PROJ, 7, float("nan")), f"tensor '{IN_PROJ}' of .* holds NaN or Inf"),
    "Inf in the embedding": (value(EMBEDDING, 7, -torch.inf), "embeddings.weight' of .* holds NaN"),
    "Inf in activations": (
        tensors(lambda t: t.update({IN_PROJ: t[IN_PROJ] * 1e37})),
        r"layer 1 \(backbone.layers.1\): NaN or Inf in its activations; look at the original's weights, or give",
    ),
    "index: missing file": (index(lambda w: w.update({IN_PROJ: "b.safetensors"})), "has no b.safetensors, which model"),
    "index: missing tensor": (index(lambda w: w.update(x="a.safetensors")), "says that a.safetensors holds 'x'"),
    "index: upwards": (index(lambda w: w.update({IN_PROJ: "../a.safetensors"})), r"puts .* into '../a.safetensors'"),
    "index: elsewhere": (index(lambda w: w.update({IN_PROJ: "/etc/passwd"})), "no .safetensors file of that dir"),
    "index: to a pickle": (index(lambda w: w.update({IN_PROJ: "a.bin"})), "no .safetensors file of that dir"),
    "index: no name": (index(lambda w: w.update({IN_PROJ: 5})), "into 5, which is no .safetensors file"),
    "index: empty": (index(lambda w: w.clear()), 'has no "weight_map"'),
    "index: no JSON": (lambda f: [(f / WEIGHTS).unlink(), write(INDEX, "{")(f)], "index.json cannot be read as JSON"),
    "pickle wants code": (bomb(torch.save), "pytorch_model.bin was not opened, as it asks to run .*system"),
    "bare pickle wants code": (bomb(lambda o, f: f.write_bytes(pickle.dumps(o))), "pytorch_model.bin (is no|was not)"),
    "config: no JSON": (write("config.json", "{"), "config.json cannot be read as JSON"),
    "config: bytes": (write("config.json", b"\xff\xfe\x00"), "config.json cannot be read as JSON"),
    "config: deep": (write("config.json", '{"a":' + "[" * 10**5), "config.json cannot be read as JSON"),
    "config: a list": (write("config.json", "[]"), "config.json should hold a JSON object, and holds a list"),
    "config: unknown type": (config(model_type="gpt5"), "type 'gpt5', which transformers .*known types are .*mamba2"),
    "config: type is a list": (config(model_type=["mamba2"]), r"type \['mamba2'\], which transformers .* does not"),
    "config: another type": (config(model_type="bert"), "model type 'bert' is not supported; known types are .*mamba2"),
    "config: code": (
        config(model_type="own", auto_map={"AutoConfig": "own.Config"}),
        "config.json cannot be read: .*(trust_remote_code|custom code)",
    ),
    "config: wrong type": (config(hidden_size="64"), "'hidden_size' expected int, got str"),
    "config: other activation": (config(hidden_act="relu"), "hidden_act='relu'; supported is 'silu'"),
    "config: other sizes": (config(state_size=32), "should be .* by its config, is"),
    "config: absurd width": (config(hidden_size=2**40), "asks for a 'hidden_size' beyond 2.15e.09"),
    "config: absurd limit": (config(time_step_limit=[0.0, 1e300]), "asks for a 'time_step_limit' beyond 3.4e.38"),
    "config: absurd vocabulary": (config(vocab_size=2**31 - 1), r"should be \[2147483647, 64\] by its config"),
    "config: absurd depth": (config(num_hidden_layers=2**30), "asks for num_hidden_layers=1073741824, but the weights"),
    "config: no layers": (config(num_hidden_layers=0), "has no layers"),
    "config: nothing wide": (config(state_size=0), "gives the axis 'state' a size of 0; expected 1 or more"),
    "config: uneven groups": (config(n_groups=3), "divides 8 heads among 3 groups, unevenly"),
    "config: NaN": (config(layer_norm_epsilon=float("nan")), r"layer 0 .*NaN or Inf"),
    "quantised already": (config(quantization_config={"quant_method": "quamba"}), "quantised already; give the"),
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), "no tokenizer .*--tokenizer"),
    "broken tokenizer": (write("tokenizer.json", "{}"), "no tokenizer that can be read .*--tokenizer"),
    "tokenizer of another": (
        lambda f: [config(vocab_size=64)(f), tensors(lambda t: t.update({EMBEDDING: TABLE, HEAD: TABLE + 1}))(f)],
        "gives token [0-9]+, and the model embeds 64; give the model's own tokenizer",
    ),
    "broken generation config": (write("generation_config.json", "{"), "generation_config.json cannot be read as JSON"),
}  # fmt: skip

RECIPES = {
    "unknown key": ("linear: {}", "unknown key 'linear'; known keys are activations, "),
    "unknown inner key": ("rotate: {angle: 3}", "unknown key 'rotate.angle'; known keys are block, "),
    "unknown role": ("linears: {q_proj2: {format: w8a8}}", "unknown role 'q_proj2' in linears; this model has "),
    "unknown format": ("linears: {default: {format: w2a2}}", "linears.default: format: should be one of float, w4a16"),
    "group of 100": ("linears: {default: {format: w4a16, group_size: 100}}", "multiple of 8, got 100"),
    "group of 48": ("linears: {default: {format: w4a16, group_size: 48}}", "group_size 48 divides none of the input"),
    "floats into integers": ("linears: {default: {format: w8a8, input: {bits: 16}}}", "takes int8 inputs, so"),
    "layers beyond": ("layers: [{match: 7-9}]", "layers '7-9' covers none of the 2 layers"),
    "infinite damping": ("linears: {default: {damping: .inf}}", "damping: .* finite number"),
    "absurd seed": ("rotate: {seed: 99999999999999999999999}", "rotate.seed: .* less than 2147483648"),
    "absurd block": ("rotate: {block: 123456789123456789}", "rotate.block 123456789123456789 must divide the 128"),
    "no mapping": ("- 5", "must be a mapping of keys, got list"),
    "no YAML": ("a: [", "is not readable YAML"),
    "no date": ("name: 2020-99-99", "is not readable YAML"),
    "bytes": (b"\xff\xfe\x00\x01", "is not readable YAML"),
    "deep": ("[" * 3000, "is not readable YAML"),
}

OPTIONS: dict[str, tuple[list[str], str]] = {
    "no such recipe": (["--recipe", "w3a3"], "recipe 'w3a3' is neither a stock recipe"),
    "recipe is a directory": (["--recipe", "{precious}"], "is neither a stock recipe .* nor a YAML file"),
    "no calibration": (["--calibration", "{precious}/none.txt"], "no calibration file '.*none.txt'"),
    "calibration is a directory": (["--calibration", "{precious}"], "no calibration file"),
    "empty calibration": (["--calibration", "{empty}"], "calibration text .* is empty"),
    "short calibration": (["--calibration", "{short}"], "calibration text has [0-9]+ tokens, a sample 16; give more"),
    "binary calibration": (["--calibration", "{binary}"], "is not UTF-8 text"),
    "absurd samples": (["--samples", "99999999999"], "99999999999 samples of 16 tokens take [0-9]+ GB, and this"),
    "negative seed": (["--seed", "-1"], "Invalid value for '--seed'"),
    "existing output": (["--output", "{precious}"], "exists; give another directory or --overwrite"),
    "precious output": (["--output", "{precious}", "--overwrite"], "exists and is no model directory, so"),
    "output is a file": (["--output", "{short}", "--overwrite"], "exists and is no model directory"),
    "output below a file": (["--output", "{short}/out"], "output .* cannot be written: Not a directory"),
    "output is the source": (["--output", "{model}", "--overwrite"], "holds the model that is being read; give"),
    "output in /proc": (["--output", "/proc/out"], "output /proc/out cannot be written: No such file or directory"),
    "endless name": (["--output", "{precious}/" + "o" * 300], "cannot be written: File name too long"),
}


@pytest.fixture
def scene(tiny_checkpoint, tmp_path, monkeypatch):
    """A directory to spoil, and what it holds beside the model."""
    shutil.copytree(tiny_checkpoint("mamba2")[0], tmp_path / "model")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("Hardly a word.")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def quantize(scene: Path, calibration: Path, *more: str) -> list[str]:
    """A command line that would succeed; of an option given twice the last counts."""
    always = ["--output", str(scene / "out"), "--samples", "2", "--seqlen", "16", "--device", "cpu"]
    return ["quantize", str(scene / "model"), "--recipe", "w8a8", "--calibration", str(calibration), *always, *more]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below, with the bytes of files."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


def refused(scene: Path, arguments: list[str], sentence: str) -> None:
    """The command ends with one sentence and status 2, and leaves everything as it was."""
    before = tree(scene)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert tree(scene) == before
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: ") and len(lines[0]) < 700, result.stderr
    assert re.search(sentence, lines[0]), lines[0]
    assert result.stdout == ""


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_quantised(case, scene, text):
    spoil, sentence = MODELS[case]
    spoil(scene / "model")
    refused(scene, quantize(scene, text), sentence)


def test_activations_are_looked_at_where_nothing_is_calibrated(scene, text):
    (scene / "plain.yaml").write_text("summary: Floats.")
    tensors(lambda held: held.update({IN_PROJ: held[IN_PROJ] * 1e37}))(scene / "model")
    refused(scene, quantize(scene, text, "--recipe", "plain.yaml"), r"layer 1 \(backbone.layers.1\): NaN or Inf in its")


def test_the_head_is_named_too(scene, text):
    tensors(lambda held: held["backbone.norm_f.weight"].fill_(3e38))(scene / "model")
    tensors(lambda held: held[HEAD].fill_(3e38))(scene / "model")
    refused(scene, quantize(scene, text), "lm_head: NaN or Inf in its weight_scale; look")


NEVER_OPENED = [name for name in MODELS if name not in {
    # what only calibration, or the writing of the output, looks at
    "Inf in activations", "config: NaN", "integers for weights",
    "tokenizer of another", "broken generation config", "quantised already", "config: another type",
}]  # fmt: skip


@pytest.mark.parametrize("case", NEVER_OPENED)
def test_a_model_that_cannot_be_opened(case, scene):
    spoil, sentence = MODELS[case]
    spoil(scene / "model")
    refused(scene, ["generate", str(scene / "model"), "--prompt", "a", "--device", "cpu"], sentence)
    assert not (scene / "executed").exists()


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_that_cannot_be_followed(case, scene, text):
    content, sentence = RECIPES[case]
    path = scene / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(scene, quantize(scene, text, "--recipe", str(path)), sentence)


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_cannot_be_met(case, scene, text):
    more, sentence = OPTIONS[case]
    names = {path.stem: path for path in scene.iterdir()}
    refused(scene, quantize(scene, text, *(part.format(**names) for part in more)), sentence)


def test_a_model_that_is_nowhere(scene, text):
    arguments = quantize(scene, text)
    arguments[1] = "nowhere/at/all"
    refused(scene, arguments, "'nowhere/at/all' is neither a directory, a Hub id, nor an embedded checkpoint")


@pytest.fixture
def quantised(stock, tmp_path, scene):
    """A quantised directory to spoil."""
    shutil.copytree(stock("w8a8", "mamba2"), scene / "quantised")
    return scene / "quantised"


def stamp(**values: Any) -> Callable[[Path], None]:
    """Change what config.json says of the quantisation."""

    def changed(folder: Path) -> None:
        own = json.loads((folder / "config.json").read_text())
        own["quantization_config"].update(values)
        (folder / "config.json").write_text(json.dumps(own))

    return changed


PACKED, SCALE = IN_PROJ + "_packed", IN_PROJ + "_scale"
QUANTISED: dict[str, tuple[Callable[[Path], object], str]] = {
    "newer format": (stamp(format_version=2), "has quamba format version 2, this quamba reads up to 1: up"),
    "format below all": (stamp(format_version=-1), "has quamba format version -1, this quamba reads up to 1"),
    "floats for codes": (tensors(lambda t: t.update({PACKED: t[PACKED].float()})), "should be torch.int8, and is F32"),
    "NaN in a scale": (value(SCALE, 5, float("nan")), f"tensor '{SCALE}' of .* holds NaN or Inf"),
    "no format": (stamp(format_version="new"), "has quamba format version new, this quamba reads up to 1"),
    "another method": (stamp(quant_method="bitsandwich"), "lacks the tensor"),
    "method is a number": (config(quantization_config=5), "config.json cannot be read"),
    "unknown recipe key": (stamp(recipe={"name": "x", "linear": {}}), "quantization_config: unknown key 'linear'"),
    "another recipe": (stamp(recipe={"name": "x"}), "should be .* by config and recipe, and is miss"),
    "missing tensor": (tensors(lambda t: t.pop(PACKED)), f"tensor '{PACKED}' should be .* and is missing"),
    "wrong shape": (tensors(lambda t: t.update({PACKED: t[PACKED][:-1].clone()})), "and is .295, 64"),
    "other sizes": (config(vocab_size=4096), r"should be \[4096, 64\] by config and recipe, and is \[2048, 64\]"),
    "absurd sizes": (config(vocab_size=2**31 - 1), r"should be \[2147483647, 64\] by config and recipe"),
    "weights cut off": (lambda f: os.truncate(f / WEIGHTS, 20_000), "model.safetensors is not a readable"),
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), "no tokenizer .*--tokenizer"),
    "generation config is a number": (write("generation_config.json", "5"), "cannot be opened: "),
}  # fmt: skip


@pytest.mark.parametrize("case", QUANTISED)
def test_a_quantised_directory_that_cannot_be_opened(case, scene, quantised, text):
    spoil, sentence = QUANTISED[case]
    spoil(quantised)
    refused(scene, ["generate", str(quantised), "--prompt", "a", "--device", "cpu"], sentence)


FULL = {
    "the weights, as safetensors says it": ("quamba.checkpoint.save_file", SafetensorError("I/O error: No space left")),
    "the weights": ("quamba.checkpoint.save_file", OSError(errno.ENOSPC, "No space left on device")),
    "the small files": ("pathlib.Path.write_text", OSError(errno.EDQUOT, "Disk quota exceeded")),
    "when it is flushed": ("quamba.staging.sync", OSError(errno.EIO, "Input/output error")),
    "when it is moved": ("quamba.staging.exchange", OSError(errno.EROFS, "Read-only file system")),
}


@pytest.mark.parametrize("old", [False, True], ids=["no output", "an old output"])
@pytest.mark.parametrize("case", FULL)
def test_a_full_disk(case, old, scene, text, stock, monkeypatch):
    where, error = FULL[case]
    if old:
        shutil.copytree(stock("w8a8", "mamba2"), scene / "out")
    elif case == "when it is moved":
        where = "pathlib.Path.rename"

    def full(*arguments: object, **options: object) -> None:
        raise error

    (scene / "plain.yaml").write_text("summary: Nothing to calibrate.")
    monkeypatch.setattr(where, full)
    refused(scene, quantize(scene, text, "--recipe", "plain.yaml", "--overwrite"), "output .*/out cannot be written: ")


def test_a_full_disk_under_the_results_of_eval(scene, text, monkeypatch):
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "result.json")

    monkeypatch.setattr("os.replace", full)
    arguments = ["eval", "mamba2-tiny", "--perplexity", str(text), "--window", "16", "--max-windows", "1"]
    refused(scene, [*arguments, "--json", "result.json"], "result.json cannot be read or written: No space left")


def test_parents_made_for_an_output_go_with_it(scene, text):
    arguments = quantize(scene, text, "--output", str(scene / "a" / "b" / "out"))
    value(IN_PROJ, 0, float("nan"))(scene / "model")
    refused(scene, arguments, "holds NaN or Inf")
