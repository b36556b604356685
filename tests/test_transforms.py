"""Every transform on every architecture: what is called legal is exact, what is called illegal is not."""

import pytest
import torch

import quamba
from architectures import OWN
from quamba.models import ARCHITECTURES, describe
from quamba.models.spec import BlockSpec, ModelSpec, Sublayer
from quamba.recipe import parse_recipe
from quamba.transforms import (
    TRANSFORMS,
    Permutation,
    fold_norms,
    legal,
    permute,
    residual_rotation,
    residual_rotation_obstacle,
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


def each_block(model, apply) -> None:
    """Replace every block's tensors by what ``apply(tensors, block)`` makes of them, in fp64."""
    weights = model.state_dict()
    for block in describe(model.config).blocks:
        prefix = f"{block.path}."
        old = {k.removeprefix(prefix): v.double() for k, v in weights.items() if k.startswith(prefix)}
        weights |= {prefix + k: v.float() for k, v in apply(old, block).items()}
    model.load_state_dict(shared(weights, describe(model.config)))


def shared(weights, spec: ModelSpec):
    """The tensors of a model with what a block borrows as its lender has it."""
    for block in spec.blocks:
        if block.borrows is not None:
            here, lender = f"{block.path}.{block.borrows[0]}.", f"{block.borrows[1]}."
            for name in [name for name in weights if name.startswith(here)]:
                weights[name] = weights[lender + name.removeprefix(here)]
    return weights


def only(model, block: BlockSpec, sub: Sublayer, apply) -> None:
    """Replace the tensors of one sublayer of one block."""
    each_block(model, lambda tensors, b: apply(tensors, sub) if b.path == block.path else tensors)


def kinds(name: str, i: int) -> list[tuple[BlockSpec, Sublayer]]:
    """One of each different sublayer of a tiny model, with its block."""
    from transformers import AutoConfig

    found: dict[str, tuple[BlockSpec, Sublayer]] = {}
    for block in describe(AutoConfig.for_model(name, **ARCHITECTURES[name].tiny[i])).blocks:
        for sub in block.sublayers:
            found.setdefault(repr(sub), (block, sub))
    return list(found.values())


SUBLAYERS = [
    pytest.param(name, i, block, sub, id=f"{name}-{i}-{sub.mixer.path}")
    for name, i in CONFIGS
    for block, sub in kinds(name, i)
]


@pytest.mark.parametrize("name, i", CONFIGS)
def test_every_parameter_is_described(name: str, i: int, build) -> None:
    model = build(name, ARCHITECTURES[name].tiny[i])
    spec = describe(model.config)
    known = {f"{spec.embedding}.weight", f"{spec.final_norm}.weight", f"{spec.head}.weight"}
    for block in spec.blocks:
        known |= {f"{block.path}.{path}.{name}" for path, sub in block.norms.items() for name in sub.norm_tensors}
        known |= {f"{block.path}.{p}" for p in block.params}
        for sub in block.sublayers:
            known |= {f"{block.path}.{sub.mixer.name(p.path)}" for p in sub.mixer.params}
        if block.borrows is not None:
            here, lender = f"{block.path}.{block.borrows[0]}.", f"{block.borrows[1]}."
            known |= {here + name.removeprefix(lender) for name in known if name.startswith(lender)}
    known |= {f"{spec.final_norm}.bias"} if spec.final_norm_kind == "layer" and spec.final_norm_bias else set()
    known |= set(spec.params)
    assert known == set(model.state_dict())


@pytest.mark.parametrize("name, i, block, sub", SUBLAYERS)
def test_legal_means_exact(name: str, i: int, block: BlockSpec, sub: Sublayer, build) -> None:
    reasons = legal(sub)
    original = build(name, ARCHITECTURES[name].tiny[i])
    before, weights = logits(original), {k: v.clone() for k, v in original.state_dict().items()}
    usable = 0
    for transform, reason in reasons.items():
        if reason is not None and ("there is no axis" in reason or "has a fixed order" in reason):
            continue  # permute refuses the latter, as another test shows
        original.load_state_dict(weights)
        rng = torch.Generator().manual_seed(1)
        only(original, block, sub, lambda t, s, n=transform, r=rng: TRANSFORMS[n].apply(t, s, r))
        moved = change(logits(original), before)
        usable += reason is None
        assert moved < 1e-5 if reason is None else moved > 1e-4, f"{transform}: {reason}: changed by {moved:.1e}"
        assert any(not torch.equal(v, weights[k]) for k, v in original.state_dict().items())
    free = [axis for axis in sub.mixer.axes.values() if not axis.fixed and axis.name != "resid"]
    assert bool(usable) == bool(free) and reasons["permute_one_tensor"] is not None


@pytest.mark.parametrize("name, i", CONFIGS)
def test_clustering_permutes_exactly(name: str, i: int, build) -> None:
    model = build(name, ARCHITECTURES[name].tiny[i])
    before, rng, done = logits(model), torch.Generator().manual_seed(2), []

    def apply(tensors, block):
        for sub in block.sublayers:
            if "H" in sub.mixer.sizes:
                sizes = sub.mixer.sizes
                magnitude = torch.rand(sizes["H"], sizes["P"], generator=rng)
                done.append(sub)
                tensors = permute(tensors, sub, sort_and_cluster(magnitude, sizes["G"], 2, 4).permutations)
        return tensors

    each_block(model, apply)
    assert change(logits(model), before) < 1e-5
    assert bool(done) == any(s.mixer.scan and s.mixer.scan.family == "ssd" for _, s in kinds(name, i))


@pytest.mark.parametrize("name, i, block, sub", SUBLAYERS)
def test_permutations_that_cross_a_class_are_refused(name: str, i: int, block: BlockSpec, sub: Sublayer) -> None:
    for axis in sub.mixer.axes.values():
        order = torch.arange(axis.size).flip(0)
        if axis.fixed and axis.size > 1:
            with pytest.raises(ValueError, match="fixed order"):
                permute({}, sub, [Permutation(axis.name, order)])
        if axis.share and sub.mixer.axes[axis.share].size > 1:
            with pytest.raises(ValueError, match="must stay inside each"):
                permute({}, sub, [Permutation(axis.name, order)])


@pytest.mark.parametrize("name, i", CONFIGS)
def test_the_residual_stream_rotates_where_it_may(name: str, i: int, build) -> None:
    """Exact once the gains are folded; where the gains stay, or where the description says no, it is not."""
    for fold in (True, False):
        model = build(name, {**ARCHITECTURES[name].tiny[i], "tie_word_embeddings": False})
        spec = describe(model.config)
        model.load_state_dict(shared(model.state_dict(), spec))  # untied, what is shared would be too
        before = logits(model)
        obstacle = residual_rotation_obstacle(spec)
        rotation = residual_rotation(spec.d_model, 3)
        weights = model.state_dict()
        weights[f"{spec.embedding}.weight"] = rotation.columns(weights[f"{spec.embedding}.weight"]).float()
        gain = weights[f"{spec.final_norm}.weight"].double() + spec.final_gain_offset
        weights[f"{spec.head}.weight"] = rotation.columns(weights[f"{spec.head}.weight"] * gain).float()
        weights[f"{spec.final_norm}.weight"] = torch.full((spec.d_model,), 1 - spec.final_gain_offset)
        model.load_state_dict(weights)

        def apply(tensors, block, fold=fold, rotation=rotation):
            tensors = fold_norms(tensors, block.sublayers) if fold else tensors
            for sub in block.sublayers:
                tensors = rotate_residual(tensors, sub, rotation)
            return tensors

        each_block(model, apply)
        moved = change(logits(model), before)
        assert moved < 1e-5 if fold and obstacle is None else moved > 1e-3, f"{obstacle}: changed by {moved:.1e}"


D_MODELS = [192, 320, 48, 112, 92]
"""12 * 16, 20 * 16, 12 * 4, 28 * 4, and 92 of which no matrix is known: blocks of 4."""


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("size", D_MODELS)
@pytest.mark.parametrize("name", OWN)
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
