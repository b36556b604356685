"""Every transform on every architecture: what is called legal is exact, what is called illegal is not."""

import pytest
import torch

import quamba
from quamba.models import ARCHITECTURES, describe
from quamba.models.spec import Sublayer
from quamba.recipe import parse_recipe
from quamba.transforms import (
    TRANSFORMS,
    Permutation,
    fold_norm,
    legal,
    permute,
    residual_rotation,
    rotate_residual,
    sort_and_cluster,
)  # fmt: skip

CONFIGS = [(name, i) for name, arch in ARCHITECTURES.items() for i in range(len(arch.tiny))]
IDS = torch.randint(0, 96, (2, 37), generator=torch.Generator().manual_seed(0))


def logits(model, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, use_cache=False).logits.double()


def change(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def each_sublayer(model, apply) -> None:
    """Replace every sublayer's tensors by what ``apply(tensors, sublayer)`` makes of them, in fp64."""
    weights = model.state_dict()
    for block in describe(model.config).blocks:
        prefix = f"{block.path}."
        for sub in block.sublayers:
            old = {k.removeprefix(prefix): v.double() for k, v in weights.items() if k.startswith(prefix)}
            weights |= {prefix + k: v.float() for k, v in apply(old, sub).items()}
    model.load_state_dict(weights)


def sublayers(name: str, i: int) -> list[Sublayer]:
    from transformers import AutoConfig

    return list(describe(AutoConfig.for_model(name, **ARCHITECTURES[name].tiny[i])).blocks[0].sublayers)


@pytest.mark.parametrize("name, i", CONFIGS)
def test_every_parameter_is_described(name: str, i: int, build) -> None:
    model = build(name, ARCHITECTURES[name].tiny[i])
    spec = describe(model.config)
    known = {f"{spec.embedding}.weight", f"{spec.final_norm}.weight", f"{spec.head}.weight"}
    for block in spec.blocks:
        for sub in block.sublayers:
            known |= {f"{block.path}.{sub.norm}.weight"}
            known |= {f"{block.path}.{sub.mixer.path}.{p.path}" for p in sub.mixer.params}
    assert known == set(model.state_dict())


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name, i", CONFIGS)
def test_legal_means_exact(name: str, i: int, transform: str, build) -> None:
    reasons = [legal(sub)[transform] for sub in sublayers(name, i)]
    if any(reason and "there is no axis" in reason for reason in reasons):
        with pytest.raises(KeyError):
            TRANSFORMS[transform].apply({}, sublayers(name, i)[0], torch.Generator())
        return
    model = build(name, ARCHITECTURES[name].tiny[i])
    before, rng = logits(model), torch.Generator().manual_seed(1)
    each_sublayer(model, lambda tensors, sub: TRANSFORMS[transform].apply(tensors, sub, rng))
    moved = change(logits(model), before)
    assert moved < 1e-5 if reasons == [None] * len(reasons) else moved > 1e-3, f"{reasons}: changed by {moved:.1e}"


@pytest.mark.parametrize("name, i", CONFIGS)
def test_every_legal_transform_moves_a_tensor(name: str, i: int, build) -> None:
    rng = torch.Generator().manual_seed(1)
    weights = {k: v.double() for k, v in build(name, ARCHITECTURES[name].tiny[i]).state_dict().items()}
    block = "backbone.layers.0."
    tensors = {k.removeprefix(block): v for k, v in weights.items() if k.startswith(block)}
    for sub in sublayers(name, i):
        usable = [t for t, reason in legal(sub).items() if reason is None]
        assert usable
        for transform in usable:
            after = TRANSFORMS[transform].apply(tensors, sub, rng)
            assert set(after) == set(tensors) and any(not torch.equal(after[k], tensors[k]) for k in tensors)


@pytest.mark.parametrize("name, i", CONFIGS)
def test_clustering_permutes_exactly(name: str, i: int, build) -> None:
    model = build(name, ARCHITECTURES[name].tiny[i])
    before, rng, done = logits(model), torch.Generator().manual_seed(2), []

    def apply(tensors, sub):
        sizes = sub.mixer.sizes
        if "H" not in sizes:
            return tensors
        magnitude = torch.rand(sizes["H"], sizes["P"], generator=rng)
        done.append(sub)
        return permute(tensors, sub, sort_and_cluster(magnitude, sizes["G"], 2, 4).permutations)

    each_sublayer(model, apply)
    assert change(logits(model), before) < 1e-5
    assert bool(done) == ("head" in sublayers(name, i)[0].mixer.axes)


@pytest.mark.parametrize("name, i", CONFIGS)
def test_permutations_that_cross_a_class_are_refused(name: str, i: int) -> None:
    for sub in sublayers(name, i):
        for axis in sub.mixer.axes.values():
            order = torch.arange(axis.size).flip(0)
            if axis.fixed and axis.size > 1:
                with pytest.raises(ValueError, match="fixed order"):
                    permute({}, sub, [Permutation(axis.name, order)])
            if axis.share and sub.mixer.axes[axis.share].size > 1:
                with pytest.raises(ValueError, match="must stay inside each"):
                    permute({}, sub, [Permutation(axis.name, order)])


@pytest.mark.parametrize("name, i", CONFIGS)
def test_a_rotated_gain_is_not_exact_unless_folded(name: str, i: int, build) -> None:
    for fold in (True, False):
        model = build(name, {**ARCHITECTURES[name].tiny[i], "tie_word_embeddings": False})
        before, spec = logits(model), describe(model.config)
        rotation = residual_rotation(spec.d_model, 3)
        weights = model.state_dict()
        weights[f"{spec.embedding}.weight"] = rotation.columns(weights[f"{spec.embedding}.weight"]).float()
        gain = weights[f"{spec.final_norm}.weight"].double()
        weights[f"{spec.head}.weight"] = rotation.columns(weights[f"{spec.head}.weight"] * gain).float()
        weights[f"{spec.final_norm}.weight"] = torch.ones(spec.d_model)
        model.load_state_dict(weights)
        each_sublayer(model, lambda t, sub, f=fold, r=rotation: rotate_residual(fold_norm(t, sub) if f else t, sub, r))
        moved = change(logits(model), before)
        assert moved < 1e-5 if fold else moved > 1e-3, f"changed by {moved:.1e}"


D_MODELS = [192, 320, 48, 112, 92]
"""12 * 16, 20 * 16, 12 * 4, 28 * 4, and 92 of which no matrix is known: blocks of 4."""


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("size", D_MODELS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_float_recipe_changes_nothing(name: str, size: int, block: int | None, tiny_checkpoint, quantise) -> None:
    sizes = {"hidden_size": size, "intermediate_size": 2 * size, "num_heads": size // 2, "head_dim": 4}
    fields = ARCHITECTURES[name].tiny[0]
    folder, model = tiny_checkpoint(name, tuple((k, v) for k, v in sizes.items() if k in fields))
    for rotate in ({"residual": True, "output": True, "block": block}, {"residual": False, "output": block is None}):
        recipe = parse_recipe({"rotate": rotate, "cluster": {}}, "exact")
        made = quantise(folder, recipe, f"{rotate['residual']}", samples=1, seqlen=8)
        again, _ = quamba.load(made, device="cpu")
        ids = IDS[:1, :9]
        assert change(logits(again, ids), logits(model, ids)) < 1e-5
