"""Faults seen in another implementation, each of which must not be possible here."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

import quamba
from architectures import OWN
from quamba import calibration, embedded, quantizers
from quamba.errors import UserError
from quamba.models import ARCHITECTURES
from quamba.modules.embedding import Embedding
from quamba.recipe import StorageSpec, load_recipe, parse_recipe, stock_recipes
from quamba.transforms import sort_and_cluster
from quamba.transforms.cluster import cluster_label
from quamba_kernels import OPS, Setting, ops
from quamba_kernels.ops.rowwise import to_int8

IDS = torch.randint(1, 96, (2, 17), generator=torch.Generator().manual_seed(0))


def logits(folder, ids: torch.Tensor = IDS) -> torch.Tensor:
    model, _ = quamba.load(folder, device="cpu", dtype=torch.float32)
    with torch.inference_mode():
        return model(ids, use_cache=False).logits


def change(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


ROWS = Setting("cpu", torch.float32, {"I": 64, "block": 64})
HERE = [b for b in OPS["gate_output"].candidates if b.why_not(ROWS) is None]


@pytest.mark.parametrize("backend", HERE, ids=lambda b: b.name)
def test_rotated_outliers_saturate(backend) -> None:
    """The Hadamard transform's int8 store wrapped values beyond the range around to the other sign."""
    y = torch.full((1, 64), 1e4)
    z = torch.full((1, 64), 20.0)
    for sign in (1, -1):
        out = backend(sign * y, z, None, 1e-5, block=64, out_scale=torch.tensor([0.5]))
        assert out.data.dtype == torch.int8 and int(out.data.max() if sign > 0 else -out.data.min()) == 127
        floats = backend(sign * y, z, None, 1e-5, block=64).data
        big = floats.abs() > 64
        assert big.any() and (out.data[big].sign() == floats[big].sign()).all()
    assert to_int8(torch.tensor([1e30, -1e30]), torch.ones(1)).tolist() == [127, -127]


def test_rows_whose_largest_magnitude_is_negative() -> None:
    """The embedding's scale came from the signed maximum, so rows with a large negative entry were cut."""
    table = torch.rand(6, 16, generator=torch.Generator().manual_seed(0)) * 0.1
    table[0, 3], table[1, 5], table[2], table[3] = -7.0, 7.0, -table[2], 0.0
    module = Embedding(6, 16, StorageSpec(bits=8), dtype=torch.float32)
    module.fill(table)
    got = module(torch.arange(6))
    assert ((got - table).abs() <= table.abs().amax(1, keepdim=True) / 127 * 0.5001).all()


def test_rounding_is_to_nearest_and_scales_are_of_magnitudes() -> None:
    """Activations were truncated, and a token's scale came from its largest value instead of its magnitude."""
    x = torch.tensor([[-100.0, 1.0, 0.0, 39.6], [0.0, 0.0, 0.0, 0.0]])
    codes = ops.quantize(x)
    assert codes.data[0].tolist() == [-127, 1, 0, 50] and codes.scale[0] == torch.tensor(100 / 127)
    normed = ops.rms_norm(-x.abs(), None, 1e-5, per_token=True)
    assert normed.data[0, 0] == -127 and normed.data[0].abs().max() == 127 and torch.equal(codes.data[1], x[1].char())


CHOICES = list(itertools.product(("float", "w8a8", "w4a8", "w4a16"), (8, 16), (True, False), (True, False)))


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("head, embedding, cluster, fold", CHOICES)
def test_every_combination_reloads(name, head, embedding, cluster, fold, tiny_checkpoint, quantise) -> None:
    """A model saved with an unquantised head or without clusters could not be opened again."""
    policy = {
        "fold_norms": fold, "rotate": {"residual": fold}, "embedding": {"bits": embedding},
        "linears": {"default": {"format": "w8a8", "method": "rtn"}, "lm_head": {"format": head, "method": "rtn"}},
        "activations": {"scan_x": {"granularity": "cluster"}, "scan_b": {"granularity": "state_group"}},
        **({"cluster": {"heads": 2, "channels": 4}} if cluster else {}),
    }  # fmt: skip
    folder, model = tiny_checkpoint(name)
    made = quantise(folder, parse_recipe(policy, "combination"), samples=1)
    stored = load_file(made / "model.safetensors")
    assert ("lm_head.weight" in stored) == (head == "float") and "lm_head.bias" not in stored
    assert ("backbone.embeddings.weight_packed" in stored) == (embedding == 8)
    assert any(key.endswith("head_end") for key in stored) == (cluster and "num_heads" in ARCHITECTURES[name].tiny[0])
    with torch.inference_mode():
        want = model(IDS, use_cache=False).logits
    # random heads of 64 inputs in 4 bits are off by a sixth, the int8 rest by a few hundredths
    assert change(logits(made), want) < (0.25 if head.startswith("w4") else 0.12)


def test_a_limit_on_the_time_step_is_kept(tiny_checkpoint, quantise) -> None:
    """dt_limit landed in another parameter and was ignored."""
    folder, model = tiny_checkpoint("mamba2", (("time_step_limit", (0.2, 0.4)),))
    _, free = tiny_checkpoint("mamba2")
    with torch.inference_mode():
        want, unlimited = model(IDS, use_cache=False).logits, free(IDS, use_cache=False).logits
    got = logits(quantise(folder, parse_recipe({}, "exact")))
    assert change(got, want) < 1e-5 and change(unlimited, want) > 1e-2


