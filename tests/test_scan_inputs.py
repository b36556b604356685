"""What enters recurrences other than Mamba's: int8 with static scales where a recipe asks, and nothing else."""

import pytest
import torch
from safetensors.torch import load_file

import quamba
from quamba import calibration
from quamba.decoding import Decoder
from quamba.models import ARCHITECTURES, describe
from quamba.modules.delta_rule import DeltaRule
from quamba.modules.site import Site
from quamba.modules.state import RecurrentState
from quamba.recipe import parse_recipe

FAMILIES = [
    name for name, arch in ARCHITECTURES.items()
    if name in ("qwen3_next", "qwen3_5_text", "olmo_hybrid", "kimi_linear", "recurrent_gemma", "xlstm", "rwkv")
]  # fmt: skip
ROLES = {f"scan_{name}": {"granularity": "state_group"} for name in ("q", "k", "v", "x")}
PLAIN = {"rotate": {"residual": False, "output": False}, "fold_norms": False}
IDS = torch.randint(1, 2048, (1, 21), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tiny_checkpoint, text, tmp_path_factory):
    """(directory of the original, of the one whose scan inputs alone are int8, the sublayer that scans, its path)."""
    folder, model = tiny_checkpoint(request.param)
    output = tmp_path_factory.mktemp("scan") / "q"
    recipe = parse_recipe({**PLAIN, "activations": ROLES}, "scan")
    quamba.quantize(folder, recipe, output, calibration_text=text, samples=4, seqlen=32, device="cpu")
    blocks = describe(model.config).blocks
    block, sub = next((b, s) for b in blocks for s in b.sublayers if s.mixer.scan and s.mixer.scan.family != "softmax")
    return folder, output, sub.mixer, f"{block.path}.{sub.mixer.path}"


def logits(model, ids=IDS, **options):
    with torch.inference_mode():
        return model(ids, use_cache=False, **options).logits


def change(got, want) -> float:
    return float((got - want).norm() / want.norm())


def entering(model, mixer, path, ids):
    """Name -> what enters the scan, [B, T, C], watched where transformers' modules or quamba's pass it on."""
    seen, part, undo = {}, model.get_submodule(path), []
    if isinstance(part, DeltaRule):
        enter = part.enter

        def watch(**given):
            seen.update({name: x.flatten(2) for name, x in given.items()})
            return enter(**given)

        part.enter = watch
    for i in mixer.inputs:
        if i.at is None:
            continue
        module, argument = part.get_submodule(i.at[0]), i.at[1]
        if argument is None:
            undo.append(module.register_forward_hook(lambda m, args, y, name=i.name: seen.update({name: y})))
        else:
            def see(m, args, kwargs, name=i.name, argument=argument):
                x = kwargs.get(argument, args[0] if args else None)
                seen[name] = x if x.dim() == 3 else x.transpose(1, 2).flatten(2)

            undo.append(module.register_forward_pre_hook(see, with_kwargs=True))
    logits(model, ids)
    for handle in undo:
        handle.remove()
    return seen


def test_scales_are_those_of_the_float_model(case, text):
    folder, output, mixer, path = case
    model, tokenizer = quamba.load(folder, device="cpu")
    ids = calibration.windows(calibration.read_text(text), tokenizer, 4, 32, 0)
    seen = entering(model, mixer, path, ids)
    stored = load_file(output / "model.safetensors")
    names = {name for name in stored if name.startswith(f"{path}.") and ".scan_" in name and name.endswith(".scale")}
    assert len(names) == len(seen) == sum(i.semantics != "rate" for i in mixer.inputs) > 0
    for i in mixer.inputs:
        if i.semantics == "rate":
            continue
        (name,) = (name for name in names if name.endswith(f".scan_{i.name}.scale"))
        peak = seen[i.name].abs().flatten(0, 1).amax(0).view(stored[name].numel(), -1).amax(1)
        assert stored[name].numel() == mixer.size(i.axes[:-1] or i.axes)
        assert torch.allclose(stored[name] * 127, peak, rtol=1e-4)


def test_codes_enter_and_nothing_else_changes(case):
    """Everything is on the grid of its scale, gates and rates are not rounded, and the logits move a little."""
    folder, output, mixer, path = case
    model, _ = quamba.load(output, device="cpu")
    wanted, calls = {i.name for i in mixer.inputs if i.semantics != "rate"}, {}
    part = model.get_submodule(path)
    sites = {name.rpartition("scan_")[2]: m for name, m in part.named_modules() if isinstance(m, Site) and m.static}
    assert set(sites) == wanted and all(site.ready for site in sites.values())
    for name, site in sites.items():
        site.register_forward_hook(lambda m, args, codes, name=name: calls.update({name: codes.data}))
    got, want = logits(model), logits(quamba.load(folder, device="cpu")[0])
    assert set(calls) == wanted and all(codes.dtype == torch.int8 for codes in calls.values())
    assert 1e-6 < change(got, want) < 0.3


def test_the_same_after_saving_again_and_with_padding(case, tmp_path):
    folder, output, mixer, path = case
    model, _ = quamba.load(output, device="cpu")
    before = logits(model)
    model.save_pretrained(tmp_path / "again")
    again, _ = quamba.load(tmp_path / "again", device="cpu", tokenizer=output)
    assert torch.equal(logits(again), before)
    if isinstance(model.get_submodule(path), DeltaRule):
        padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), IDS], 1)
        mask = (torch.arange(24) >= 3).long()[None]
        places = (torch.arange(24) - 3).clamp_min(0)[None]
        got = logits(model, padded, attention_mask=mask, position_ids=places)[:, 3:]
        assert change(got, before) < 1e-4


def test_rates_are_never_rounded(tiny_checkpoint, quantise):
    """Not even where a recipe names every activation."""
    folder, _ = tiny_checkpoint("kimi_linear")
    output = quantise(folder, parse_recipe({**PLAIN, "activations": {"default": {}}}, "all"))
    assert not [name for name in load_file(output / "model.safetensors") if "scan_rate" in name or "scan_beta" in name]


@pytest.mark.parametrize("dtype, close", [("float32", 1e-4), ("float16", 1e-2), ("int8", 0.5)])
@pytest.mark.parametrize("model_type", ["qwen3_5_text", "kimi_linear"])
def test_a_delta_rules_state_is_stored_as_asked(model_type, dtype, close, tiny_checkpoint, quantise):
    folder, _ = tiny_checkpoint(model_type)
    recipe = parse_recipe({**PLAIN, "state": {"dtype": "int8", "delta_rule": dtype, "rounding": "stochastic"}}, "state")
    model, _ = quamba.load(quantise(folder, recipe, samples=1, seqlen=8), device="cpu")
    decoder = Decoder(model, capture=False)
    with torch.inference_mode():
        steps = [decoder.forward(part) for part in IDS.split(1, 1)]
    layers = next(iter(decoder.cache.values())).layers
    states = [layer.recurrent for layer in layers if isinstance(layer, RecurrentState)]
    assert states and all(state.dtype == getattr(torch, dtype) for state in states)
    error = change(torch.stack(steps, 1), logits(model))
    assert error < close and (dtype == "float32" or error > 1e-6)
