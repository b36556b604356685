"""Quantised modules: types, storage, caches, padding, pieces; every stock recipe on every architecture."""

import gc

import pytest
import torch

import quamba
from architectures import OWN
from quamba.models import describe
from quamba.modules.block import RecurrentBlock
from quamba.modules.embedding import Embedding
from quamba.modules.lowbit import LowBit
from quamba.modules.selective import SelectiveMixer
from quamba.modules.ssd import SSDMixer
from quamba.modules.state import RecurrentState, reset
from quamba.recipe import StorageSpec, parse_recipe, stock_recipes
from quamba_kernels import OPS, Backend, ops
from quamba_kernels.ops.state import load_state

PAIRS = [(recipe, name) for recipe in stock_recipes() for name in OWN]
FUSED = ("ssd_decode", "selective_decode", "conv_decode")
IDS = torch.randint(1, 96, (2, 24), generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture
def model(stock, request: pytest.FixtureRequest):
    return quamba.load(stock(*request.param), device="cpu", dtype=torch.float32)[0]


over_stock = pytest.mark.parametrize("model", PAIRS, indirect=True, ids=["-".join(p) for p in PAIRS])


def run(model, ids: torch.Tensor, **kwargs):
    with torch.inference_mode():
        return model(ids, use_cache=True, **kwargs)


def change(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def states(out) -> list[RecurrentState]:
    assert all(isinstance(layer, RecurrentState) for layer in out.cache_params.layers)
    return out.cache_params.layers


def copied(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@over_stock
def test_running_leaves_the_stored_tensors(model) -> None:
    before = copied(model)
    for tokens in (24, 1):
        run(model, IDS[:, :tokens])
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) and before[n].dtype == after[n].dtype for n in before)


@over_stock
def test_types_of_codes_and_scales_stay(model) -> None:
    before = copied(model)
    exact = run(model, IDS).logits
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model.to(dtype)
        assert model.dtype == dtype
        got = run(model, IDS).logits
        # 0.15: the error of 16-bit activations passes int8 sites, where it may move a code
        assert change(got, exact) < 0.15
        for name, tensor in model.state_dict().items():
            if name.endswith("scale") or not before[name].is_floating_point():
                assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
            else:
                assert tensor.dtype == dtype, name
    for block in (m for m in model.modules() if isinstance(m, RecurrentBlock)):
        for cast, dtype in ((block.half, torch.float16), (block.float, torch.float32)):
            cast()
            assert {m.dtype for m in block.modules() if isinstance(m, LowBit)} == {dtype}
            assert all(t.dtype == dtype for t in block.parameters())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if n.endswith(("scale", "packed")))


def test_scales_are_float_whatever_the_default_type(stock) -> None:
    for pair in PAIRS:
        model, _ = quamba.load(stock(*pair), device="cpu", dtype=torch.bfloat16)
        kinds = {n: t.dtype for n, t in model.state_dict().items() if n.endswith("scale")}
        # the group scales of w4a16 are fp16 as in compressed-tensors
        assert kinds and set(kinds.values()) <= {torch.float32, torch.float16}
        assert all(kind == torch.float32 or n.endswith("weight_scale") for n, kind in kinds.items())


@over_stock
def test_decode_keeps_its_memory(model) -> None:
    out = run(model, IDS)
    pointers = [(s.conv.data_ptr(), s.recurrent.data_ptr()) for s in states(out)]
    sizes, live = [s.bytes for s in states(out)], []
    for t in range(8):
        out = run(model, IDS[:, t : t + 1], cache_params=out.cache_params)
        assert out.logits.isfinite().all()
        if t in (1, 7):
            gc.collect()
            live.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    assert [(s.conv.data_ptr(), s.recurrent.data_ptr()) for s in states(out)] == pointers
    assert [s.bytes for s in states(out)] == sizes
    assert live[0] == live[1], f"live tensors after 2 and 8 tokens: {live}"


