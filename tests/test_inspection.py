"""What `quamba inspect` finds, against plain computations on the files and on transformers' own models."""

import inspect as standard_inspect
import math
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import quamba
from quamba import calibration
from quamba.errors import UserError
from quamba.formats import FORMATS
from quamba.inspection import activations
from quamba.inspection.opened import Opened, _places
from quamba.inspection.order import assign, recover
from quamba.models import ARCHITECTURES
from quamba.recipe import LinearSpec, parse_recipe
from quamba.transforms import residual_rotation
from quamba_kernels.hadamard import hadamard_matrix

LITTLE = {"samples": 3, "seqlen": 24, "device": "cpu"}
EXACT = {"rotate": {"residual": True, "output": True}, "cluster": {"heads": 2, "channels": 2, "samples": 2},
         "activations": {"scan_x": {"granularity": "cluster"}}}  # fmt: skip
"""Every exact transform, and weights in floats."""
PLAIN = {"rotate": {"residual": False, "output": False}, "linears": {"default": {"format": "w8a8", "method": "rtn",
                                                                                "search": False}}}  # fmt: skip
"""The gain of the norms is folded and nothing else is moved."""


def made(name, settings):
    return parse_recipe({"name": name, **settings}, name)


def files(folder):
    return load_file(folder / "model.safetensors")


def row(found, layer, role):
    (only,) = (r for r in found.rows if (r.layer, r.role) == (layer, role))
    return only


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.fixture(scope="module", params=["mamba", "mamba2"])
def family(request):
    return request.param


@pytest.fixture
def exact(family, tiny_checkpoint, quantise):
    """(original, the same with every exact transform): equal models in different bases."""
    folder, _ = tiny_checkpoint(family)
    return folder, quantise(folder, made("exact", EXACT))


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4a16", None])
def test_bytes_and_bits_are_those_of_the_files(family, recipe, tiny_checkpoint, stock):
    folder = tiny_checkpoint(family)[0] if recipe is None else stock(recipe, family)
    found, tensors = quamba.inspect(folder, samples=0), files(folder)
    assert found.bytes == sum(t.nbytes for t in tensors.values())
    assert sum(found.sizes.values()) == found.bytes
    spec = ARCHITECTURES[family].describe(AutoModelForCausalLM.from_pretrained(folder).config)
    seen = 0
    for layer, block in enumerate(spec.blocks):
        own = {name: t for name, t in tensors.items() if name.startswith(f"{block.path}.")}
        for proj in block.sublayers[0].mixer.projs:
            mine = {name: t for name, t in own.items() if f".{proj.path}." in name}
            got = row(found, layer, proj.role)
            assert got.bytes == sum(t.nbytes for t in mine.values()) > 0
            shape = next(s for name, s in original_shapes(folder, tiny_checkpoint, family) if name.endswith(
                f"{block.path}.mixer.{proj.path}.weight"))  # fmt: skip
            assert got.parameters == math.prod(shape) + (shape[0] if proj.bias else 0)
            assert got.bits == 8 * got.bytes / got.parameters
            seen += 1
        assert sum(r.bytes for r in found.rows if r.layer == layer) == sum(t.nbytes for t in own.values())
    assert seen == len([r for r in found.rows if r.layer is not None and r.role != "rest"])
    assert (row(found, None, "lm_head").stored_as == "tied") == ("lm_head" not in " ".join(tensors))


def original_shapes(folder, tiny_checkpoint, family):
    return [(name, t.shape) for name, t in tiny_checkpoint(family)[1].state_dict().items()]


def test_exact_transforms_leave_no_weight_error(exact):
    original, moved = exact
    found = quamba.inspect(moved, original, samples=0)
    assert all(r.weight_error < 1e-6 for r in found.rows if r.parameters)
    assert found.weight_error < 1e-6 and found.rounding is None and not found.quantised
    before, after = files(original), files(moved)
    weights = [name for name, t in after.items() if "in_proj.weight" in name or "out_proj.weight" in name]
    # ... and without undoing them it would be as large as between strangers
    assert all(relative(after[name], before[name]) > 0.5 for name in weights)


