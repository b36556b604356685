"""Files changed at random: a command succeeds or says in one sentence why not, and leaves nothing half-written."""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from quamba.cli import app
from quamba.recipe import load_recipe

ROUNDS = 20
"""Changed files per kind of file."""
STRANGE: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 1.5, -0.0, 1e-40, 1e300, float("nan"), float("inf"), 2**31 - 1, 2**31, 2**63,
    10**30, -(2**40), "", "64", "x", "../../x", "\x00", "é", [], [1], [[]], {}, {"a": 1}, [None] * 3,
]  # fmt: skip


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value below."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from places(tree[key])


def change_tree(tree: Any, rng: random.Random) -> Any:
    """A copy in which one or two values were deleted, replaced, moved or renamed."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 2))):
        holder, key = rng.choice(list(places(tree)))
        kind = rng.choice(("delete", "replace", "replace", "replace", "move", "rename"))
        if kind == "delete":
            del holder[key]
        elif kind == "rename" and isinstance(holder, dict):
            holder[rng.choice((f"{key}x", key[:-1], "x"))] = holder.pop(key)
        elif kind == "move":
            holder[key] = copy.deepcopy(rng.choice([h[k] for h, k in places(tree)]))
        else:
            holder[key] = rng.choice(STRANGE)
        if not list(places(tree)):
            break
    return tree


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few bits flipped, or the end cut off, or a piece taken out, repeated or filled with zeros."""
    data = bytearray(data)
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.randrange(1, 40))
    match rng.randrange(5):
        case 0:
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 1:
            del data[start:]
        case 2:
            del data[start:end]
        case 3:
            data[start:start] = data[start:end]
        case 4:
            data[start:end] = bytes(end - start)
    return bytes(data)


def changed(text: str, parse: Callable[[str], Any], dump: Callable[[Any], str], rng: random.Random) -> bytes:
    """A text file changed as a tree three times out of four, else as bytes."""
    if rng.random() < 0.75:
        return dump(change_tree(parse(text), rng)).encode()
    return change_bytes(text.encode(), rng)


def as_json(file: Path, rng: random.Random) -> None:
    """Change a JSON file."""
    file.write_bytes(changed(file.read_text(), json.loads, json.dumps, rng))


def header(file: Path, rng: random.Random) -> None:
    """Change the header of a safetensors file: its JSON, or its bytes with their length."""
    data = file.read_bytes()
    size = 8 + struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.75:
        made = changed(data[8:size].decode(), json.loads, json.dumps, rng)
        file.write_bytes(struct.pack("<Q", len(made)) + made + data[size:])
    else:
        file.write_bytes(change_bytes(data[:size], rng) + data[size:])


def answer(arguments: list[str], folder: Path, allowed: set[str]) -> int:
    """The status of a command that either worked or wrote one sentence and nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = CliRunner().invoke(app, arguments)
    if result.exit_code != 0:
        assert result.exit_code == 2, repr(result.exception)
        lines = result.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("Error: "), result.stderr
        assert {path.name for path in folder.iterdir()} <= allowed
    return result.exit_code


def quantize(model: Path, recipe: Path, text: Path, allowed: set[str]) -> int:
    """The status of a small quantisation beside the recipe; its output is removed."""
    output = recipe.parent / "q"
    arguments = ["quantize", str(model), "--recipe", str(recipe), "--output", str(output), "--calibration", str(text)]
    status = answer([*arguments, "--samples", "2", "--seqlen", "8", "--device", "cpu"], recipe.parent, allowed)
    shutil.rmtree(output, ignore_errors=True)
    return status


@pytest.fixture(scope="module")
def model(tiny_checkpoint, tmp_path_factory):
    """A model of one layer in two shards, so that it has an index and is quick."""
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    source, made = tiny_checkpoint("mamba2", (("num_hidden_layers", 1),))
    shutil.copytree(source, folder)
    (folder / "model.safetensors").unlink()
    made.save_pretrained(folder, max_shard_size="300KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


TARGETS: dict[str, Callable[[Path, random.Random], None]] = {
    "config": lambda folder, rng: as_json(folder / "config.json", rng),
    "index": lambda folder, rng: as_json(folder / "model.safetensors.index.json", rng),
    "header": lambda folder, rng: header(rng.choice(sorted(folder.glob("*.safetensors"))), rng),
}


@pytest.mark.parametrize("target", TARGETS)
def test_a_changed_model_is_quantised_or_refused(target, model, text, tmp_path):
    (tmp_path / "recipe.yaml").write_text("linears: {default: {format: w8a8, method: rtn}}")
    refused = 0
    for seed in range(ROUNDS):
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(model, folder)
        TARGETS[target](folder, random.Random(seed))
        refused += quantize(folder, tmp_path / "recipe.yaml", text, {"model", "recipe.yaml"}) != 0
    assert refused > ROUNDS // 3


def test_a_changed_recipe_is_followed_or_refused(model, text, tmp_path):
    layers = [{"match": "0", "conv": {"bits": 16}, "linears": {"out_proj": {"format": "w8a8"}}}]
    whole = yaml.safe_dump(load_recipe("w4a8").model_dump(mode="json") | {"layers": layers})
    refused = 0
    for seed in range(ROUNDS):
        (tmp_path / "r.yaml").write_bytes(changed(whole, yaml.safe_load, yaml.safe_dump, random.Random(seed)))
        refused += quantize(model, tmp_path / "r.yaml", text, {"r.yaml"}) != 0
    assert refused > ROUNDS // 3


@pytest.mark.parametrize("target", ["config", "header"])
def test_a_changed_quantised_directory_is_opened_or_refused(target, stock, tmp_path):
    refused = 0
    for seed in range(ROUNDS):
        folder = tmp_path / "q"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(stock("w8a8", "mamba2"), folder)
        TARGETS[target](folder, random.Random(seed))
        arguments = ["generate", str(folder), "--prompt", "a", "--max-new-tokens", "1", "--device", "cpu"]
        refused += answer(arguments, tmp_path, {"q"}) != 0
    assert refused > ROUNDS // 3