@over_stock
def test_a_fused_decode_step_equals_the_chain_of_ops(model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUAMBA_BACKEND", "torch")
    chained, calls = [run(model, IDS)], []
    for t in range(4):
        chained.append(run(model, IDS[:, t : t + 1], cache_params=chained[0].cache_params))
    monkeypatch.delenv("QUAMBA_BACKEND")
    for name, op in OPS.items():

        def body(*args, op=op, **kwargs):
            calls.append(op.name)
            return op.reference(*args, **kwargs)

        monkeypatch.setattr(op, "backends", [Backend("fused", body)] if name in FUSED else [])
    for module in model.modules():
        if isinstance(module, LowBit):
            module.unbind()
    fused = [run(model, IDS)]
    assert not calls
    for t in range(4):
        fused.append(run(model, IDS[:, t : t + 1], cache_params=fused[0].cache_params))
    blocks = sum(isinstance(module, RecurrentBlock) for module in model.modules())
    assert len(calls) == 4 * blocks * len(set(calls))
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(fused, chained, strict=True))
    for a, b in zip(states(fused[0]), states(chained[0]), strict=True):
        assert torch.equal(a.conv, b.conv) and torch.equal(a.recurrent, b.recurrent)


@over_stock
def test_left_padding_changes_nothing(model) -> None:
    alone, pad = run(model, IDS[:1, :9]), 7
    ids = torch.cat([torch.zeros(1, pad, dtype=torch.long), IDS[:1, :9]], 1)
    mask = (torch.arange(9 + pad) >= pad).long()[None]
    padded = run(model, torch.cat([ids, IDS[1:, : 9 + pad]]), attention_mask=torch.cat([mask, torch.ones_like(mask)]))
    # 1e-3: products of other shapes round differently, which int8 sites can turn into another code
    assert change(padded.logits[:1, pad:], alone.logits) < 1e-3
    for a, b in zip(states(padded), states(alone), strict=True):
        assert change(a.value()[:1], b.value()) < 2e-2  # within a code of a stored state


@over_stock
def test_beams_and_resets(model) -> None:
    out = run(model, IDS)
    order = torch.tensor([1, 0, 1])
    before = [(s.conv.clone(), s.value().clone()) for s in states(out)]
    out.cache_params.reorder_cache(order)
    for state, (conv, value) in zip(states(out), before, strict=True):
        assert torch.equal(state.conv, conv[order]) and torch.equal(state.value(), value[order])
    twice = run(model, torch.full((3, 1), 5), cache_params=out.cache_params).logits
    assert change(twice[0], twice[2]) < 0.02  # the same beam; stochastic rounding comes after the output
    cache, fresh = run(model, IDS).cache_params, run(model, IDS)
    for forget in (cache.reset, lambda: reset([cache])):
        with torch.inference_mode():
            forget()
        assert not any(state.filled or state.conv.any() for state in cache.layers)
        again = run(model, IDS, cache_params=cache)
        assert torch.equal(again.logits, fresh.logits)
        for a, b in zip(states(again), states(fresh), strict=True):  # rounded by the same draws
            assert torch.equal(a.conv, b.conv) and torch.equal(a.recurrent, b.recurrent)