def test_channels_were_in_another_order(tiny_checkpoint, quantise):
    moved = quantise(tiny_checkpoint("mamba2")[0], made("order", {**EXACT, "rotate": PLAIN["rotate"]}))
    gain = [files(f)["backbone.layers.0.mixer.norm.weight"] for f in (moved, tiny_checkpoint("mamba2")[0])]
    assert not torch.equal(*gain) and torch.equal(*(g.sort().values for g in gain))
    assert quamba.inspect(moved, tiny_checkpoint("mamba2")[0], samples=0).weight_error < 1e-6


def test_weight_error_is_its_definition(family, tiny_checkpoint, quantise):
    folder, _ = tiny_checkpoint(family)
    output = quantise(folder, made("plain", PLAIN))
    found = quamba.inspect(output, folder, samples=0)
    stored, before = files(output), files(folder)
    for layer in range(2):
        path = f"backbone.layers.{layer}"
        want = before[f"{path}.mixer.in_proj.weight"] * before[f"{path}.norm.weight"]
        codes, scale = (stored[f"{path}.mixer.in_proj.weight_{part}"] for part in ("packed", "scale"))
        got = row(found, layer, "in_proj")
        assert got.weight_error == pytest.approx(relative(codes * scale[:, None], want), rel=1e-5)
        noise = (scale.double().square().sum() * want.shape[1] / 12).sqrt() / (codes * scale[:, None]).double().norm()
        assert got.rounding == pytest.approx(float(noise), rel=1e-5)
        # rounding to nearest on a grid that clips nothing: the errors are uniform
        assert got.rounding == pytest.approx(got.weight_error, rel=0.03)
    head = before.get("lm_head.weight", before["backbone.embeddings.weight"]) * before["backbone.norm_f.weight"]
    error = relative(stored["lm_head.weight_packed"] * stored["lm_head.weight_scale"][:, None], head)
    assert row(found, None, "lm_head").weight_error == pytest.approx(error, rel=1e-5)
    assert row(found, None, "embedding").weight_error == 0  # the recipe leaves it alone


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4a16"])
def test_order_is_recovered_from_rounded_weights(family, recipe, tiny_checkpoint, stock):
    found = quamba.inspect(stock(recipe, family), tiny_checkpoint(family)[0], samples=0)
    limit = 0.02 if recipe == "w8a8" else 0.35
    assert all(0 < r.weight_error < limit for r in found.rows if r.parameters)
    alone = quamba.inspect(stock(recipe, family), samples=0)
    assert alone.weight_error is None and {r.weight_error for r in alone.rows} == {None}
    assert alone.rounding == found.rounding > 0
    if recipe != "w8a8":  # GPTQ moves a weight further than to its nearest value
        assert found.rounding < found.weight_error


def test_recovered_permutations_are_those_applied():
    rng = torch.Generator().manual_seed(0)
    heads, width = 4, 6
    exact = torch.randn(2 * heads * width + 5, 32, generator=rng)
    value = torch.stack([torch.randperm(width, generator=rng) for _ in range(heads)])
    order = torch.randperm(heads, generator=rng)
    rows = [slice(0, 24), slice(24, 48)]
    stored = exact.clone()
    for part in rows:
        by_head = exact[part].view(heads, width, 32)
        stored[part] = torch.stack([by_head[h][value[h]] for h in order]).view(-1, 32)
    found = recover(stored + 0.2 * torch.randn(stored.shape, generator=rng), exact, rows, heads)
    assert [p.axis for p in found] == ["value", "head"] and found[0].outer == "head"
    assert torch.equal(found[0].order, value) and torch.equal(found[1].order, order)


