"""End to end: quantise, save, reload through transformers, generate, evaluate; every recipe on every architecture."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import quamba
from architectures import OWN
from quamba import embedded
from quamba.errors import UserError
from quamba.models import ARCHITECTURES
from quamba.recipe import load_recipe, stock_recipes

CASES = [(name, i) for name in sorted(OWN) for i in range(len(ARCHITECTURES[name].tiny))]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def random_checkpoint(request, tmp_path_factory):
    """A directory with a tiny random model of one architecture and the embedded tokenizer."""
    from transformers import AutoConfig

    name, index = request.param
    folder = tmp_path_factory.mktemp(f"{name}{index}")
    tokenizer = AutoTokenizer.from_pretrained(embedded.checkpoint("mamba2-tiny"))
    config = AutoConfig.for_model(name, **{**ARCHITECTURES[name].tiny[index], "vocab_size": 2048})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size="200KB")
    tokenizer.save_pretrained(folder)
    return folder


def close(recipe: str, a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("recipe", sorted(stock_recipes()))
def test_every_recipe_on_every_architecture(random_checkpoint, recipe, tmp_path):
    out = tmp_path / "q"
    report = quamba.quantize(random_checkpoint, recipe, out, samples=16, seqlen=128)
    assert report.sizes["layers"] < 0.75 * report.sizes["layers_original"]
    original, tokenizer = quamba.load(random_checkpoint, device="cpu", dtype=torch.float32)
    model, _ = quamba.load(out, device="cpu", dtype=torch.float32)
    ids = tokenizer("The index is a list of keys and rows in sorted order.", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        full = model(ids).logits
        # random weights have no outliers and no redundancy: 4 bits cost what 4 bits cost
        assert close(recipe, full, original(ids).logits) < {8: 0.05, 4: 0.3}[8 if recipe == "w8a8" else 4]
        cache, steps = None, []
        for t in range(ids.shape[1]):
            step = model(ids[:, t : t + 1], cache_params=cache, use_cache=True)
            cache = step.cache_params
            steps.append(step.logits)
    # the state is stored in 8 or 16 bits between steps, which prefill does not see
    assert close(recipe, torch.cat(steps, 1), full) < 0.03


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """mamba2-tiny as W4A8, the recipe in which everything is integer."""
    out = tmp_path_factory.mktemp("w4a8") / "q"
    quamba.quantize("mamba2-tiny", "w4a8", out, samples=8, seqlen=128)
    return out


def test_directory_is_what_hugging_face_tools_expect(quantised):
    names = {p.name for p in quantised.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "recipe.yaml", "README.md"} <= names
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    config = json.loads((quantised / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "quamba"
    assert load_recipe(quantised / "recipe.yaml").model_dump(mode="json") == config["quantization_config"]["recipe"]
    tensors = load_file(quantised / "model.safetensors")
    integers = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    assert all(any(part in name for part in ("packed", "end", "multiplier")) for name in integers)


def test_save_and_load_keep_every_bit(quantised, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(quantised)
    ids = torch.arange(10)[None]
    with torch.inference_mode():
        before = model(ids).logits
    model.save_pretrained(tmp_path)
    stored, again = load_file(quantised / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert stored.keys() == again.keys()
    assert all(torch.equal(stored[n], again[n]) and stored[n].dtype == again[n].dtype for n in stored)
    with torch.inference_mode():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, before)


def test_two_runs_with_one_seed_give_identical_bytes(quantised, tmp_path):
    quamba.quantize("mamba2-tiny", "w4a8", tmp_path / "q", samples=8, seqlen=128)
    for name in ("model.safetensors", "config.json", "recipe.yaml"):
        assert (tmp_path / "q" / name).read_bytes() == (quantised / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generate_batched_and_left_padded(quantised, dtype):
    model = AutoModelForCausalLM.from_pretrained(quantised, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(quantised, padding_side="left")
    texts = ["The database file", "In this case, the second argument of the function is the number of"]
    batch = model.generate(
        **tokenizer(texts, return_tensors="pt", padding=True), max_new_tokens=4, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    alone = model.generate(
        **tokenizer(texts[0], return_tensors="pt"), max_new_tokens=4, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    # products of few rows may round differently from those of many, so compare the first step's logits
    padded, plain = batch.logits[0][0].float(), alone.logits[0][0].float()
    assert close("", padded, plain) < (1e-3 if dtype == torch.float32 else 0.05)


def test_text_generation_pipeline(quantised):
    speak = pipeline("text-generation", model=str(quantised))
    text = speak("The value of the", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert text.startswith("The value of the") and len(text) > len("The value of the")


def test_lm_eval_takes_the_model(quantised):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = quamba.load(quantised, device="cpu")
    adapter = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    pairs = [("The table", " has rows"), ("The table", " xq zz")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    good, bad = adapter.loglikelihood(requests, disable_tqdm=True)
    assert good[0] > bad[0]


def test_without_quamba_the_directory_shows_missing_weights(quantised):
    """transformers skips an unknown quant_method; the integers then have no name that a float weight could take."""
    code = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        "_, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "missing = info['missing_keys']; assert 'quamba' not in sys.modules\n"
        "assert any('in_proj.weight' in k for k in missing) and any('embeddings' in k for k in missing), missing\n"
        "print('MISSING', len(missing))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(quantised)], capture_output=True, text=True)
    assert run.returncode != 0 or "MISSING" in run.stdout, run.stderr
    assert "assert" not in run.stderr, run.stderr


@pytest.mark.parametrize("first", ["import quamba", "import transformers.quantizers, quamba", "import quamba.loading"])
def test_importing_quamba_registers_the_format_whatever_came_first(first):
    code = (
        f"{first}\nfrom transformers import AutoModelForCausalLM; import transformers.quantizers as quantizers\n"
        "assert quantizers.auto.AUTO_QUANTIZER_MAPPING['quamba'].__name__ == 'QuambaQuantizer'\n"
        "assert type(quantizers.__spec__.loader) is type(quantizers.__loader__) is type(quantizers.auto.__loader__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_quamba_waits_for_neither_torch_nor_transformers():
    code = "import sys, quamba; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unquantised_logits_equal_transformers(random_checkpoint):
    ours, _ = quamba.load(random_checkpoint, device="cpu", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(random_checkpoint, dtype=torch.float32)
    ids = torch.randint(0, 2048, (2, 70), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert (ours(ids).logits - theirs(ids).logits).abs().max() < 1e-4


def test_newer_format_version_is_refused(quantised, tmp_path):
    import shutil

    shutil.copytree(quantised, tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="format version 99"):
        quamba.load(tmp_path / "q", device="cpu")


def test_mixed_bit_widths_are_a_recipe(tmp_path):
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(
        "summary: mixed\nlinears:\n  default: {format: w4a8, method: rtn}\n  dt_proj: {format: float}\n"
        "layers:\n  - {match: '1-2', linears: {out_proj: {format: w8a8}}}\n"
        "  - {match: [5], linears: {default: {format: w4a16, group_size: 64}}}\n"
    )
    quamba.quantize("mamba2-tiny", recipe, tmp_path / "q", samples=2, seqlen=64)
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    base = "backbone.layers.{}.mixer.out_proj.weight_packed"
    assert tensors[base.format(0)].dtype == torch.int32
    assert tensors[base.format(1)].dtype == torch.int8
    assert f"{base.format(5).removesuffix('packed')}multiplier" not in tensors
    assert quamba.load(tmp_path / "q", device="cpu")[0](torch.arange(5)[None]).logits.isfinite().all()


def test_output_is_left_alone_unless_told(quantised, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="exists"):
            quamba.quantize("mamba2-tiny", "w8a8", tmp_path, samples=1, seqlen=8, overwrite=overwrite)
    assert [p.name for p in Path(tmp_path).iterdir()] == ["precious.txt"]
