"""Megatron-LM's checkpoints: shares merged, what training leaves ignored, what cannot be read told in a sentence."""

from __future__ import annotations

import argparse
import enum
import io
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import quamba
from quamba import embedded, layouts
from quamba.checkpoint import Checkpoint
from quamba.errors import UserError

TOKENIZER = str(embedded.checkpoint("mamba2-tiny"))
IDS = torch.arange(40)[None]


class ModelType(enum.Enum):
    """As the training's own class of that name, of which a file keeps a value."""

    encoder_or_decoder = 1


def shared(name: str, tensor: torch.Tensor, count: int, pieces: list[int]) -> list[torch.Tensor]:
    """What each of ``count`` tensor-parallel ranks holds of a tensor, as Megatron-LM's layers split it."""
    if name.endswith((".norm.weight", "norm_f.weight")) and "mixer" not in name:
        return [tensor] * count
    if name.endswith("out_proj.weight"):
        return [part.clone() for part in tensor.chunk(count, 1)]
    if "in_proj" in name or "conv1d" in name:
        parts = tensor.split(pieces if "in_proj" in name else pieces[1:4])
        return [torch.cat([part.chunk(count)[rank] for part in parts]) for rank in range(count)]
    return [part.clone() for part in tensor.chunk(count)]


def write_megatron(folder: Path, model, ranks: int, stages: int, arguments: dict, fused: bool = False) -> Path:
    """A checkpoint of Megatron-LM with the state of a transformers model, and what training leaves beside it."""
    c = model.config
    inner, key = c.num_heads * c.head_dim, c.n_groups * c.state_size
    pieces = [inner, inner, key, key, c.num_heads]
    outside = {"backbone.embeddings.weight": (0, "embedding.word_embeddings.weight"),
               "backbone.norm_f.weight": (-1, "decoder.final_norm.weight"),
               "lm_head.weight": (-1, "output_layer.weight")}
    states: dict[tuple[int, int], dict] = {(r, s): {} for r in range(ranks) for s in range(stages)}
    depth = c.num_hidden_layers // stages
    for name, tensor in model.state_dict().items():
        if name in outside:
            stage, there = outside[name][0] % stages, outside[name][1]
        else:
            layer, _, below = name.removeprefix("backbone.layers.").partition(".")
            stage = int(layer) // depth
            below = "mixer.in_proj.layer_norm_weight" if fused and below == "norm.weight" else below
            there = f"decoder.layers.{int(layer) % depth}.{below}"
        for rank, part in enumerate(shared(name, tensor, ranks, pieces)):
            states[rank, stage][there] = part
    for (rank, stage), state in states.items():
        where = folder / "release" / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if stages > 1 else ""))
        where.mkdir(parents=True)
        state["decoder.layers.0.mixer.in_proj._extra_state"] = io.BytesIO(b"scales")
        held = {"model": state, "checkpoint_version": 3.0, "iteration": 7}
        held["args"] = argparse.Namespace(model_type=ModelType.encoder_or_decoder, bf16=True, **arguments)
        held["rng_state"] = [{"np_rng_state": np.random.RandomState(0).get_state()}]
        torch.save(held, where / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("release\n")
    return folder


@pytest.fixture
def training(monkeypatch):
    """The module of the training, there while a checkpoint is written and gone when it is read."""
    module = types.ModuleType("megatron.core.enums")
    module.ModelType = ModelType
    monkeypatch.setattr(ModelType, "__module__", module.__name__)
    for name in ("megatron", "megatron.core", "megatron.core.enums"):
        monkeypatch.setitem(sys.modules, name, module)
    return lambda: [sys.modules.pop(name, None) for name in ("megatron", "megatron.core", "megatron.core.enums")]


MEGATRON = {
    "one": ({"n_groups": 8}, 1, 1, {}, False),
    "four-ranks": ({"n_groups": 4}, 4, 1, {"mamba_num_groups": 4, "normalization": "RMSNorm"}, True),
    "stages": ({"n_groups": 8, "num_hidden_layers": 4}, 2, 2, {"norm_epsilon": 1e-5}, False),
}


@pytest.mark.parametrize("case", sorted(MEGATRON))
def test_megatron_gives_the_same_logits_and_bytes(case, tiny_checkpoint, training, quantise, tmp_path):
    changes, *written = MEGATRON[case]
    changes = {**changes, "tie_word_embeddings": False, "residual_in_fp32": False}
    folder, model = tiny_checkpoint("mamba2", tuple(sorted(changes.items())), torch.bfloat16)
    original = write_megatron(tmp_path / "megatron", model, *written)
    training()
    ours, _ = quamba.load(original, tokenizer=TOKENIZER, device="cpu")
    theirs, _ = quamba.load(folder, device="cpu")
    assert ours.dtype == torch.bfloat16 and ours.config.n_groups == changes["n_groups"]
    with torch.inference_mode():
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    outputs = quantise(folder, "w4a8", "theirs"), quantise(original, "w4a8", "ours", tokenizer=TOKENIZER)
    a, b = ((output / "model.safetensors").read_bytes() for output in outputs)
    assert a == b
    assert "megatron" not in sys.modules


def test_megatron_tells_what_it_cannot_read(tiny_checkpoint, training, tmp_path):
    _, model = tiny_checkpoint("mamba2", (("n_groups", 8),))
    folder = write_megatron(tmp_path / "megatron", model, 2, 1, {})
    file = folder / "release" / "mp_rank_01" / "model_optim_rng.pt"
    held = torch.load(file, weights_only=False)
    training()

    def refused(sentence: str) -> None:
        with pytest.raises(UserError) as error:
            layouts.find(folder).config(folder)
        assert sentence in str(error.value)

    with pytest.raises(UserError, match="has no tokenizer; give one by --tokenizer"):
        Checkpoint(folder).tokenizer()
    held["model"]["decoder.layers.1.mlp.linear_fc1.weight"] = torch.ones(2, 2)
    held.pop("args")
    torch.save(held, file)
    refused("names and shapes of")
    torch.save(held, folder / "release" / "mp_rank_00" / "model_optim_rng.pt")
    refused("linear_fc1.weight', which is no part of a Mamba2 model")
    file.unlink()
    held["model"].pop("decoder.layers.1.mlp.linear_fc1.weight")
    for name, value, sentence in (
        ("apply_layernorm_1p", True, "apply_layernorm_1p=True"), ("normalization", "LayerNorm", "only 'RMSNorm'"),
        ("norm_epsilon", 1e-6, "only 1e-05"), ("mamba_num_groups", 3, "do not fit 3 state groups"),
    ):  # fmt: skip
        held["args"] = argparse.Namespace(**{name: value})
        torch.save(held, folder / "release" / "mp_rank_00" / "model_optim_rng.pt")
        refused(sentence)
    (folder / "release" / "mp_rank_02").mkdir()
    torch.save(held, folder / "release" / "mp_rank_02" / "model_optim_rng.pt")
    refused("2 of the 3 ranks")
    (folder / "latest_checkpointed_iteration.txt").write_text("20")
    refused("iter_0000020 has no mp_rank_00/model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("../..")
    refused("should hold an iteration")


class Writer:
    """Calls a function of a package that may be ignored, and so must not be called."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return np.save, (str(self.file), [1])


def test_nothing_that_is_ignored_runs(tiny_checkpoint, training, tmp_path):
    _, model = tiny_checkpoint("mamba2", (("n_groups", 8),))
    trace = tmp_path / "trace.npy"
    folder = write_megatron(tmp_path / "megatron", model, 1, 1, {"left": Writer(trace)})
    file = folder / "release" / "mp_rank_00" / "model_optim_rng.pt"
    torch.load(file, weights_only=False)
    assert trace.exists()
    trace.unlink()
    training()
    assert quamba.load(folder, tokenizer=TOKENIZER, device="cpu")[0](IDS).logits.isfinite().all()
    assert not trace.exists()
