"""Zamba2's transformer blocks, which several layers use: calibrated on every use, quantised once, stored once."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import quamba
from quamba import calibration, pipeline, resume
from quamba.errors import UserError
from quamba.modules.borrowed import Borrowed
from quamba.modules.linear import Linear
from quamba.recipe import parse_recipe

SHARED = "model.layers.1.shared_transformer"
"""Used by layer 3 too."""
IDS = torch.randint(1, 2048, (2, 19), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.inference_mode():
        return model(IDS, use_cache=False).logits


def test_the_weights_are_there_once(stock):
    folder = stock("w4a8", "zamba2")
    names = set(load_file(folder / "model.safetensors"))
    assert any(".shared_transformer.self_attn.q_proj.weight_packed" in name for name in names)
    assert not any(name.startswith("model.layers.3.shared_transformer") for name in names)
    model, _ = quamba.load(folder, device="cpu")
    assert isinstance(model.model.layers[3].shared_transformer, Borrowed)
    assert set(model.state_dict()) == names


def test_saved_again_it_is_the_same(stock, tmp_path):
    folder = stock("w8a8", "zamba2")
    model, _ = quamba.load(folder, device="cpu")
    before = logits(model)
    model.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(load_file(folder / "model.safetensors"))
    again = type(model).from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), before)


def test_every_use_is_calibrated_on(tiny_checkpoint, quantise, text, monkeypatch):
    """The Hessians count the tokens of all uses, an adapter's second those of its own; what a later use is calibrated
    on is what transformers' model gives there."""
    folder, model = tiny_checkpoint("zamba2")
    tokens, uses, blocks = {}, {}, {}

    def count(linear, rows, hessian, original=Linear.quantise_rows):
        tokens[id(linear)] = hessian.tokens
        original(linear, rows, hessian)

    def keep(*args, original=pipeline.later_uses):
        uses.update(original(*args))
        return uses

    def store(block, prefix, kept_type, original=pipeline.stored):
        blocks[prefix] = block
        return original(block, prefix, kept_type)

    monkeypatch.setattr(Linear, "quantise_rows", count)
    monkeypatch.setattr(pipeline, "later_uses", keep)
    monkeypatch.setattr(pipeline, "stored", store)
    recipe = parse_recipe({"linears": {"default": {"format": "w8a8"}}, "rotate": {"residual": False}}, "plain")
    quantise(folder, recipe, samples=4, seqlen=24)
    shared = blocks["model.layers.1"].lend([SHARED])[SHARED]
    linears = {name: module for name, module in shared.named_modules() if isinstance(module, Linear)}
    own = {name for name in linears if "adapter" in name and name.endswith(".1")}
    assert {tokens[id(linears[name])] for name in own} == {4 * 24}
    assert {tokens[id(linear)] for name, linear in linears.items() if name not in own} == {2 * 4 * 24}
    assert all(float(linear.input.scale) > 1e-3 for linear in linears.values())
    ((_, reached),) = uses[SHARED]
    seen = []
    handle = model.model.layers[3].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.inference_mode():
        model(calibration.windows(calibration.read_text(text), quamba.load(folder)[1], 4, 24, 0), use_cache=False)
    handle.remove()
    assert torch.allclose(reached, seen[0], atol=1e-4)


@pytest.mark.parametrize("until", [1, 2, 3])
def test_an_interrupted_run_goes_on(until, tiny_checkpoint, stock, text, tmp_path, monkeypatch):
    def stop(block, *rest, original=pipeline.quantise_block):
        if block.layer_idx == until:
            raise KeyboardInterrupt
        return original(block, *rest)

    folder, _ = tiny_checkpoint("zamba2")
    given = {"calibration_text": text, "samples": 4, "seqlen": 32, "device": "cpu", "resume": True}
    monkeypatch.setattr(resume, "SHARE", float("inf"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "quantise_block", stop)
        quamba.quantize(folder, "w4a8", tmp_path / "q", **given)
    quamba.quantize(folder, "w4a8", tmp_path / "q", **given)
    whole, again = (f / "model.safetensors" for f in (stock("w4a8", "zamba2"), tmp_path / "q"))
    assert whole.read_bytes() == again.read_bytes()


def test_copies_must_be_equal(tiny_checkpoint, tmp_path):
    """A checkpoint may hold every use's copy; one whose copies differ shares nothing, and is refused."""
    folder, model = tiny_checkpoint("zamba2")
    shutil.copytree(folder, tmp_path / "copies")
    file = tmp_path / "copies" / "model.safetensors"
    tensors = load_file(file)
    shared = {name: tensor for name, tensor in tensors.items() if name.startswith(SHARED)}
    copies = {name.replace("layers.1.", "layers.3."): tensor.clone() for name, tensor in shared.items()}
    save_file({**tensors, **copies}, file, metadata={"format": "pt"})
    assert torch.allclose(logits(quamba.load(file.parent, device="cpu")[0]), logits(model), atol=1e-3)
    name = f"{SHARED}.self_attn.k_proj.weight".replace("layers.1.", "layers.3.")
    save_file({**tensors, **copies, name: copies[name] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name} of .* differs from that of {SHARED}, whose weights it should be"):
        quamba.quantize(file.parent, "w8a8", tmp_path / "q", samples=1, seqlen=8, device="cpu")