@pytest.mark.parametrize("state", ["float32", "float16", "int8"])
@pytest.mark.parametrize("recipe", ["float", "w8a8"])
@pytest.mark.parametrize("name", OWN)
def test_prefill_in_pieces_equals_the_whole(name: str, recipe: str, state: str, tiny_checkpoint, quantise) -> None:
    policy = {"state": {"dtype": state}, "conv": {"bits": 8 if recipe == "w8a8" else 16}}
    if recipe != "float":
        policy |= {
            "linears": {"default": {"format": recipe, "method": "rtn"}},
            "activations": {"conv_input": {}, "gate": {}, "scan_x": {}, "scan_b": {}, "scan_c": {}},
        }
    folder, _ = tiny_checkpoint(name)
    model, _ = quamba.load(quantise(folder, parse_recipe(policy, "pieces")), device="cpu", dtype=torch.float32)
    whole = run(model, IDS)
    for cut in (1, 2, 13, 23):
        first = run(model, IDS[:, :cut])
        second = run(model, IDS[:, cut:], cache_params=first.cache_params)
        got = torch.cat([first.logits, second.logits], 1)
        # the carried state is rounded once; a float one only by the order of sums, which can move int8 codes
        limit = {"float32": 1e-5 if recipe == "float" else 5e-3, "float16": 1e-2, "int8": 3e-2}[state]
        assert change(got, whole.logits) < limit
        for a, b in zip(states(second), states(whole), strict=True):
            assert change(a.value(), b.value()) < max(limit, {"float32": 0, "float16": 1e-3, "int8": 5e-2}[state])


def rounded(h: torch.Tensor, seed: int | None, step: int = 0) -> torch.Tensor:
    codes, scale = torch.zeros(h.shape, dtype=torch.int8), torch.zeros(h.shape[:-1])
    rng = None if seed is None else torch.tensor([seed, step])
    ops.quantize_state(h, codes, scale, rng)
    assert rng is None or rng.tolist() == [seed, step + 1]
    return load_state(codes, scale)


def test_stochastic_rounding_is_unbiased_and_seeded() -> None:
    h = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(1))
    scale = h.abs().amax(-1, keepdim=True) / 127
    runs = 2000
    for mean in (
        sum(rounded(h, seed) for seed in range(runs)) / runs,
        sum(rounded(h, 7, step) for step in range(runs)) / runs,
    ):
        bias = ((mean - h) / scale).abs()
        # a code is off by less than 1 with a deviation of at most 0.5: 5 deviations of the mean of 2000
        assert bias.max() < 5 * 0.5 / runs**0.5 and bias.mean() < 0.015
    assert ((rounded(h, 3) - h).abs() <= scale * 1.0001).all()
    assert torch.equal(rounded(h, 3), rounded(h, 3))
    assert not torch.equal(rounded(h, 3), rounded(h, 4)) and not torch.equal(rounded(h, 3, 0), rounded(h, 3, 1))
    assert ((rounded(h, None) - h).abs() <= 0.5001 * scale).all()


@pytest.mark.parametrize("name", OWN)
def test_runs_with_one_seed_agree(name: str, stock) -> None:
    drawn = []
    for _ in range(2):
        model, _ = quamba.load(stock("w8a8", name), device="cpu", dtype=torch.float32)
        out = run(model, IDS)
        for t in range(4):
            out = run(model, IDS[:, t : t + 1], cache_params=out.cache_params)
        drawn.append([out.logits, *(s.recurrent for s in states(out))])
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    assert all(s.rng is not None and s.rng[1] == 5 for s in states(out))
    assert len({int(s.rng[0]) for s in states(out)}) == len(states(out))  # layers draw apart


