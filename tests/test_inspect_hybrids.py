"""`quamba inspect` and `quamba compare` on models whose layers stay transformers', with attention, MLPs and experts."""

import pytest
import torch
from safetensors.torch import load_file

import quamba
from architectures import PLAIN
from quamba import calibration
from quamba.inspection import activations, plot
from quamba.inspection.opened import Opened
from quamba.models import describe
from quamba.modules.host import turns_values
from quamba.recipe import parse_recipe
from quamba_kernels.hadamard import block_size, hadamard_matrix

LITTLE = {"samples": 2, "seqlen": 24, "device": "cpu"}
ROTATED = parse_recipe({"name": "rotated"}, "rotated")


@pytest.fixture(scope="module", params=[*PLAIN, "gla", "hgrn2", "rwkv7"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def original(name, tiny_checkpoint):
    """(directory, transformers' model)."""
    return tiny_checkpoint(name)


@pytest.fixture(scope="module")
def moved(original, text, tmp_path_factory):
    """The same in rotated bases, in floats."""
    output = tmp_path_factory.mktemp("moved") / "q"
    return quamba.quantize(original[0], ROTATED, output, calibration_text=text, **LITTLE).output


def roles(model):
    """(layer, role) of every projection that the architecture describes."""
    return {
        (layer, proj.role)
        for layer, block in enumerate(describe(model.config).blocks)
        for sub in block.sublayers
        for proj in sub.mixer.projs
    }


def borrowed(spec, path):
    """Where else the module of a path stands."""
    pairs = [(f"{block.path}.{block.borrows[0]}.", f"{block.borrows[1]}.") for block in spec.blocks if block.borrows]
    return [here + path.removeprefix(lender) for here, lender in pairs if path.startswith(lender)]


@pytest.mark.parametrize("recipe", [None, "w4a8"])
def test_every_projection_has_its_row(name, original, recipe, stock, text):
    folder, model = original
    source = folder if recipe is None else stock(recipe, name)
    found = quamba.inspect(source, None if recipe is None else folder, text=text, **LITTLE)
    assert {(r.layer, r.role) for r in found.rows if r.layer is not None and r.role != "rest"} == roles(model)
    assert found.bytes == sum(t.nbytes for t in load_file(source / "model.safetensors").values())
    spec, parameters = describe(model.config), dict(model.named_parameters())
    linears = {spec.embedding, spec.head} | {
        f"{block.path}.{sub.mixer.name(proj.path)}"
        for block in spec.blocks for sub in block.sublayers for proj in sub.mixer.projs
    }  # fmt: skip
    own = {name for path in linears for name in (path, f"{path}.weight", f"{path}.bias")} & set(parameters)
    head = model.get_output_embeddings().weight.numel() if recipe and model.config.tie_word_embeddings else 0
    assert found.parameters == sum(parameters[name].numel() for name in own) + head
    kept = {(r.layer, r.role) for r in found.rows if r.layer is not None and r.parameters and r.rounding is None}
    wanted = {
        (layer, proj.role) for layer, block in enumerate(describe(model.config).blocks) for sub in block.sublayers
        for proj in sub.mixer.projs if proj.keep
    }  # fmt: skip
    assert kept == (roles(model) if recipe is None else wanted)
    if recipe is not None:
        assert all((r.weight_error < 1e-2) == (r.rounding is None or r.stored_as == "w8a8")
                   for r in found.rows if r.weight_error is not None)  # fmt: skip
        assert all(r.weight_error is not None and r.weight_error < 0.4 for r in found.rows if r.parameters)
    assert recipe is None or plot.draw(found).startswith(b"\x89PNG")


def test_exact_transforms_leave_no_error(original, moved, text):
    folder, _ = original
    found = quamba.inspect(moved, folder, samples=0)
    assert all(r.weight_error is not None and r.weight_error < 1e-6 for r in found.rows if r.parameters)
    pair = quamba.compare(folder, moved, text=text, tokens=48, max_new_tokens=4, device="cpu")
    assert max(pair.layer_errors) < 1e-4 and abs(pair.kl_mean) < 1e-7 and pair.divergence is None


def test_inputs_are_those_of_transformers_linears(original, moved, text):
    folder, model = original
    before, after = (quamba.inspect(source, text=text, **LITTLE) for source in (folder, moved))
    ids = calibration.windows(calibration.read_text(text), quamba.load(folder)[1], 2, 24, 0)
    for layer, block in enumerate(describe(model.config).blocks):
        for sub in block.sublayers:
            proj = sub.mixer.out_proj
            if proj is None or proj.stack or turns_values(sub.mixer):
                continue
            seen, path = [], f"{block.path}.{sub.mixer.name(proj.path)}"
            handles = [
                model.get_submodule(place).register_forward_pre_hook(
                    lambda module, args, to=seen: to.append(args[0].flatten(0, -2))
                )
                for place in (path, *borrowed(describe(model.config), path))
            ]
            with torch.inference_mode():
                model(ids, use_cache=False)
            for handle in handles:
                handle.remove()
            x = torch.cat(seen)
            size = block_size(x.shape[1])
            turned = x.double() @ torch.block_diag(*[hadamard_matrix(size)] * (x.shape[1] // size))
            for found in (before, after):
                (both,) = (r for r in found.rotations if (r.layer, r.role) == (layer, proj.role))
                for spread, want in ((both.before, x), (both.after, turned.float())):
                    assert torch.allclose(spread.channel_peaks, want.abs().amax(0), rtol=1e-3, atol=1e-4)
            rows = [next(r for r in found.rows if (r.layer, r.role) == (layer, proj.role)) for found in (before, after)]
            assert rows[0].input.peak == pytest.approx(float(x.abs().max()), rel=1e-3)
            assert rows[1].input.peak == pytest.approx(float(turned.abs().max()), rel=1e-3)


def test_watching_changes_nothing(name, stock, text):
    opened = Opened(stock("w4a8", name), "cpu", torch.float32)
    ids, seen = calibration.windows(calibration.read_text(text), opened.tokenizer, 2, 24, 0), []
    with torch.inference_mode():
        opened.model.get_submodule(opened.spec.head).register_forward_hook(lambda m, args, output: seen.append(output))
        opened.model(ids, use_cache=False)
        activations.Survey(opened).run(ids, 2, lambda *told: None)
        opened.model(ids, use_cache=False)
        assert len(seen) == 3 and all(torch.equal(watched, seen[0]) for watched in seen)
