"""Recipes: what ships loads, what is wrong is refused in a sentence, overrides resolve."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig

from quamba import embedded, formats
from quamba.errors import UserError
from quamba.models import describe, fit_recipe
from quamba.observers import OBSERVERS
from quamba.recipe import FLOAT, LayerOverride, LinearSpec, Recipe, load_recipe, parse_recipe, stock_recipes

ROOT = Path(__file__).resolve().parents[1]


def test_every_recipe_file_is_stock() -> None:
    assert set(stock_recipes()) == {p.stem for p in (ROOT / "recipes").glob("*.yaml")} != set()


@pytest.mark.parametrize("name", stock_recipes())
def test_stock_recipes_load_and_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.summary.endswith(".")
    dumped = recipe.model_dump(mode="json")
    assert Recipe(**dumped) == recipe
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(dumped))
    assert load_recipe(path) == recipe
    assert load_recipe(recipe) is recipe


@pytest.mark.parametrize("name", stock_recipes())
def test_stock_recipes_name_what_exists(name: str) -> None:
    recipe = load_recipe(name)
    for role in {"in_proj", "x_proj", "dt_proj", "out_proj", "lm_head", *recipe.linears}:
        spec = recipe.linear(role)
        assert spec.format in formats.FORMATS and spec.input.observer in OBSERVERS
    assert all(recipe.activation(role).observer in OBSERVERS for role in recipe.activations)


def test_float_changes_nothing() -> None:
    assert FLOAT.linear("in_proj").format == "float" and FLOAT.activation("scan_x").bits == 16
    assert not (FLOAT.fold_norms or FLOAT.rotate.residual or FLOAT.rotate.output or FLOAT.cluster)


UNKNOWN = [
    ({"roate": {}}, "'roate'", ["rotate", "linears"]),
    ({"rotate": {"residula": True}}, "residula", ["residual", "block"]),
    ({"linears": {"in_proj": {"formt": "w8a8"}}}, "formt", ["format", "group_size"]),
    ({"linears": {"in_proj": {"input": {"scal": "static"}}}}, "scal", ["scale", "observer"]),
    ({"activations": {"gate": {"granulrity": "tensor"}}}, "granulrity", ["granularity", "bits"]),
    ({"cluster": {"head": 4}}, "head", ["heads", "channels"]),
    ({"layers": [{"match": "0", "stte": {}}]}, "stte", ["state", "match"]),
    ({"wide": {"d_model": 8, "linears": {"lm_head": {"formt": "w8a8"}}}}, "formt", ["format", "group_size"]),
    ({"wide": {"d_model": 8, "linear": {}}}, "linear", ["d_model", "linears"]),
    ({"layers": [{"match": "0", "state": {"dtpe": "int8"}}]}, "dtpe", ["dtype", "rounding"]),
]


@pytest.mark.parametrize("data, key, known", UNKNOWN, ids=[u[1].strip("'") for u in UNKNOWN])
def test_unknown_keys_are_errors_that_list_the_known(data: dict, key: str, known: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse_recipe(data, "mine.yaml")
    message = str(error.value)
    assert "mine.yaml" in message and "unknown key" in message and key in message and "\n" not in message
    listed = [word.strip() for word in message.rpartition("known keys are ")[2].split(",")]
    assert set(known) <= set(listed) and key.strip("'") not in listed


BAD = [
    ({"state": {"dtype": "int4"}}, "state.dtype", "int4"),
    ({"activations": {"gate": {"bits": 7}}}, "bits", "7"),
    ({"activations": {"gate": {"observer": "percentle"}}}, "observer", "percentile"),
    ({"linears": {"default": {"format": "w3a8"}}}, "format", "w4a8"),
    ({"linears": {"default": {"group_size": 0}}}, "group_size", "0"),
    ({"linears": {"default": {"damping": -1}}}, "damping", "-1"),
    ({"linears": {"default": "w8a8"}}, "linears.default", "w8a8"),
    ({"fold_norms": False}, "fold_norms", "rotation"),
    ({"layers": [{"match": "first"}]}, "layers.0", "first"),
    ({"wide": {"linears": {}}}, "wide.d_model", "required"),
    ({"wide": {"d_model": 8, "linears": {"lm_head": {"format": "w3a8"}}}}, "wide: linears.lm_head", "w4a8"),
    ({"calibration": {"samples": 0}}, "calibration.samples", "0"),
    ({"activations": {"gate": {"quantile": 0.2}}}, "quantile", "0.2"),
    ({"linear_state": {"delta_rule": "int8"}}, "linear_state.delta_rule", "leave it out"),
    ({"layers": [{"match": "0", "linear_state": {"delta_rule": "int8"}}]}, "linear_state.delta_rule", "its own dtype"),
]


@pytest.mark.parametrize("data, where, told", BAD, ids=[f"{b[1]}={b[2]}" for b in BAD])
def test_bad_values_are_named(data: dict, where: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        parse_recipe(data, "mine.yaml")
    assert where in str(error.value) and told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("data", [None, [], "w8a8", 3])
def test_a_recipe_is_a_mapping(data: object) -> None:
    with pytest.raises(UserError, match="must be a mapping"):
        parse_recipe(data, "mine.yaml")


@pytest.mark.parametrize("text", [b"linears: {default: [", b"\xff\xfe\x00bad", b"a: b: c"])
def test_unreadable_files(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text)
    with pytest.raises(UserError, match="bad.yaml is not readable YAML"):
        load_recipe(path)


def test_an_unknown_name_lists_the_stock() -> None:
    with pytest.raises(UserError) as error:
        load_recipe("w8a9")
    assert all(name in str(error.value) for name in ["w8a9", *stock_recipes()])


MIXED = {
    "linears": {
        "default": {"format": "w4a8", "group_size": 64, "input": {"observer": "mse"}},
        "out_proj": {"format": "w8a8", "input": {"scale": "dynamic"}},
    },
    "activations": {"gate": {"granularity": "channel"}},
    "conv": {"bits": 8},
    "layers": [
        {"match": "0-3,7", "linears": {"default": {"format": "w8a8"}}, "state": {"dtype": "int8"}},
        {"match": [3, "9-10"], "linears": {"out_proj": {"format": "float"}}, "conv": {"bits": 16},
         "activations": {"scan_x": {"granularity": "cluster"}}},
    ],
}  # fmt: skip


def test_roles_lie_over_the_default_key_by_key() -> None:
    recipe = parse_recipe(MIXED, "mixed")
    assert recipe.linear("in_proj") == LinearSpec(format="w4a8", group_size=64, input={"observer": "mse"})
    out = recipe.linear("out_proj")
    assert (out.format, out.group_size, out.input.scale, out.input.observer) == ("w8a8", 64, "dynamic", "mse")


def test_layers_lie_over_the_roles() -> None:
    recipe = parse_recipe(MIXED, "mixed")
    formats_of = {layer: recipe.linear("in_proj", layer).format for layer in range(11)}
    assert [layer for layer, name in formats_of.items() if name == "w8a8"] == [0, 1, 2, 7]
    # the last matching override decides alone
    assert formats_of[3] == "w4a8" and recipe.linear("out_proj", 3).format == "float"
    assert recipe.linear("out_proj", 10).input.scale == "dynamic"
    assert [recipe.state_of(i).dtype for i in (0, 3, 7, 8)] == ["int8", "float32", "int8", "float32"]
    assert [recipe.conv_of(i).bits for i in (0, 3, 9, 8)] == [8, 16, 16, 8]


def test_activations_stay_in_16_bits_unless_named() -> None:
    recipe = parse_recipe(MIXED, "mixed")
    assert recipe.activation("gate").bits == 8 and recipe.activation("scan_x").bits == 16
    assert recipe.activation("scan_x", 9).granularity == "cluster" and recipe.activation("scan_x", 0).bits == 16


@pytest.mark.parametrize("match, inside", [("0-3,7", {0, 1, 2, 3, 7}), ("5", {5}), ("8-9,0", {0, 8, 9})])
def test_match_covers(match: str, inside: set[int]) -> None:
    assert {layer for layer in range(12) if LayerOverride(match=match).covers(layer)} == inside
    listed = LayerOverride(match=match.split(","))  # type: ignore[arg-type]
    assert {layer for layer in range(12) if listed.covers(layer)} == inside


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        FLOAT.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("name", embedded.names())
@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"linears": {"in_prjo": {}}}, r"unknown role 'in_prjo' in linears; this model has \[.*'in_proj', "),
        ({"activations": {"scan_y": {}}}, r"unknown role 'scan_y' in activations; this model has \[.*'scan_x'"),
        ({"layers": [{"match": "0", "linears": {"in_prjo": {}}}]}, "unknown role 'in_prjo' in linears"),
        ({"layers": [{"match": "40"}]}, "layers '40' covers none of the 6 layers"),
        ({"layers": [{"match": "0"}, {"match": "6-9"}]}, "layers '6-9' covers none of the 6 layers"),
    ],
)
def test_roles_and_layers_that_the_model_lacks_are_refused(name: str, data: dict, sentence: str) -> None:
    model = describe(AutoConfig.from_pretrained(embedded.checkpoint(name)))
    with pytest.raises(UserError, match=f"^recipe mine: {sentence}"):
        fit_recipe(parse_recipe({"name": "mine", **data}, "mine"), model)


@pytest.mark.parametrize("name", embedded.names())
def test_what_the_model_has_is_accepted(name: str) -> None:
    model = describe(AutoConfig.from_pretrained(embedded.checkpoint(name)))
    for recipe in stock_recipes():
        fit_recipe(load_recipe(recipe), model)
    fit_recipe(parse_recipe({"layers": [{"match": "5-9", "linears": {"out_proj": {}}}]}, "mine"), model)


def test_what_is_wide_is_laid_over_the_rest_from_that_width_on() -> None:
    data = {
        "linears": {"default": {"format": "w4a8"}, "lm_head": {"format": "w8a8", "input": {"scale": "dynamic"}}},
        "wide": {"d_model": 64, "linears": {"lm_head": {"format": "w4a8"}}, "activations": {"gate": {}}},
        "layers": [{"match": "0", "linears": {"lm_head": {"group_size": 64}}}],
    }
    recipe = parse_recipe(data, "mine")
    narrow, wide = recipe.for_width(63), recipe.for_width(64)
    assert narrow.linear("lm_head").format == "w8a8" and narrow.activation("gate").bits == 16
    assert wide.linear("lm_head").format == "w4a8" and wide.linear("lm_head").input.scale == "dynamic"
    assert wide.activation("gate").bits == 8 and wide.linear("lm_head", 0).group_size == 64
    assert narrow.wide is None and wide.wide is None and wide.for_width(1) is wide


@pytest.mark.parametrize("name", ["w4a8", "w4a16"])
def test_stock_recipes_give_large_models_a_4_bit_head(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.for_width(2048).linear("lm_head").format == "w8a8"
    assert recipe.for_width(2560).linear("lm_head").format == name


def test_a_role_that_only_wide_models_would_use_is_checked_for_all() -> None:
    model = describe(AutoConfig.from_pretrained(embedded.checkpoint(embedded.names()[0])))
    wide = {"d_model": 1 << 20, "linears": {"in_prjo": {"format": "w8a8"}}}
    with pytest.raises(UserError, match="unknown role 'in_prjo' in linears"):
        fit_recipe(parse_recipe({"name": "mine", "wide": wide}, "mine"), model)


def test_an_output_is_of_its_width_and_says_so(tiny_checkpoint, quantise) -> None:
    folder, model = tiny_checkpoint("mamba2")
    width = describe(model.config).d_model
    linears = {"default": {"format": "w8a8", "method": "rtn"}}
    for least, kind in ((width, torch.int32), (width + 1, torch.int8)):
        wide = {"d_model": least, "linears": {"lm_head": {"format": "w4a8"}}}
        out = quantise(folder, parse_recipe({"linears": linears, "wide": wide}, "mine"), f"from-{least}")
        assert load_file(out / "model.safetensors")["lm_head.weight_packed"].dtype == kind
        stored = load_recipe(out / "recipe.yaml")
        assert stored.wide is None and (stored.linear("lm_head").format == "w4a8") == (kind == torch.int32)
