"""Stacks of blocks in one launch, at sizes of models, against the torch body."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

from quamba_kernels import OPS, Setting, testing_selective_stack, testing_stack
from quamba_kernels.ops.stack import BlockMemory
from quamba_kernels.testing import Case, change, disagreement, flat, outcome

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
pytestmark = [needs_gpu, pytest.mark.usefixtures("poison")]
LINEARS = ("linear_w8a8", "linear_w4a8", "linear_w4a16")
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 8e-3}


class Family(NamedTuple):
    """op; draw: of a block; options: of the op beside linear, eps, block and in_dtype; models, the smallest first and
    one of 64 layers second."""

    op: str
    draw: Callable[..., tuple[Any, Any]]
    options: Callable[[Any], dict[str, Any]]
    models: dict[str, Any]


FAMILIES = {
    "mamba1": Family("selective_stack", testing_selective_stack.draw, lambda sizes: {}, {
        "130m": testing_selective_stack.Sizes(768, 1536, 48, 16, 1536),
        "2.8b": testing_selective_stack.Sizes(2560, 5120, 160, 16, 5120),
        "1.4b": testing_selective_stack.Sizes(2048, 4096, 128, 16, 4096),
    }),
    "mamba2": Family("ssd_stack", testing_stack.draw, lambda s: {"gate_eps": 1e-5, "norm_groups": s.norm_groups}, {
        "130m": testing_stack.Sizes(768, 24, 64, 1, 128, 1, 1536),
        "2.7b": testing_stack.Sizes(2560, 80, 64, 1, 128, 1, 5120),
        "8b": testing_stack.Sizes(4096, 128, 64, 8, 128, 8, 8192),
    }),
}  # fmt: skip
MODELS = [(family, model) for family, found in FAMILIES.items() for model in found.models]


def kernel(family: str, shape=None, dtype=torch.float16):
    backend = next(b for b in OPS[FAMILIES[family].op].candidates if b.name == "cuda")
    reason = backend.why_not(Setting("cuda", dtype, shape or {}))
    if reason is not None:
        pytest.skip(reason)
    return backend


def case(family: str, model: str, linear: str, dtype=torch.float16, kind=torch.int8, layers=1, seed=0, **how) -> Case:
    _, draw, options, models = FAMILIES[family]
    rng, sizes = torch.Generator().manual_seed(seed), models[model]
    drawn = [draw(linear, rng, sizes, dtype, kind, **how) for _ in range(layers)]
    given = {"linear": linear, "eps": 1e-5, "block": sizes.block, "in_dtype": dtype, **options(sizes)}
    x = torch.randn(1, sizes.D, generator=rng)
    shape = sizes.shape(linear, kind)
    return Case("", (x, tuple(b for b, _ in drawn), tuple(m for _, m in drawn)), given, shape, dtype, 1)


@pytest.mark.parametrize("family, model", MODELS)
@pytest.mark.parametrize("linear", LINEARS)
def test_a_block_agrees_with_the_torch_body(linear: str, family: str, model: str) -> None:
    for seed, (dtype, kind, how) in enumerate((
        (torch.float16, torch.int8, {"noisy": True}), (torch.bfloat16, torch.int8, {"static": False}),
        (torch.float16, torch.float16, {"gains": False}), (torch.bfloat16, torch.float16, {}),
    )):  # fmt: skip
        given = case(family, model, linear, dtype, kind, seed=seed, **how)
        want = outcome(OPS[FAMILIES[family].op].candidates[-1], given)
        difference = disagreement(outcome(kernel(family, given.shape, dtype), given, "cuda"), want, TOLERANCE[dtype])
        assert difference is None, f"{dtype} {kind} {how}: {difference}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("linear", LINEARS)
def test_layers_follow_each_other(linear: str, family: str) -> None:
    """Against the chain of the other kernels; 70 layers are more than one launch takes."""
    for model, layers in zip(FAMILIES[family].models, (70, 3), strict=False):
        given = case(family, model, linear, layers=layers, noisy=True)
        args = change(given.args, lambda t: t.cuda())
        x, blocks, memories = args
        want_memories = change(memories, torch.clone)
        run = kernel(family)
        got = run(x, run.prepack(blocks), memories, **given.kwargs)
        for block, memory in zip(blocks, want_memories, strict=True):
            x = OPS[FAMILIES[family].op](x, (block,), (memory,), **given.kwargs)
        for label, a, b in (("y", got, x), *remembered(memories, want_memories)):
            distance = float((a - b).norm() / b.norm())
            assert distance < 2e-2, f"{model} {layers} {label}: {distance}"
        for a, b in zip(flat(memories), flat(want_memories), strict=True):
            if a.dtype == torch.int64:
                assert torch.equal(a, b)


def remembered(got: tuple[BlockMemory, ...], want: tuple[BlockMemory, ...]) -> Iterator[tuple[str, Any, Any]]:
    """States, as values, and windows of each layer of both."""
    for layer, (a, b) in enumerate(zip(got, want, strict=True)):
        states = (m.state.float() * (1 if m.state_scale is None else m.state_scale[..., None]) for m in (a, b))
        yield f"state {layer}", *states
        yield f"window {layer}", a.conv_state.float(), b.conv_state.float()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("linear", LINEARS)
def test_the_same_bits_every_time_and_in_a_captured_graph(linear: str, family: str) -> None:
    run, given = kernel(family), case(family, list(FAMILIES[family].models)[1], linear, layers=2)
    first = outcome(run, given, "cuda")
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, outcome(run, given, "cuda"), strict=True))
    args = change(given.args, lambda t: t.cuda())
    blocks = run.prepack(args[1])
    run(args[0], blocks, args[2], **given.kwargs)
    graph, fresh = torch.cuda.CUDAGraph(), change(given.args, lambda t: t.cuda())
    with torch.cuda.graph(graph):
        y = run(args[0], blocks, args[2], **given.kwargs)
    for a, b in zip(flat(args), flat(fresh), strict=True):
        a.copy_(b)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a.cpu(), b) for a, b in zip([y, *flat(args)], first, strict=True))


def test_what_is_no_number_comes_through() -> None:
    """Blocks would wait for good for sums that count it."""
    given = case("mamba1", "130m", "linear_w4a16", kind=torch.float16)
    x, blocks, memories = change(given.args, lambda t: t.cuda())
    memories[0].conv_state[0, 0, 5] = float("nan")
    memories[0].state[0, 9, 1] = float("inf")
    run = kernel("mamba1")
    assert not run(x, run.prepack(blocks), memories, **given.kwargs).isfinite().any()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_kernel_would_misread_is_refused(family: str) -> None:
    run, given = kernel(family), case(family, "130m", "linear_w4a8")
    x, blocks, memories = change(given.args, lambda t: t.cuda())
    with pytest.raises(ValueError, match="one token"):
        run(x.expand(2, -1), blocks, memories, **given.kwargs)
    with pytest.raises(ValueError, match="same types"):
        run(x, (blocks[0], blocks[0]._replace(out_scale=None)), memories * 2, **given.kwargs)
    with pytest.raises(ValueError, match="contiguous"):
        across = memories[0].state.transpose(1, 2).contiguous().transpose(1, 2)
        run(x, blocks, (memories[0]._replace(state=across),), **given.kwargs)
    with pytest.raises(RuntimeError, match="does not serve"):
        run(x, (blocks[0]._replace(B_scale=None),), memories, **given.kwargs)
