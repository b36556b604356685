"""Models of types that no file describes: their linears quantised on request, everything else left as it is."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import quamba
from quamba import embedded, linears_only
from quamba.cli import app
from quamba.errors import UserError
from quamba.evaluate import perplexity
from quamba.models import ARCHITECTURES
from quamba.modules.linear import Linear
from quamba.modules.undescribed import blocks
from quamba.ranks import Ranks
from quamba.recipe import parse_recipe, stock_recipes

SMALL = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 2048, "num_attention_heads": 4,
         "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
CONFIGS = {
    "llama": {**SMALL, "num_hidden_layers": 2, "tie_word_embeddings": True},
    "lfm2": {**SMALL, "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "block_multiple_of": 32},
    "zamba": {**SMALL, "num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
              "num_key_value_heads": 4, "attention_hidden_size": 128, "attention_head_dim": 32, "mamba_d_state": 16,
              "mamba_dt_rank": 8, "n_mamba_heads": 2},
}  # fmt: skip
"""Attention alone; short convolutions; Mamba1 mixers beside a block that is passed the embedding, so that no two
samples' layers are called with the same."""
CHAINS = ("llama", "lfm2")
IDS = torch.randint(1, 2048, (2, 21), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=CONFIGS)
def original(request, build, tmp_path_factory):
    """(directory, transformers' model) of a type that is not known."""
    assert request.param not in ARCHITECTURES
    model = build(request.param, CONFIGS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded.checkpoint(embedded.names()[0])).save_pretrained(folder)
    return folder, model


def logits(model):
    with torch.inference_mode():
        return model(IDS, use_cache=False).logits


def change(got, want) -> float:
    return float((got - want).norm() / want.norm())


def test_unknown_types_are_refused_without_the_flag(original, tmp_path):
    with pytest.raises(
        UserError, match=r"is not supported; known types are .*mamba2.*\(quamba quantize --linears-only\)"
    ):
        quamba.quantize(original[0], "w8a8", tmp_path / "q", device="cpu", samples=2, seqlen=16)


@pytest.mark.parametrize("recipe", stock_recipes())
def test_every_recipe(original, recipe, text, tmp_path):
    folder, model = original
    report = quamba.quantize(
        folder, recipe, tmp_path / "q", linears_only=True, calibration_text=text, device="cpu", samples=5, seqlen=32
    )
    assert report.sizes["layers"] < 0.9 * report.sizes["layers_original"] and "only linears" in report.notes[0]
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert config["linears_only"]["kept"] == []
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path / "q").eval()
    made = {path: m for path, m in quantised.named_modules() if isinstance(m, Linear)}
    wanted = {path for path, m in model.named_modules() if type(m) is torch.nn.Linear}
    tied = config["linears_only"]["tied"]
    assert set(made) == wanted - set(tied) and set(tied.values()) <= set(made)
    assert bool(tied) == (model.config.model_type == "zamba")
    assert all(m.format.name != "float" for m in made.values())
    full = logits(quantised)
    assert change(full, logits(model)) < (0.3 if recipe == "w8a8" else 0.9)
    assert set(load_file(tmp_path / "q" / "model.safetensors")) == set(quantised.state_dict())
    again, tokenizer = quamba.load(tmp_path / "q", device="cpu")
    assert torch.equal(logits(again), full)
    written = again.generate(IDS[:, :5], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert written.shape == (2, 8)
    assert perplexity(again, tokenizer, text, window=32, max_windows=2)["value"] > 1


def test_floats_change_nothing(original, text, tmp_path):
    folder, model = original
    recipe = parse_recipe({"name": "none"}, "none")
    quamba.quantize(folder, recipe, tmp_path / "q", linears_only=True, calibration_text=text, device="cpu", samples=2,
                    seqlen=16)  # fmt: skip
    assert change(logits(quamba.load(tmp_path / "q", device="cpu")[0]), logits(model)) < 1e-6


def test_layers_that_are_a_chain_are_told_from_others(original):
    _, model = original
    assert blocks(model) == [f"model.layers.{i}" for i in range(model.config.num_hidden_layers)]
    tokens = torch.randint(1, 2048, (6, 16), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        chain = linears_only.Chain.of(model, tokens, 2, torch.device("cpu"))
        assert (chain is not None) == (model.config.model_type in CHAINS)
        if chain is not None:  # walking it gives what the model gives
            hidden = chain.samples.hidden[:2]
            for path in chain.paths:
                args, kwargs = chain.arguments[path][2]
                hidden = linears_only.first(model.get_submodule(path)(hidden, *args, **kwargs))
            left = []
            last = model.get_submodule(chain.paths[-1])
            handle = last.register_forward_hook(lambda module, args, output: left.append(output))
            model(tokens[:2], use_cache=False)
            handle.remove()
            assert torch.allclose(hidden, linears_only.first(left[0]), atol=1e-5)


def test_what_reads_the_same_is_quantised_together(build):
    model = build("llama", CONFIGS["llama"])
    with torch.inference_mode():
        order = linears_only.execution_order(model, IDS, 2, torch.device("cpu"))
    names = [path.rpartition(".")[2] for path in order]
    assert names == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"] * 2 + ["lm_head"]
    reads = list(order.values())
    assert len({*reads[:3]}) == 1 and reads[4] == reads[5] and len(set(reads)) == 9


def test_what_is_never_called_stays_as_it_is(build, text, tmp_path):
    """An expert that no token is routed to has nothing to be calibrated on."""
    config = {**SMALL, "num_hidden_layers": 1}
    model = build("llama", config)
    folder = tmp_path / "m"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded.checkpoint(embedded.names()[0])).save_pretrained(folder)
    order = linears_only.execution_order

    def without(*args):
        return {path: reads for path, reads in order(*args).items() if not path.endswith("up_proj")}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linears_only, "execution_order", without)
        report = quamba.quantize(folder, "w8a8", tmp_path / "q", linears_only=True, calibration_text=text, device="cpu",
                                 samples=2, seqlen=16)  # fmt: skip
    assert "model.layers.0.mlp.up_proj" in report.notes[1]
    quantised, _ = quamba.load(tmp_path / "q", device="cpu")
    assert type(quantised.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert change(logits(quantised), logits(model)) < 0.3


def test_the_command(build, text, tmp_path):
    model = build("llama", {**SMALL, "num_hidden_layers": 1})
    folder = tmp_path / "m"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded.checkpoint(embedded.names()[0])).save_pretrained(folder)
    given = ["quantize", str(folder), "--recipe", "w8a8", "--output", str(tmp_path / "q"), "--calibration", str(text),
             "--samples", "2", "--seqlen", "16", "--device", "cpu"]  # fmt: skip
    refused = CliRunner().invoke(app, given)
    assert refused.exit_code != 0 and not (tmp_path / "q").exists()
    done = CliRunner().invoke(app, [*given, "--linears-only"])
    assert done.exit_code == 0 and "only linears are quantised" in " ".join(done.stdout.split())
    with pytest.raises(UserError, match="leave one out"):
        quamba.quantize(folder, "w8a8", tmp_path / "r", linears_only=True, resume=True)
    with pytest.raises(UserError, match="start it without a launcher"):
        quamba.quantize(folder, "w8a8", tmp_path / "r", linears_only=True, ranks=Ranks(0, 2))
    with pytest.raises(UserError, match="unknown role 'nowhere' in linears; known: .*'o_proj'"):
        quamba.quantize(folder, parse_recipe({"linears": {"nowhere": {"format": "w8a8"}}}, "strange"), tmp_path / "r",
                        linears_only=True, calibration_text=text, device="cpu", samples=2, seqlen=16)  # fmt: skip


