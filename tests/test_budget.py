"""Mixed precision under a budget: sizes to the byte, losses as they are, the best assignment, a recipe that reruns."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from typer.testing import CliRunner

import quamba
from architectures import HOSTED, OWN
from quamba import calibration, memory
from quamba.budget import amount, search
from quamba.budget.allocate import allocate
from quamba.budget.found import compose
from quamba.budget.parts import kept_types, model_bytes, parts
from quamba.budget.schemes import Schemes, load_schemes, stock_schemes
from quamba.checkpoint import Checkpoint
from quamba.cli import app
from quamba.errors import UserError
from quamba.inspection.pair import divergence
from quamba.recipe import LinearSpec, load_recipe, parse_recipe
from quamba_kernels.cuda.linear import shape_why_not

TINY = ["mamba1-tiny", "mamba2-tiny"]
ENOUGH = {"samples": 4, "seqlen": 128, "device": "cpu"}


def stored(folder) -> int:
    """Bytes of all tensors of a directory."""
    return sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())


choices = st.lists(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1, allow_subnormal=False)), min_size=1, max_size=4),
    min_size=1, max_size=5,
)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(choices, st.integers(0, 200))
def test_no_assignment_that_fits_loses_less(parts, budget):
    everything = list(itertools.product(*[range(len(part)) for part in parts]))
    size = {a: sum(part[i][0] for part, i in zip(parts, a, strict=True)) for a in everything}
    loss = {a: sum(part[i][1] for part, i in zip(parts, a, strict=True)) for a in everything}
    fitting = [a for a in everything if size[a] <= budget]
    if not fitting:
        with pytest.raises(ValueError, match="smallest choices"):
            allocate(parts, budget)
        return
    found = tuple(allocate(parts, budget))
    assert size[found] <= budget
    assert loss[found] <= min(loss[a] for a in fitting) * (1 + 1e-12)


def test_large_assignments_are_quick_and_as_good_as_dynamic_programming():
    """200 parts of 6 choices: a table over all budgets is the definition."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 50, (200, 6), generator=generator)
    losses = torch.rand(200, 6, generator=generator, dtype=torch.float64)
    budget = 3000
    table = torch.zeros(budget + 1, dtype=torch.float64)
    for size, loss in zip(sizes, losses, strict=True):
        shifted = [torch.cat([torch.full((int(s),), math.inf), table[: len(table) - int(s)]]) + c
                   for s, c in zip(size, loss, strict=True)]  # fmt: skip
        table = torch.stack(shifted).amin(0)
    parts = [list(zip(s.tolist(), c.tolist(), strict=True)) for s, c in zip(sizes, losses, strict=True)]
    found = allocate(parts, budget)
    assert sum(int(s[i]) for s, i in zip(sizes, found, strict=True)) <= budget
    assert sum(float(c[i]) for c, i in zip(losses, found, strict=True)) == pytest.approx(float(table.min()), rel=1e-12)


@pytest.mark.parametrize("text, linears", [("4.5", 450), ("4", 400), ("1kB", 900), ("1KiB", 924), (" 0.5 KB ", 400)])
def test_budgets_are_bits_per_weight_or_bytes(text, linears):
    assert amount.parse(text).for_linears(weights=800, fixed=100) == linears


@pytest.mark.parametrize("text", ["", "4.5.1", "-4", "four", "30 M B", "1e3"])
def test_what_is_no_amount_is_told(text):
    with pytest.raises(UserError, match="is no amount; give bits per weight"):
        amount.parse(text)


def test_unknown_units_are_told_with_the_known():
    with pytest.raises(UserError, match="unknown unit 'TB'; known are B, kB, KB, MB"):
        amount.parse("30TB")
    with pytest.raises(UserError, match="leaves nothing"):
        amount.parse("0MB")


@pytest.mark.parametrize("recipe", ["w4a8", "w4a16"])
@pytest.mark.parametrize("model_type", [*OWN, *HOSTED])
def test_sizes_are_known_beforehand_to_the_byte(model_type, recipe, tiny_checkpoint, stock):
    checkpoint = Checkpoint(tiny_checkpoint(model_type)[0])
    size = model_bytes(checkpoint, load_recipe(recipe), kept_types(checkpoint))
    assert size == stored(stock(recipe, model_type))


