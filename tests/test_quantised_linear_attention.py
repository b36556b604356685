"""Quantised models of flash-linear-attention's families: what enters the scans, what crosses layers, what is saved."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import quamba
from architectures import LINEAR
from quamba import calibration, embedded, pipeline
from quamba.evaluate import perplexity
from quamba.linear_attention.cache import LayerState
from quamba.models import ARCHITECTURES, describe
from quamba.modules.linear import Linear
from quamba.recipe import parse_recipe
from quamba.transforms import residual_rotation, residual_rotation_obstacle
from quamba.transforms.legality import value_rotation_illegal
from quamba_kernels.registry import intercept
from quamba_kernels.testing import error

IDS = torch.randint(1, 2048, (2, 19), generator=torch.Generator().manual_seed(0))
FLOATS = parse_recipe({"rotate": {"residual": True, "output": True}}, "floats")
SETTINGS = [(kind, i) for kind in LINEAR for i in range(1, len(ARCHITECTURES[kind].tiny))]
SCANS = ("gla_", "delta_", "dplr_", "elementwise_")
FLOAT_KEYS = ("lightnet",)
"""Families whose keys are shares of a growing sum."""


def logits(model, ids: torch.Tensor = IDS, **options) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, use_cache=False, **options).logits


@pytest.fixture(scope="module", params=LINEAR)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def quantised(name, stock):
    """(directory, model) in W8A8."""
    folder = stock("w8a8", name)
    return folder, quamba.load(folder, device="cpu")[0]


def scans(model, run) -> list[dict]:
    """What every call of a scan was given, by name; the calls run."""
    seen = []

    def see(backend, args, kwargs):
        if backend.fn.__name__.strip("_").startswith(SCANS):
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            seen.append({"tensors": tensors, "scales": {k: v for k, v in kwargs.items() if k.endswith("_scale")}})
        with intercept(None):
            return backend.fn(*args, **kwargs)

    with intercept(see), torch.inference_mode():
        run(model)
    return seen


def test_scans_read_codes_in_prefill_and_decode(name, quantised) -> None:
    _, model = quantised

    def run(model):
        cache = model(IDS[:, :6], use_cache=True).past_key_values
        model(IDS[:, 6:7], past_key_values=cache, use_cache=True)

    found = scans(model, run)
    mixers = [s.mixer for b in describe(model.config).blocks for s in b.sublayers if s.mixer.inputs]
    recurrent = [mixer for mixer in mixers if mixer.scan.family != "softmax"]
    assert len(found) == 2 * len(recurrent)
    for call, mixer in zip(found, recurrent * 2, strict=True):
        codes = [t for t in call["tensors"] if t.dtype == torch.int8]
        given = {key: scale for key, scale in call["scales"].items() if scale is not None}
        assert len(codes) == len(given) == len(mixer.inputs) == (1 if "channel" in mixer.axes else 3) - (
            name in FLOAT_KEYS
        )
        assert all(c.abs().max() > 30 for c in codes)
        for key, scale in given.items():
            assert scale.dtype == torch.float32 and (scale > 0).all()
            assert key == "x_scale" or scale.shape[0] in [mixer.size(i.axes[:-1]) for i in mixer.inputs]
        rest = [t for t in call["tensors"] if t.dtype != torch.int8]
        assert rest and all(t.is_floating_point() for t in rest)  # decays, rates, states


def test_a_saved_copy_gives_the_same_logits(name, quantised, tmp_path) -> None:
    folder, model = quantised
    want = logits(model)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), want)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), want)
    before, after = (load_file(where / "model.safetensors") for where in (folder, tmp_path))
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_padding_and_16_bits(name, quantised, stock) -> None:
    _, model = quantised
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    alone, padded = logits(model, IDS[:1, 4:]), logits(model, IDS, attention_mask=mask)
    assert error(padded[:1, 4:], alone) < 0.02  # rounding differences of 1e-7 flip a few codes
    half = AutoModelForCausalLM.from_pretrained(stock("w8a8", name), dtype=torch.bfloat16)
    assert error(logits(half), logits(model)) < 0.2


def test_calibration_sees_what_the_model_computes(name, tiny_checkpoint, text, tmp_path, monkeypatch) -> None:
    """Samples arrive at the head as a whole pass leaves them, whatever layers hand on to each other."""
    arrived, given = [], []
    head, draw = pipeline.quantise_head, calibration.windows

    def watched(model, recipe, weight, norm, gain, rotation, stream):
        arrived.append(stream.hidden.clone())
        return head(model, recipe, weight, norm, gain, rotation, stream)

    def drawn(*args):
        given.append(draw(*args))
        return given[-1]

    monkeypatch.setattr(pipeline, "quantise_head", watched)
    monkeypatch.setattr(calibration, "windows", drawn)
    folder, original = tiny_checkpoint(name)
    quamba.quantize(folder, FLOATS, tmp_path / "q", calibration_text=text, samples=7, seqlen=16, device="cpu")
    spec, seen = describe(original.config), []
    original.get_submodule(spec.blocks[-1].path).register_forward_hook(lambda module, args, output: seen.append(output))
    logits(original, given[0])
    want = seen[0]
    if residual_rotation_obstacle(spec) is None:
        want = residual_rotation(spec.d_model, 0).columns(want).float()
    assert error(arrived[0], want) < 1e-5


@pytest.mark.parametrize("dtype, near", [("float16", 2e-3), ("int8", 0.1)])
@torch.inference_mode()
def test_states_are_stored_as_a_recipe_asks(name, dtype, near, tiny_checkpoint, quantise) -> None:
    recipe = parse_recipe({"linear_state": {"dtype": dtype, "rounding": "stochastic"}}, "states")
    model = quamba.load(quantise(tiny_checkpoint(name)[0], recipe, samples=1, seqlen=8), device="cpu")[0]

    def steps(cache=None):
        parts = []
        for start, end in ((0, 6), (6, 7), (7, 10), (10, 11), (11, 12)):
            out = model(IDS[:, start:end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        return torch.cat(parts, 1), cache

    (got, cache), want = steps(), logits(model, IDS[:, :12])
    assert 0 < float((got - want).norm() / want.norm()) < near
    layers = [layer for layer in cache.layers if isinstance(layer, LayerState)]
    assert layers and all(str(layer.tensors["recurrent"].dtype) == f"torch.{dtype}" for layer in layers)
    assert all(("recurrent_scale" in layer.tensors) == (layer.rng is not None) == (dtype == "int8") for layer in layers)
    cache.reset()
    assert torch.equal(steps(cache)[0], got)


def test_what_the_recipe_does_not_name_stays_a_float(name, tiny_checkpoint, quantise) -> None:
    recipe = parse_recipe({"linears": {"default": {"format": "w8a8"}}}, "linears")
    model = quamba.load(quantise(tiny_checkpoint(name)[0], recipe), device="cpu")[0]
    assert sum(isinstance(module, Linear) for module in model.modules()) > 10
    for call in scans(model, lambda model: model(IDS)):
        assert all(t.is_floating_point() for t in call["tensors"])
        assert not [scale for scale in call["scales"].values() if scale is not None]


def test_values_are_rotated_offline_where_nothing_stands_between(name, quantised, tiny_checkpoint) -> None:
    """Of HGRN2 nothing is rotated at run time: its values pass neither activation nor gate."""
    folder, model = quantised
    (_, original), stored = tiny_checkpoint(name), load_file(folder / "model.safetensors")
    mixers = [(b.path, s.mixer) for b in describe(model.config).blocks for s in b.sublayers if s.mixer.inputs]
    blocks = {model.get_submodule(f"{path}.attn.o_proj").input.block for path, _ in mixers}
    offline = value_rotation_illegal(mixers[0][1]) is None
    assert offline == (name == "hgrn2") and (blocks == {0}) == offline and blocks != {1}
    if offline:
        gains = [f"{path}.attn.g_norm.weight" for path, _ in mixers]
        assert all((stored[gain] == 1).all() for gain in gains)
        assert all((original.state_dict()[gain] != 1).any() for gain in gains)


@pytest.mark.parametrize("kind, i", SETTINGS)
def test_other_settings_of_a_family(kind, i, build, quantise, tmp_path) -> None:
    """Without gates, convolutions or biases, with shared heads or attention; the first is tested with all hybrids."""
    original = build(kind, {**ARCHITECTURES[kind].tiny[i], "vocab_size": 2048})
    folder = tmp_path / "original"
    original.save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded.checkpoint(embedded.names()[0])).save_pretrained(folder)
    want = logits(original)
    assert error(logits(quamba.load(quantise(folder, FLOATS, "floats"), device="cpu")[0]), want) < 1e-4
    model = quamba.load(quantise(folder, "w8a8"), device="cpu")[0]
    assert float((logits(model) - want).norm() / want.norm()) < 0.35
    projs = [p for b in describe(model.config).blocks for s in b.sublayers for p in s.mixer.projs if not p.keep]
    assert len([m for m in model.modules() if isinstance(m, Linear) and m.format.has_grid]) == len(projs) + 1
    begin = IDS[:, :4]
    written = model.generate(begin, attention_mask=torch.ones_like(begin), max_new_tokens=3, min_new_tokens=3)
    assert written.shape == (2, 7)


def test_gates_are_quantised_where_a_recipe_names_them(tiny_checkpoint, quantise) -> None:
    recipe = parse_recipe({"linears": {"gk_b_proj": {"format": "w8a8"}}}, "gates")
    model = quamba.load(quantise(tiny_checkpoint("gla")[0], recipe), device="cpu")[0]
    found = [name for name, module in model.named_modules() if isinstance(module, Linear) and module.format.has_grid]
    assert found == [f"model.layers.{layer}.attn.gk_proj.1" for layer in (0, 2)]


def test_what_published_checkpoints_differ_in(tiny_checkpoint, quantise, tmp_path) -> None:
    """A tied head, and a tensor that no version of the layer reads any more."""
    folder, original = tiny_checkpoint("gated_deltanet", (("tie_word_embeddings", True),))
    copy = shutil.copytree(folder, tmp_path / "published")
    tensors = load_file(copy / "model.safetensors")
    assert "lm_head.weight" not in tensors
    save_file({**tensors, "model.layers.0.attn.D": torch.ones(4)}, copy / "model.safetensors", {"format": "pt"})
    output = quantise(copy, FLOATS)
    assert error(logits(quamba.load(output, device="cpu")[0]), logits(original)) < 1e-4
    assert not [name for name in load_file(output / "model.safetensors") if name.endswith(".D")]


def test_a_hybrid_is_evaluated_token_by_token_too(stock, text) -> None:
    model, tokenizer = quamba.load(stock("w4a8", "gla"), device="cpu")
    assert isinstance(model.model.layers[1].attn.o_proj, Linear)
    prefill, steps = (perplexity(model, tokenizer, text, window=40, max_windows=2, stepwise=s) for s in (False, True))
    assert abs(prefill["value"] - steps["value"]) < 0.2 * prefill["value"]