def test_parts_on_disk_come_and_go(original, tmp_path):
    """The directory opens with a device map like others; what is tied comes for each of its uses."""
    quamba.quantize(original[0], "w8a8", tmp_path / "q", device="cpu", samples=2, seqlen=16, linears_only=True)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "q").eval()
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "q", device_map={name: "disk" for name, _ in whole.named_children()}
    ).eval()
    assert torch.equal(logits(model), logits(whole))
    assert all(tensor.is_meta for tensor in model.state_dict().values())


def test_inspect_and_compare(original, text, tmp_path):
    """Layers are those that the modules show; weights are compared as they are, since nothing was transformed."""
    folder, model = original
    quamba.quantize(folder, "w4a8", tmp_path / "q", linears_only=True, calibration_text=text, device="cpu", samples=2,
                    seqlen=32)  # fmt: skip
    found = quamba.inspect(tmp_path / "q", folder, text=text, samples=2, seqlen=32, device="cpu")
    layers = {row.layer for row in found.rows}
    assert layers == {*range(model.config.num_hidden_layers), None}
    assert found.bytes == sum(
        t.numel() * t.element_size() for t in load_file(tmp_path / "q/model.safetensors").values()
    )
    linears = [row for row in found.rows if row.stored_as.startswith("w4a8")]
    assert linears and all(row.layer is not None for row in linears)
    assert all(0.02 < row.weight_error < 0.3 and 4 < row.bits < 7 for row in linears)
    assert any(row.input is not None and row.input.peak > 0 for row in linears)
    [table] = [row for row in found.rows if row.role == "embedding"]
    assert table.weight_error == 0
    plain = quamba.inspect(folder, text=text, samples=2, seqlen=32, device="cpu")
    assert not plain.quantised and {row.layer for row in plain.rows} == layers

    apart = quamba.compare(folder, tmp_path / "q", text=text, tokens=64, max_new_tokens=4, device="cpu")
    assert len(apart.layer_errors) == model.config.num_hidden_layers
    assert all(0 < error < 1 for error in apart.layer_errors) and apart.kl_mean > 0


def test_an_output_is_not_quantised_again(original, text, tmp_path):
    quamba.quantize(original[0], "w8a8", tmp_path / "q", linears_only=True, calibration_text=text, device="cpu",
                    samples=2, seqlen=32)  # fmt: skip
    for only in (False, True):
        with pytest.raises(UserError, match="is quantised already; give the original"):
            quamba.quantize(tmp_path / "q", "w8a8", tmp_path / "again", linears_only=only, device="cpu")
