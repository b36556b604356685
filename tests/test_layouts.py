"""Layouts of checkpoint files: what each stands for, what it refuses, and that nothing in a file runs."""

from __future__ import annotations

import argparse
import enum
import json
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

import quamba
from quamba import embedded, layouts
from quamba.checkpoint import Checkpoint
from quamba.cli import app
from quamba.errors import UserError
from quamba.layouts import pickles

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