def test_assignment_takes_each_column_once():
    score = torch.tensor([[5.0, 4.0, 0.0], [6.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert assign(score).tolist() == [1, 0, 2]
    assert assign(torch.zeros(4, 4)).sort().values.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_step_is_the_distance_of_neighbouring_values(name):
    form, spec = FORMATS[name], LinearSpec(format=name, group_size=32)
    if not form.has_grid:
        with pytest.raises(TypeError, match="has no grid"):
            form.step({})
        return
    grid = form.grid(64, 5, spec)
    grid.begin(torch.randn(5, 64, generator=torch.Generator().manual_seed(0)), torch.ones(64))
    codes = torch.arange(320).view(5, 64) % 2  # 0 and 1 by turns
    values, step = form.dequantize(grid.pack(codes.float())), form.step(grid.pack(codes.float()))
    apart = (values[:, 1::2] - values[:, ::2]).abs().view(5, step.shape[1], -1)
    assert torch.allclose(apart, step[..., None].expand_as(apart))


def plain_inputs(model, ids, path):
    """What a module of transformers' own model reads, fp32 [tokens, K]."""
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.inference_mode():
        model(ids, use_cache=False)
    handle.remove()
    return torch.cat([x.flatten(0, -2) for x in seen])


def check_spread(found, x):
    peaks = x.abs().amax(0)
    assert found.peak == pytest.approx(float(peaks.max()), rel=1e-4)
    assert found.rms == pytest.approx(float(x.double().square().mean().sqrt()), rel=1e-4)
    assert found.outlier_ratio == pytest.approx(found.peak / found.rms)
    assert found.outlier_channels == pytest.approx(float((peaks > 3 * peaks.median()).float().mean()))
    assert torch.allclose(found.channel_peaks, peaks, rtol=1e-3, atol=1e-5)


def windows(text, tokenizer):
    return calibration.windows(calibration.read_text(text), tokenizer, LITTLE["samples"], LITTLE["seqlen"], 0)


def test_activations_are_those_of_transformers_model(family, tiny_checkpoint, text):
    folder, model = tiny_checkpoint(family)
    found = quamba.inspect(folder, text=text, **LITTLE)
    assert found.tokens == 72
    ids = windows(text, quamba.load(folder)[1])
    for layer in range(2):
        block = f"backbone.layers.{layer}"
        x = plain_inputs(model, ids, f"{block}.mixer.out_proj")
        check_spread(row(found, layer, "out_proj").input, x)
        check_spread(row(found, layer, "in_proj").input, plain_inputs(model, ids, f"{block}.mixer.in_proj"))
        out, stream = (next(r for r in found.rotations if (r.layer, r.role) == (layer, role))
                       for role in ("out_proj", "residual"))  # fmt: skip
        check_spread(out.before, x)
        check_spread(out.after, (x.double() @ hadamard_matrix(x.shape[1])).float())
        hidden = plain_inputs(model, ids, block)
        check_spread(stream.before, hidden)
        check_spread(stream.after, residual_rotation(hidden.shape[1], 0).columns(hidden).float())
    check_spread(row(found, None, "lm_head").input, plain_inputs(model, ids, "lm_head"))


def test_a_rotated_model_is_seen_in_both_bases(tiny_checkpoint, quantise, family, text):
    folder, _ = tiny_checkpoint(family)
    moved = quantise(folder, made("rotated", {}))
    found = [quamba.inspect(source, text=text, **LITTLE) for source in (folder, moved)]
    pairs = list(zip(found[0].rotations, found[1].rotations, strict=True))
    assert {r.role for r, _ in pairs} == {"residual", "out_proj"} and len(pairs) == 4
    for a, b in pairs:
        assert (a.layer, a.role) == (b.layer, b.role)
        for one, other in ((a.before, b.before), (a.after, b.after)):
            assert other.rms == pytest.approx(one.rms, rel=1e-4)
            assert torch.allclose(other.channel_peaks, one.channel_peaks, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(a.before.channel_peaks, a.after.channel_peaks, rtol=0.1)
    assert row(found[1], 0, "out_proj").input == next(b.after for _, b in pairs if (b.layer, b.role) == (0, "out_proj"))


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4a16"])
def test_watching_changes_nothing_and_ends(family, recipe, stock, text):
    opened = Opened(stock(recipe, family), "cpu", torch.float32)
    ids, seen = windows(text, opened.tokenizer), []
    with torch.inference_mode():
        before = opened.model(ids, use_cache=False).logits
        opened.model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output))
        survey = activations.Survey(opened)
        survey.run(ids, 3, lambda *told: None)
        assert torch.equal(seen[0], before)
        counted = {path: watched.count for path, watched in survey.linears.items()}
        assert torch.equal(opened.model(ids, use_cache=False).logits, before)
    assert counted == {path: watched.count for path, watched in survey.linears.items()}
    assert counted == {place.path: ids.numel() * place.features for place in opened.places}


def test_inputs_are_seen_before_they_are_clipped(tiny_checkpoint, quantise, text):
    folder, _ = tiny_checkpoint("mamba2")
    settings = {**PLAIN, "linears": {"default": {"format": "w8a8", "input": {"observer": "percentile",
                                                                             "quantile": 0.9}}}}  # fmt: skip
    found = quamba.inspect(quantise(folder, made("clip", settings)), text=text, **LITTLE)
    want = quamba.inspect(folder, text=text, **LITTLE)
    clipped = 127 * files_scale(quantise, folder, settings)
    assert row(found, 0, "in_proj").input.peak > 1.5 * clipped
    gain = files(folder)["backbone.layers.0.norm.weight"]
    peaks = row(want, 0, "in_proj").input.channel_peaks / gain.abs()
    assert torch.allclose(row(found, 0, "in_proj").input.channel_peaks, peaks, rtol=0.02)


def files_scale(quantise, folder, settings):
    stored = files(quantise(folder, made("clip", settings), "again"))
    return float(stored["backbone.layers.0.mixer.in_proj.input.scale"])


def test_experts_of_one_role_are_pooled():
    rng = torch.Generator().manual_seed(0)
    inputs = [torch.randn(40, 8, generator=rng), 5 * torch.randn(10, 8, generator=rng), torch.zeros(0, 8)]
    watched = [activations.Watched() for _ in inputs]
    for each, x in zip(watched[:2], inputs[:2], strict=True):
        each.update(x)
    found = activations.spread(watched)
    together = torch.cat([x.flatten() for x in inputs])
    assert found.peak == pytest.approx(float(together.abs().max()))
    assert found.rms == pytest.approx(float(together.square().mean().sqrt()), rel=1e-5)
    assert activations.spread(watched[2:]) is None


def test_nan_names_the_module(tiny_checkpoint, text, tmp_path):
    folder, model = tiny_checkpoint("mamba2")
    opened = Opened(folder, "cpu", torch.float32)
    with torch.no_grad():
        opened.model.backbone.layers[1].mixer.D.fill_(math.nan)
    with pytest.raises(UserError, match="input of backbone.layers.1.mixer.out_proj holds NaN or Inf"):
        activations.Survey(opened).run(windows(text, opened.tokenizer), 2, lambda *told: None)


def test_the_library_of_that_name_stays_itself():
    assert standard_inspect is sys.modules["inspect"] and hasattr(standard_inspect, "signature")
    assert quamba.inspect is not standard_inspect and callable(quamba.inspect) and callable(quamba.compare)


def test_a_linear_that_no_description_names_is_found(tiny_checkpoint):
    opened = Opened(tiny_checkpoint("mamba2")[0], "cpu", torch.float32)
    opened.model.backbone.layers[1].extra = torch.nn.Linear(3, 2)
    (found,) = (place for place in _places(opened.model, opened.spec) if place not in opened.places)
    assert (found.layer, found.role, found.path) == (1, "extra", "backbone.layers.1.extra")
    assert (found.outputs, found.features, found.biased, found.format.name) == (2, 3, True, "float")