@pytest.mark.parametrize("model", TINY)
def test_the_budget_is_kept_and_the_recipe_reruns_to_the_same_bytes(model, text, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    command = ["quantize", model, "--calibration", str(text), "--samples", "4", "--seqlen", "64", "--device", "cpu"]
    result = CliRunner().invoke(app, [*command, "--recipe", "w4a8", "--budget", "1530kB", "--output", str(out)])
    assert result.exit_code == 0, result.output
    assert 1_500_000 < stored(out) <= 1_530_000
    assert f"model: {stored(out) / 1e6:.2f} MB" in result.output
    result = CliRunner().invoke(app, [*command, "--recipe", str(out / "recipe.yaml"), "--output", str(again)])
    assert result.exit_code == 0, result.output
    for name in ("model.safetensors", "recipe.yaml", "config.json"):
        assert (again / name).read_bytes() == (out / name).read_bytes()


def test_search_only_writes_the_recipe_alone(text, tmp_path):
    found, out = tmp_path / "found.yaml", tmp_path / "out"
    command = ["quantize", "mamba2-tiny", "--recipe", "w4a8", "--budget", "4.6", "--calibration", str(text),
               "--samples", "2", "--seqlen", "32", "--device", "cpu"]  # fmt: skip
    result = CliRunner().invoke(app, [*command, "--search-only", str(found)])
    assert result.exit_code == 0, result.output
    assert not out.exists() and "bits per weight" in result.output
    recipe = load_recipe(found)
    assert recipe.name == "w4a8-4.6" and recipe.layers
    result = CliRunner().invoke(app, [*command, "--output", str(out)])
    assert (out / "recipe.yaml").read_bytes() == found.read_bytes()


@pytest.fixture(scope="module")
def found():
    """model -> a search in it, made once."""
    kept = {}

    def made(model):
        if model not in kept:
            kept[model] = search(model, "w4a8", "4.5", **ENOUGH)
        return kept[model]

    return made


@pytest.fixture(scope="module")
def stock_w4a8(tmp_path_factory):
    """model -> its directory by the stock recipe."""

    def made(model):
        folder = tmp_path_factory.getbasetemp() / f"stock-{model}"
        if not folder.exists():
            quamba.quantize(model, "w4a8", folder, **ENOUGH)
        return folder

    return made


@pytest.mark.parametrize("model", TINY)
def test_bits_per_weight_count_what_is_written(model, found, tmp_path):
    quamba.quantize(model, found(model).recipe, tmp_path / "q", samples=4, seqlen=64, device="cpu")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    roles = ("in_proj", "x_proj", "dt_proj", "out_proj", "lm_head")
    size = sum(t.nbytes for name, t in tensors.items() if any(f"{role}." in name for role in roles) and
               not name.endswith("bias"))  # fmt: skip
    weights = sum(t.numel() * (8 if t.dtype == torch.int32 else 1) for name, t in tensors.items()
                  if name.endswith("weight_packed") and any(f"{role}." in name for role in roles))  # fmt: skip
    assert size == found(model).linears and found(model).bits == 8 * size / weights
    assert 4.45 < found(model).bits <= 4.5
    assert found(model).linears + found(model).fixed == stored(tmp_path / "q")


@pytest.mark.parametrize("model", TINY)
def test_losses_are_kl_divergences_and_fall_with_bits(model, found):
    total: Counter[str] = Counter()
    for part in found(model).parts:
        if len(part.options) == 1:  # dt_proj of 12 features, which no 4-bit format holds
            assert part.role == "dt_proj" and part.options[0].scheme == "w8a8"
            continue
        losses = dict(zip((o.scheme for o in part.options), found(model).losses[part.layer, part.role], strict=True))
        assert 0 < losses["w8a8"] < losses["w4a8-g128"]
        total.update(losses)
    assert total["w8a8"] < 0.05 * total["w4a8-g128"]


@pytest.mark.parametrize("layer, role, scheme", [(2, "in_proj", "w8a8"), (4, "out_proj", "w4a8-g32"),
                                                 (None, "lm_head", "w4a8-g64")])  # fmt: skip
def test_a_loss_is_what_quantising_that_linear_alone_costs(layer, role, scheme, found, tmp_path):
    """Against the pipeline, run with recipes that leave everything else, or everything, in floats."""
    model = "mamba2-tiny"
    part = next(p for p in found(model).parts if (p.layer, p.role) == (layer, role))
    index = [o.scheme for o in part.options].index(scheme)
    floats = load_recipe("w4a8").model_dump(mode="json")
    floats |= {"linears": {}, "activations": {}, "conv": {"bits": 16}, "cluster": None}
    told = {"linears": {role: part.options[index].spec.model_dump(mode="json")}}
    alone = {**floats, **(told if layer is None else {"layers": [{"match": str(layer), **told}]})}
    logits = []
    for name, data in (("floats", floats), ("alone", alone)):
        quamba.quantize(model, parse_recipe(data, name), tmp_path / name, **ENOUGH)
        opened, tokenizer = quamba.load(tmp_path / name, device="cpu", dtype=torch.float32)
        tokens = calibration.windows(calibration.read_text(None), tokenizer, ENOUGH["samples"], ENOUGH["seqlen"], 0)
        with torch.inference_mode():
            logits.append(opened(tokens).logits.flatten(0, 1))
    assert found(model).losses[layer, role][index] == pytest.approx(float(divergence(*logits).mean()), rel=0.05)


@pytest.mark.parametrize("model", TINY)
def test_what_is_found_beats_the_stock_recipe_at_its_size(model, stock_w4a8, tmp_path):
    """Measured after quantising, on another text: KL to the original."""
    size = stored(stock_w4a8(model))
    found = search(model, "w4a8", f"{size}B", **ENOUGH)
    quamba.quantize(model, found.recipe, tmp_path / "found", **ENOUGH)
    assert 0.99 * size < stored(tmp_path / "found") <= size
    ours, theirs = (
        quamba.compare(model, folder, max_new_tokens=0, tokens=1024, device="cpu").kl_mean
        for folder in (tmp_path / "found", stock_w4a8(model))
    )
    assert ours < 0.85 * theirs


def test_the_same_seed_finds_the_same_and_few_candidates_at_a_time_too(text, monkeypatch):
    two = Schemes("two", {"8": {"format": "w8a8"}, "4": {"format": "w4a8", "group_size": 32}}, samples=2)
    options = {"schemes": two, "samples": 2, "seqlen": 64, "device": "cpu", "calibration_text": text}
    phases = []

    def tell(phase, done, total):
        phases.append((done, total))

    once, again = (search("mamba2-tiny", "w4a8", "5", **options, progress=tell) for _ in range(2))
    assert again.recipe == once.recipe and again.losses == once.losses
    assert phases[: len(phases) // 2] == [(done, 7) for done in range(1, 8)]
    phases.clear()
    hidden = 2 * 64 * 192 * 4
    monkeypatch.setattr(memory, "installed", lambda: 4 * 9 * hidden)  # room for the candidates of two layers
    assert search("mamba2-tiny", "w4a8", "5", **options, progress=tell).losses == once.losses
    assert phases == [(done, 15) for done in range(1, 16)]


@pytest.mark.parametrize("model_type", HOSTED)
def test_hybrids_are_searched_too(model_type, tiny_checkpoint, text, tmp_path):
    folder, _ = tiny_checkpoint(model_type)
    schemes = Schemes("two", {"8": {"format": "w8a8"}, "4": {"format": "w4a8", "group_size": 32}}, samples=2)
    options = {"calibration_text": text, "samples": 2, "seqlen": 16, "device": "cpu"}
    found = search(folder, "w4a8", "6", schemes=schemes, **options)
    quamba.quantize(folder, found.recipe, tmp_path / "q", **options)
    assert stored(tmp_path / "q") == found.linears + found.fixed and found.bits <= 6
    assert {option.scheme for option in found.choice} == {"8", "4"}


def test_a_group_that_does_not_divide_is_named_by_what_it_falls_back_on(tiny_checkpoint, text, tmp_path):
    """A recipe that asks for groups of 64 among 96 features, and nowhere else, is refused."""
    folder, _ = tiny_checkpoint("bamba")
    linears = {"default": {"format": "float"}, "down_proj": {"format": "w4a8", "group_size": 32}}
    schemes = Schemes("two", {"8": {"format": "w8a8"}, "4": {"format": "w4a8", "group_size": 64}}, samples=2)
    options = {"calibration_text": text, "samples": 2, "seqlen": 16, "device": "cpu"}
    found = search(folder, parse_recipe({"linears": linears}, "one"), "7", schemes=schemes, **options)
    assert {option.scheme: option.spec.group_size for option in found.choice}["4"] == 48
    quamba.quantize(folder, found.recipe, tmp_path / "q", **options)
    assert stored(tmp_path / "q") == found.linears + found.fixed


@pytest.mark.parametrize("model_type, layer, role", [
    ("zamba2", 1, "q_proj"), ("zamba2", 1, "adapter_up_proj"), ("rwkv7", 0, "v_proj"), ("rwkv7", 1, "k_proj"),
])  # fmt: skip
def test_a_loss_reaches_as_far_as_its_linear(model_type, layer, role, tiny_checkpoint, text, tmp_path):
    """To every layer that uses a shared block, each of whose adapters counts; to what one layer hands on to others."""
    folder, _ = tiny_checkpoint(model_type)
    four = Schemes("four", {"4": {"format": "w4a8", "group_size": 32}, "8": {"format": "w8a8"}}, samples=4)
    options = {"calibration_text": text, "samples": 4, "seqlen": 32, "device": "cpu"}
    told = {"rotate": {"residual": True}, "activations": {}}
    found = search(folder, parse_recipe({**told, "linears": {"default": {"format": "w4a8"}}}, "w4"), "7",
                   schemes=four, **options)  # fmt: skip
    (part,) = (p for p in found.parts if (p.layer, p.role) == (layer, role))
    alone = {**told, "layers": [{"match": str(layer), "linears": {role: part.options[0].spec.model_dump(mode="json")}}]}
    logits = []
    for name, data in (("floats", told), ("alone", alone)):
        quamba.quantize(folder, parse_recipe(data, name), tmp_path / name, **options)
        opened, tokenizer = quamba.load(tmp_path / name, device="cpu", dtype=torch.float32)
        tokens = calibration.windows(calibration.read_text(text), tokenizer, 4, 32, 0)
        with torch.inference_mode():
            logits.append(opened(tokens, use_cache=False).logits.flatten(0, 1))
    assert found.losses[layer, role][0] == pytest.approx(float(divergence(*logits).mean()), rel=0.05)


def test_a_recipes_own_layers_and_words_are_kept():
    recipe = parse_recipe(
        {"linears": {"default": {"format": "w4a8", "input": {"observer": "mse"}}, "lm_head": {"format": "float"}},
         "layers": [{"match": "0-2", "linears": {"default": {"damping": 0.1}}, "state": {"dtype": "int8"}}]}, "mine"
    )  # fmt: skip
    checkpoint = Checkpoint("mamba2-tiny")
    found = parts(checkpoint.spec, recipe, load_schemes(), kept_types(checkpoint))
    assert {part.role for part in found} == {"in_proj", "out_proj"}  # a head in floats is not touched
    choice = [part.options[index % len(part.options)] for index, part in enumerate(found)]
    made = compose(recipe, amount.parse("5"), found, choice)
    for part, option in zip(found, choice, strict=True):
        assert made.linear(part.role, part.layer) == option.spec
        assert option.spec.damping == (0.1 if part.layer < 3 else 0.01) and option.spec.input.observer == "mse"
    assert [made.state_of(layer).dtype for layer in (1, 3)] == ["int8", "float32"]


@pytest.mark.parametrize("recipe, inputs", [("w4a8", True), ("w8a8", True), ("w4a16", False)])
def test_inputs_stay_of_the_recipes_kind(recipe, inputs):
    from quamba.formats import FORMATS

    checkpoint, chosen = Checkpoint("mamba2-tiny"), load_recipe(recipe)
    types = kept_types(checkpoint)
    for part in parts(checkpoint.spec, chosen, load_schemes(), types):
        if part.role != "lm_head":
            assert {FORMATS[option.spec.format].int8_input for option in part.options} == {inputs}
    mixed = parts(checkpoint.spec, chosen, load_schemes("any-inputs"), types)
    assert all(len({FORMATS[o.spec.format].int8_input for o in part.options}) == 2 for part in mixed)


def test_budgets_out_of_reach_say_what_is_in_reach():
    with pytest.raises(UserError, match=r"2 is less than the smallest schemes need; give 4\.\d+ bits .* more") as low:
        search("mamba2-tiny", "w4a8", "2")
    least = str(low.value).split("give ")[1].split(" ")[0]
    with pytest.raises(UserError, match=r"16 is more than the largest schemes can use, (8\.\d+) bits"):
        search("mamba2-tiny", "w4a8", "16")
    with pytest.raises(UserError, match="bytes need a unit"):
        search("mamba2-tiny", "w4a8", "1500000")
    with pytest.raises(UserError, match=r"1MB is less than the smallest schemes need; give \d+B or more"):
        search("mamba2-tiny", "w4a8", "1MB")
    found = search("mamba2-tiny", "w4a8", least, samples=1, seqlen=16, device="cpu")
    assert {option.bytes for option in found.choice} == {min(o.bytes for o in p.options) for p in found.parts}
    with pytest.raises(UserError, match="quantises no linear"):
        search("mamba2-tiny", parse_recipe({}, "floats"), "4.5")


@pytest.mark.parametrize("name", stock_schemes())
def test_stock_schemes_load(name):
    schemes = load_schemes(name)
    assert schemes.name == name and len(schemes.known) > 3


def test_cuda_kernels_take_the_list_that_is_named_after_them():
    sizes = {LinearSpec(**changes).group_size for changes in load_schemes("cuda").known.values()}
    assert all(shape_why_not(512, 512, size) is None for size in sizes)
    assert shape_why_not(512, 512, 16) is not None  # which is why same-inputs is another one


WRONG = [
    ("[]", "must be a mapping"),
    ("schemes: {}", "missing or empty"),
    ("smaples: 3", "unknown key 'smaples'; known keys are summary, inputs, samples, schemes"),
    ("schemes: {a: {formt: w8a8}}", "formt"),
    ("schemes: {a: {format: w3a8}}", "w4a8"),
    ("{schemes: {a: {format: w8a8}}, inputs: some}", "same or any"),
    ("{schemes: {a: {format: w8a8}}, samples: 0}", "1 or more"),
    ("{schemes: {a: {format: w8a8}}, samples: many}", "should be a int"),
    ("schemes: [", "not readable YAML"),
]


@pytest.mark.parametrize("content, message", WRONG, ids=[message for _, message in WRONG])
def test_wrong_schemes_are_told(content, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match="mine.yaml") as error:
        load_schemes(path)
    assert message in str(error.value)


MISTAKES = [
    (["--budget", "4.5"], "give --output DIR"),
    (["--search-only", "found.yaml"], "give --budget too"),
    (["--budget", "4.5", "--search-only", "no/such/found.yaml"], "no directory"),
    (["--budget", "4.5", "--output", "out", "--schemes", "mine"], "a stock list (any-inputs, cuda, same-inputs)"),
    (["--budget", "4.5bpw", "--output", "out"], "unknown unit 'bpw'"),
    (["--budget", "4.5", "--output", "out", "--linears-only"], "leave --linears-only out"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_are_told_in_a_sentence(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["quantize", "mamba2-tiny", "--recipe", "w4a8", *arguments])
    assert result.exit_code == 2 and message in result.stderr and not list(tmp_path.iterdir())