@pytest.mark.parametrize("bits", [8, 16])
def test_an_embedding_gives_the_residual_type_at_once(bits: int) -> None:
    """Rows of int8 are not rounded to the activations' type in between, whatever that is changed to."""
    table, ids = torch.randn(7, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([[3, 0, 6]])
    for out_dtype in (None, torch.float32):
        module = Embedding(7, 32, StorageSpec(bits=bits), dtype=torch.float32, out_dtype=out_dtype)
        module.fill(table)
        whole = module(ids)
        module.to(torch.bfloat16)
        got = module(ids)
        assert got.dtype == (out_dtype or torch.bfloat16)
        assert torch.equal(got, whole) == (bits == 8 and out_dtype is not None)
        assert torch.equal(got.to(torch.bfloat16), whole.to(torch.bfloat16))


@pytest.mark.parametrize("name", OWN)
def test_an_embedding_is_of_the_type_that_the_first_block_adds_to(stock, name: str) -> None:
    model = quamba.load(stock("w8a8", name), device="cpu", dtype=torch.bfloat16)[0]
    embedded = model.get_submodule(describe(model.config).embedding)(IDS)
    assert embedded.dtype == (torch.float32 if describe(model.config).residual_fp32 else torch.bfloat16)


def serve_alone(model, served: str, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One op has a backend, its torch body, which notes its calls; the others have theirs alone."""
    for name, op in OPS.items():

        def body(*args, op=op, **kwargs):
            calls.append(op.name)
            return op.reference(*args, **kwargs)

        monkeypatch.setattr(op, "backends", [Backend("fused", body)] if name == served else [])
    for module in model.modules():
        if isinstance(module, LowBit):
            module.unbind()


@over_stock
def test_a_fused_prompt_equals_the_chain_of_ops(model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUAMBA_BACKEND", "torch")
    chained, calls = run(model, IDS), []
    again = run(model, IDS[:, :5], cache_params=chained.cache_params).logits
    monkeypatch.delenv("QUAMBA_BACKEND")
    serve_alone(model, "selective_prefill", calls, monkeypatch)
    fused = run(model, IDS)
    assert torch.equal(fused.logits, chained.logits)
    assert torch.equal(run(model, IDS[:, :5], cache_params=fused.cache_params).logits, again)
    mixers = [m for m in model.modules() if isinstance(m, SelectiveMixer) and not m.norms]
    assert len(calls) == 2 * len(mixers)
    seen = []
    for hooked in (torch.nn.Module.register_forward_hook, torch.nn.Module.register_forward_pre_hook):
        hooks = [hooked(m.linear("dt_proj"), lambda *given: seen.append(1)) for m in mixers]
        run(model, IDS)
        for hook in hooks:
            hook.remove()
    assert len(seen) == len(calls) == 2 * len(mixers)
    for module in mixers:
        module.gate.peek = seen.append
    run(model, IDS)
    for module in mixers:
        module.gate.peek = None
    assert len(seen) == 3 * len(mixers) and len(calls) == 2 * len(mixers)
    for part in ("quantize", "linear_w8a8", "selective_scan", "gate_output"):
        monkeypatch.setenv("QUAMBA_BACKEND", f"{part}=torch")
        for module in mixers:
            module.unbind()
        assert torch.equal(run(model, IDS).logits, chained.logits) and len(calls) == 2 * len(mixers)


@over_stock
def test_a_prompt_convolved_and_scanned_in_one_op_equals_both(model, monkeypatch: pytest.MonkeyPatch) -> None:
    padding = (IDS > 10).long().sort(-1).values
    monkeypatch.setenv("QUAMBA_BACKEND", "torch")
    chained, calls, seen = run(model, IDS), [], []
    again = run(model, IDS[:, :5], cache_params=chained.cache_params).logits
    padded = run(model, IDS, attention_mask=padding).logits
    monkeypatch.delenv("QUAMBA_BACKEND")
    serve_alone(model, "ssd_prefill", calls, monkeypatch)
    mixers = [m for m in model.modules() if isinstance(m, SSDMixer)]
    fused = run(model, IDS)
    assert torch.equal(fused.logits, chained.logits) and len(calls) == len(mixers)
    assert torch.equal(run(model, IDS[:, :5], cache_params=fused.cache_params).logits, again)
    run(model, IDS[:, :1], cache_params=fused.cache_params)
    assert torch.equal(run(model, IDS, attention_mask=padding).logits, padded) and len(calls) == 2 * len(mixers)
    for module in mixers:
        module.conv_input.peek = seen.append
    run(model, IDS)
    for module in mixers:
        module.conv_input.peek = None
    assert len(seen) == len(mixers) and len(calls) == 2 * len(mixers)
    for part in ("causal_conv1d", "ssd_scan"):
        monkeypatch.setenv("QUAMBA_BACKEND", f"{part}=torch")
        for module in mixers:
            module.unbind()
        assert torch.equal(run(model, IDS).logits, chained.logits) and len(calls) == 2 * len(mixers)