def test_several_groups_have_scales_of_their_own(quantise, tiny_checkpoint) -> None:
    """The number of state groups was read from the wrong axis and fixed at four."""
    folder, model = tiny_checkpoint("mamba2", (("n_groups", 2),))
    made = quantise(folder, "w8a8")
    scale = load_file(made / "model.safetensors")["backbone.layers.0.mixer.scan_B.scale"]
    assert scale.shape == (2,) and scale[0] != scale[1]
    with torch.inference_mode():
        assert change(logits(made), model(IDS, use_cache=False).logits) < 0.12


def test_an_old_output_is_never_taken_for_the_new(tiny_checkpoint, quantise) -> None:
    """A checkpoint of an earlier run, made with other settings, was opened instead of a new one."""
    folder, _ = tiny_checkpoint("mamba")
    old = quantise(folder, "w8a8")
    before = {p.name: p.read_bytes() for p in old.iterdir()}
    with pytest.raises(UserError, match="exists; give another directory or --overwrite"):
        quantise(folder, "w4a16")
    assert {p.name: p.read_bytes() for p in old.iterdir()} == before
    quantise(folder, "w4a16", overwrite=True)
    recipe = json.loads((old / "config.json").read_text())["quantization_config"]["recipe"]
    assert recipe["name"] == "w4a16" and load_recipe(old / "recipe.yaml").name == "w4a16"
    assert [p.name for p in old.parent.iterdir()] == [old.name]


@pytest.mark.parametrize("name", OWN)
def test_the_head_honours_its_format_and_sees_the_quantised_model(name, tiny_checkpoint, quantise, monkeypatch) -> None:
    """The head's bits were ignored, and its Hessian was that of a fixed corpus through the float model."""
    heads, original = [], quantizers.gptq

    def spy(weight, grid, hessian, *args):
        heads.append((weight.shape[0], hessian.tokens, hessian.mean.clone()))
        return original(weight, grid, hessian, *args)

    monkeypatch.setattr("quamba.modules.linear.gptq", spy)
    folder, _ = tiny_checkpoint(name)
    for i, body in enumerate(("w4a8", "float")):
        linears = {"default": {"format": body}, "lm_head": {"format": "w4a16"}, "dt_proj": {"format": "float"}}
        policy = {"linears": linears}
        stored = load_file(quantise(folder, parse_recipe(policy, "head"), f"{i}") / "model.safetensors")
        assert stored["lm_head.weight_packed"].dtype == torch.int32
    quantised, floats = [h for h in heads if h[0] == 2048]
    assert quantised[1] == floats[1] == 4 * 32
    assert change(quantised[2], floats[2]) > 1e-4  # it saw what the 4-bit layers give


def test_windows_are_drawn_all_over_the_text_by_the_seed() -> None:
    """Calibration took the first documents in order, whatever the seed."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded.checkpoint("mamba2-tiny"))
    text = embedded.calibration_text().read_text(encoding="utf-8")[:60000]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    first, same, other = (calibration.windows(text, tokenizer, 32, 64, seed) for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)
    starts = [next(i for i in range(len(ids) - 63) if torch.equal(ids[i : i + 64], row)) for row in first]
    assert starts != sorted(starts) and len(set(starts)) > 28
    assert min(starts) < len(ids) / 6 and max(starts) > len(ids) * 5 / 6


KEPT = ("A_log", "D", "dt_bias", "conv1d.bias", "dt_proj.bias", "in_proj.bias", "out_proj.bias", "mixer.norm.weight")


@pytest.mark.parametrize("recipe", stock_recipes())
@pytest.mark.parametrize("name", OWN)
def test_small_tensors_are_not_quantised(name, recipe, tiny_checkpoint, quantise) -> None:
    """A_log, D and biases were quantised for no gain."""
    folder, model = tiny_checkpoint(name, (("use_bias", True),))
    stored, original, seen = load_file(quantise(folder, recipe) / "model.safetensors"), model.state_dict(), 0
    rotated = ("out_proj.bias",)  # it lies in the residual stream
    for key in (k for k in original if k.endswith(KEPT)):
        assert stored[key].dtype == original[key].dtype and stored[key].shape == original[key].shape
        same = stored[key].flatten().double().sort().values, original[key].flatten().double().sort().values
        assert key.endswith(rotated) or torch.equal(*same)  # clustering may have permuted it
        seen += 1
    assert seen >= 2 * 5


def test_a_scale_covers_the_loudest_head() -> None:
    """Heads were clustered by their normalised profile, though a scale has to cover their magnitude."""
    rng = torch.Generator().manual_seed(0)
    profile = torch.rand(16, generator=rng) + 0.5
    loudness = torch.tensor([1.0, 100.0, 1.1, 90.0, 0.9, 110.0, 1.2, 95.0])
    made = sort_and_cluster(loudness[:, None] * profile, 1, 2, 1)
    label = cluster_label(made.head_end, made.channel_end, 8, 16)[:, 0]
    order = made.permutations[1].order
    assert set(loudness[order][label == label[0]].tolist()) == set(loudness[loudness < 2].tolist())


@pytest.mark.parametrize("name", OWN)
def test_nothing_but_weights_and_scales_is_saved(name, stock) -> None:
    """Workspaces and scratch memory were part of the checkpoint."""
    known = {
        "weight", "bias", "A_log", "D", "dt_bias", "weight_packed", "weight_scale", "weight_multiplier", "scale",
        "head_end", "channel_end",
    }  # fmt: skip
    for recipe in stock_recipes():
        tensors = load_file(stock(recipe, name) / "model.safetensors")
        assert {key.rpartition(".")[2] for key in tensors} <= known
        assert not [k for k, t in tensors.items() if k.endswith("scale") and not (t.float().abs() > 0).all()]
