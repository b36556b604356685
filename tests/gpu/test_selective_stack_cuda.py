"""A stack of Mamba1 blocks in one launch, at sizes of models, against the torch body."""

import pytest
import torch

from quamba_kernels import OPS, Setting, ops
from quamba_kernels.testing import Case, change, disagreement, flat, outcome
from quamba_kernels.testing_selective_stack import Sizes, draw

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
pytestmark = [needs_gpu, pytest.mark.usefixtures("poison")]
LINEARS = ("linear_w8a8", "linear_w4a8", "linear_w4a16")
MODELS = {
    "130m": Sizes(768, 1536, 48, 16, 1536),
    "1.4b": Sizes(2048, 4096, 128, 16, 4096),
    "2.8b": Sizes(2560, 5120, 160, 16, 5120),
}
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 8e-3}


def kernel(shape=None, dtype=torch.float16):
    backend = next(b for b in OPS["selective_stack"].candidates if b.name == "cuda")
    reason = backend.why_not(Setting("cuda", dtype, shape or {}))
    if reason is not None:
        pytest.skip(reason)
    return backend


def case(linear: str, sizes: Sizes, dtype=torch.float16, kind=torch.int8, layers=1, seed=0, **how) -> Case:
    rng = torch.Generator().manual_seed(seed)
    drawn = [draw(linear, rng, sizes, dtype, kind, **how) for _ in range(layers)]
    options = {"linear": linear, "eps": 1e-5, "block": sizes.block, "in_dtype": dtype}
    x = torch.randn(1, sizes.D, generator=rng)
    shape = sizes.shape(linear, kind)
    return Case("", (x, tuple(b for b, _ in drawn), tuple(m for _, m in drawn)), options, shape, dtype)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("linear", LINEARS)
def test_a_block_agrees_with_the_torch_body(linear: str, model: str) -> None:
    for seed, (dtype, kind, how) in enumerate((
        (torch.float16, torch.int8, {"noisy": True}), (torch.bfloat16, torch.int8, {"static": False}),
        (torch.float16, torch.float16, {"gains": False}), (torch.bfloat16, torch.float16, {}),
    )):  # fmt: skip
        given = case(linear, MODELS[model], dtype, kind, seed=seed, **how)
        want = outcome(OPS["selective_stack"].candidates[-1], given)
        difference = disagreement(outcome(kernel(given.shape, dtype), given, "cuda"), want, TOLERANCE[dtype])
        assert difference is None, f"{dtype} {kind} {how}: {difference}"


@pytest.mark.parametrize("linear", LINEARS)
def test_layers_follow_each_other(linear: str) -> None:
    """Against the chain of the other kernels; 70 layers are more than one launch takes."""
    for model, layers in (("130m", 70), ("2.8b", 3)):
        given = case(linear, MODELS[model], layers=layers, kind=torch.int8, noisy=True)
        args = change(given.args, lambda t: t.cuda())
        x, blocks, memories = args
        want_memories = change(memories, torch.clone)
        got = kernel()(*args, **given.kwargs)
        for block, memory in zip(blocks, want_memories, strict=True):
            x = ops.selective_stack(x, (block,), (memory,), **given.kwargs)
        distance = float((got - x).norm() / x.norm())
        assert distance < 2e-2, f"{model} {layers}: {distance}"
        for a, b in zip(flat(memories), flat(want_memories), strict=True):
            if a.dtype == torch.int64:
                assert torch.equal(a, b)


def test_the_same_bits_every_time_and_in_a_captured_graph() -> None:
    for linear in LINEARS:
        given = case(linear, MODELS["2.8b"], layers=2)
        first = outcome(kernel(), given, "cuda")
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(first, outcome(kernel(), given, "cuda"), strict=True))
        args = change(given.args, lambda t: t.cuda())
        kernel()(*args, **given.kwargs)
        graph, fresh = torch.cuda.CUDAGraph(), change(given.args, lambda t: t.cuda())
        with torch.cuda.graph(graph):
            y = kernel()(*args, **given.kwargs)
        for a, b in zip(flat(args), flat(fresh), strict=True):
            a.copy_(b)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a.cpu(), b) for a, b in zip([y, *flat(args)], first, strict=True)), linear


def test_what_is_no_number_comes_through() -> None:
    """Blocks would wait for good for sums that count it."""
    given = case("linear_w4a16", MODELS["130m"], kind=torch.float16)
    x, blocks, memories = change(given.args, lambda t: t.cuda())
    memories[0].conv_state[0, 0, 5] = float("nan")
    memories[0].state[0, 9, 1] = float("inf")
    assert not kernel()(x, blocks, memories, **given.kwargs).isfinite().any()


def test_what_the_kernel_would_misread_is_refused() -> None:
    given = case("linear_w4a8", MODELS["130m"])
    x, blocks, memories = change(given.args, lambda t: t.cuda())
    with pytest.raises(ValueError, match="one token"):
        kernel()(x.expand(2, -1), blocks, memories, **given.kwargs)
    with pytest.raises(ValueError, match="same types"):
        kernel()(x, (blocks[0], blocks[0]._replace(out_scale=None)), memories * 2, **given.kwargs)
    with pytest.raises(ValueError, match="contiguous"):
        across = memories[0].state.transpose(1, 2).contiguous().transpose(1, 2)
        kernel()(x, blocks, (memories[0]._replace(state=across),), **given.kwargs)
    with pytest.raises(RuntimeError, match="does not serve"):
        kernel()(x, (blocks[0]._replace(B_scale=None),), memories, **given.kwargs)
