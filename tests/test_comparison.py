"""What `quamba compare` finds, against plain computations on transformers' own models."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import quamba
from quamba.errors import UserError
from quamba.inspection import pair
from quamba.inspection.opened import Opened
from quamba.recipe import parse_recipe
from quamba.transforms import residual_rotation
from quamba_kernels.hadamard import hadamard_matrix


@pytest.fixture(scope="module", params=["mamba", "mamba2"])
def family(request):
    return request.param


@pytest.fixture
def rotated(family, tiny_checkpoint, quantise):
    """(original, the same with both rotations): equal models in different bases."""
    folder, _ = tiny_checkpoint(family)
    return folder, quantise(folder, parse_recipe({"name": "rotated"}, "rotated"))


def relative(got, want):
    return float((got - want).norm() / want.norm())


def test_a_model_equals_itself(tiny_checkpoint, family, text):
    folder, _ = tiny_checkpoint(family)
    found = quamba.compare(folder, folder, text=text, tokens=40, max_new_tokens=4, device="cpu")
    assert found.layer_errors == (0.0, 0.0) and found.top1_agreement == 1 and found.divergence is None
    assert found.kl_mean == found.kl_p99 == 0


def test_a_model_equals_its_rotated_self(rotated, text, monkeypatch):
    found = quamba.compare(*rotated, text=text, tokens=600, max_new_tokens=8, device="cpu")
    assert max(found.layer_errors) < 1e-4 and abs(found.kl_mean) < 1e-7 and found.top1_agreement > 0.99
    assert found.divergence is None and found.tokens == 600
    monkeypatch.setattr(Opened, "upright", lambda self, hidden: hidden.double())
    assert min(quamba.compare(*rotated, text=text, tokens=40, max_new_tokens=0, device="cpu").layer_errors) > 1


def test_comparison_is_its_definition(family, tiny_checkpoint, stock, text, monkeypatch):
    folder, model = tiny_checkpoint(family)
    other = stock("w4a8", family)
    monkeypatch.setattr(pair, "WINDOW", 40)
    found = quamba.compare(folder, other, text=text, tokens=100, prompt="The index", max_new_tokens=12, device="cpu")
    quantised, tokenizer = quamba.load(other, device="cpu", dtype=torch.float32)
    ids = torch.tensor(tokenizer(text.read_text(), add_special_tokens=False)["input_ids"][:100])
    kls, same, hidden = [], 0, {0: [[], []], 1: [[], []]}
    rotation = residual_rotation(64, 0)
    matrix = torch.diag(rotation.signs) @ hadamard_matrix(64)
    for window in ids.split(40):
        logits = []
        for index, each in enumerate((model, quantised)):
            handles = [
                each.get_submodule(f"backbone.layers.{layer}").register_forward_hook(
                    lambda module, args, output, layer=layer, index=index: hidden[layer][index].append(output[0])
                )
                for layer in (0, 1)
            ]
            with torch.inference_mode():
                logits.append(each(window[None], use_cache=False).logits[0].double())
            for handle in handles:
                handle.remove()
        a, b = (x.log_softmax(-1) for x in logits)
        kls += F.kl_div(b, a, reduction="none", log_target=True).sum(-1).tolist()
        same += int((logits[0].argmax(-1) == logits[1].argmax(-1)).sum())
    assert found.kl_mean == pytest.approx(np.mean(kls), rel=1e-3)
    assert found.kl_p99 == pytest.approx(np.percentile(kls, 99), rel=1e-3)
    assert found.top1_agreement == same / 100
    for layer in (0, 1):
        want, got = (torch.cat(h).double() for h in hidden[layer])
        assert found.layer_errors[layer] == pytest.approx(relative(got @ matrix.T, want), rel=1e-3)


def test_divergence_is_where_greedy_decoding_parts(tiny_checkpoint, stock, text):
    folder, _ = tiny_checkpoint("mamba2")
    other, prompt = stock("w4a8", "mamba2"), "The index of a table"
    found = quamba.compare(folder, other, text=text, tokens=20, prompt=prompt, max_new_tokens=12, device="cpu")
    new = []
    for source in (folder, other):
        model, tokenizer = quamba.load(source, device="cpu", dtype=torch.float32)
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        new.append(model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist())
    at = next(i for i, (a, b) in enumerate(zip(*new, strict=True)) if a != b)
    where = found.divergence
    assert (where.position, where.a_id, where.b_id) == (at, new[0][at], new[1][at])
    assert (where.a, where.b) == (tokenizer.decode([new[0][at]]), tokenizer.decode([new[1][at]]))
    assert where.common == tokenizer.decode(new[0][:at])


def test_a_model_that_ended_differs_from_one_that_went_on(monkeypatch):
    opened = type("Opened", (), {"tokenizer": type("T", (), {"decode": staticmethod(lambda ids: f"<{ids}>")})})
    new = iter([[5, 6], [5, 6, 7], [1, 2], [1, 2]])
    monkeypatch.setattr(pair, "_greedy", lambda *arguments: next(new))
    found = pair._diverge((opened, opened), None, 3, lambda *told: None)
    assert found == pair.Divergence(2, "<[5, 6]>", "", "<[7]>", None, 7)
    assert pair._diverge((opened, opened), None, 3, lambda *told: None) is None


def test_models_with_other_tokenizers_are_not_compared(tiny_checkpoint, tmp_path, text):
    folder, _ = tiny_checkpoint("mamba2")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="different tokenizers"):
        quamba.compare(folder, tmp_path, text=text, tokens=20, device="cpu")
