"""Architectures whose layers stay transformers': quantised, saved, reloaded, generated from and evaluated."""

import inspect
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import quamba
from architectures import HOSTED, LINEAR
from quamba import embedded
from quamba.decoding import returned_cache
from quamba.evaluate import perplexity
from quamba.models import ARCHITECTURES, describe
from quamba.modules.linear import Linear
from quamba.recipe import Recipe, load_recipe, parse_recipe, stock_recipes

EXACT = parse_recipe({"rotate": {"residual": True, "output": True}, "cluster": {}}, "exact")
CASES = [(name, i) for name in HOSTED for i in range(1 if name in LINEAR else len(ARCHITECTURES[name].tiny))]
ALONE = ("rwkv",)
"""Where transformers' own decode mixes up the sequences of a batch."""
IDS = torch.randint(1, 2048, (2, 23), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def original(request, build, tmp_path_factory):
    """(directory, transformers' model) of a tiny random checkpoint."""
    name, i = request.param
    model = build(name, {**ARCHITECTURES[name].tiny[i], "vocab_size": 2048})
    folder = tmp_path_factory.mktemp(f"{name}{i}")
    model.save_pretrained(folder, max_shard_size="300KB")
    AutoTokenizer.from_pretrained(embedded.checkpoint(embedded.names()[0])).save_pretrained(folder)
    return folder, model


def logits(model, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, use_cache=False).logits


def change(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def made(original, recipe: str | Recipe, tmp_path: Path):
    report = quamba.quantize(original[0], recipe, tmp_path / "q", device="cpu", samples=5, seqlen=32)
    return report, *quamba.load(tmp_path / "q", device="cpu")


def stepped(model, ids: torch.Tensor) -> torch.Tensor | None:
    """Logits of a prompt and then one token at a time; None of a model that keeps its state to itself."""
    placed = "position_ids" in inspect.signature(model.forward).parameters  # not every model counts its cache
    cache, steps, start = {}, [], 0
    with torch.inference_mode():
        for part in (ids[:, :9], *ids[:, 9:].split(1, 1)):
            end = start + part.shape[1]
            where = {"position_ids": torch.arange(start, end).expand(len(part), -1)} if placed else {}
            out = model(part, use_cache=True, **cache, **where)
            cache = returned_cache(out)
            if not cache:
                return None
            steps.append(out.logits)
            start = end
    return torch.cat(steps, 1)


def written_apart(model, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """Greedy continuation, every token from a forward over all before it."""
    for _ in range(tokens):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
    return ids


def test_floats_are_transformers_own(original, tmp_path) -> None:
    folder, model = original
    assert change(logits(quamba.load(folder, device="cpu")[0]), logits(model)) < 1e-5
    report, rotated, _ = made(original, EXACT, tmp_path)
    assert change(logits(rotated), logits(model)) < 1e-5
    ids = IDS[:1] if model.config.model_type in ALONE else IDS
    step = stepped(rotated, ids)
    assert change(logits(rotated, ids) if step is None else step, logits(model, ids)) < 1e-4
    begin = ids[:, :5]
    written = rotated.generate(begin, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(begin))
    want = written_apart(rotated, begin, 4)[:, : written.shape[1]]  # generate stops at the end of the text
    assert torch.equal(written[0], want[0]) or 0 in want[0]
    assert bool(report.notes) == any("not rotated" in note for note in report.notes)


@pytest.mark.parametrize("recipe", stock_recipes())
def test_every_recipe(original, recipe: str, tmp_path) -> None:
    folder, model = original
    report, quantised, tokenizer = made(original, recipe, tmp_path)
    assert report.sizes["layers"] < 0.9 * report.sizes["layers_original"]
    linears = [m for m in quantised.modules() if isinstance(m, Linear)]
    spec = describe(model.config)
    wanted = sum(
        sub.mixer.axes[proj.stack].size if proj.stack else 1
        for block in spec.blocks for sub in block.sublayers for proj in sub.mixer.projs if not proj.keep
    )  # fmt: skip
    assert len(linears) == wanted + 1 and all(m.format.name != "float" for m in linears)
    full = logits(quantised)
    # random weights have no redundancy, and a router that flips takes another expert
    assert change(full, logits(model)) < (0.35 if recipe == "w8a8" else 0.9)
    ids = IDS[:1] if model.config.model_type in ALONE else IDS
    step = stepped(quantised, ids)
    assert step is None or change(step, full[: len(ids)]) < (1e-2 if recipe == "w4a16" else 0.35)
    mask = torch.ones(len(ids), 5, dtype=torch.int64)
    written = quantised.generate(ids[:, :5], max_new_tokens=3, min_new_tokens=3, do_sample=False, attention_mask=mask)
    assert written.shape == (len(ids), 8)
    text = tmp_path / "text.txt"
    text.write_text(embedded.calibration_text().read_text(encoding="utf-8")[:600], encoding="utf-8")
    assert perplexity(quantised, tokenizer, text, window=32, max_windows=2)["value"] > 1


@pytest.mark.parametrize("name", ["bamba", "zamba2"])
def test_the_samples_that_decide_clusters_may_end_within_a_batch(name: str, build, tmp_path) -> None:
    model = build(name, {**ARCHITECTURES[name].tiny[0], "vocab_size": 2048})
    model.save_pretrained(tmp_path / "original")
    AutoTokenizer.from_pretrained(embedded.checkpoint(embedded.names()[0])).save_pretrained(tmp_path / "original")
    stock = load_recipe("w8a8")
    recipe = stock.model_copy(update={"cluster": stock.cluster.model_copy(update={"samples": 5})})
    quamba.quantize(tmp_path / "original", recipe, tmp_path / "q", device="cpu", samples=8, seqlen=32)
    assert change(logits(quamba.load(tmp_path / "q", device="cpu")[0]), logits(model)) < 0.35
