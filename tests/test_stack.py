"""Blocks that take a step together: they give what they give one by one, and only where they may."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import quamba
from quamba.decoding import Decoder
from quamba.modules import stack
from quamba.modules.mixer import Mixer
from quamba_kernels import OPS, testing_selective_stack
from quamba_kernels.backends.cuda import of_blocks
from quamba_kernels.cuda import int4_order
from quamba_kernels.cuda import selective_stack as selective
from quamba_kernels.cuda import stack as cuda
from quamba_kernels.registry import Backend
from quamba_kernels.testing import cases, change
from quamba_kernels.testing_stack import Sizes, draw


@pytest.fixture
def calls(monkeypatch):
    """How many layers each call of the op had; its torch body serves here what a GPU's kernel serves there."""
    seen = []

    def backend(block):
        def run(x, blocks, memories, **options):
            seen.append(len(blocks))
            return stack._joint(block).op.reference(x, blocks, memories, **options)

        return Backend("counted", run)

    monkeypatch.setattr(stack, "_backend", backend)
    monkeypatch.setattr(Mixer, "_fused", lambda self, op, *parts: op.candidates[-1])
    monkeypatch.setenv("QUAMBA_BACKEND", "torch")
    return seen


def logits(model, prompts, steps=4):
    """Of every step behind a prompt."""
    decoder = Decoder(model, capture=False)
    with torch.inference_mode():
        first = decoder.prefill(prompts).clone()
        return [first, *(decoder.step(prompts[:, t % prompts.shape[1]]).clone() for t in range(steps))]


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4a16"])
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_a_stack_gives_what_its_blocks_give(family, recipe, stock, calls, monkeypatch):
    folder = stock(recipe, family)
    prompts = torch.tensor([[3, 1, 4, 1, 5]])
    model = quamba.load(folder, device="cpu")[0]
    together = logits(model, prompts)
    layers = model.config.num_hidden_layers
    assert calls == [layers] * 4
    monkeypatch.setattr(stack, "_backend", lambda block: None)
    alone = logits(quamba.load(folder, device="cpu")[0], prompts)
    assert len(calls) == 4
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("family, role", [
    ("mamba", "in_proj"), ("mamba", "dt_proj"), ("mamba", "out_proj"), ("mamba2", "in_proj"), ("mamba2", "out_proj"),
])  # fmt: skip
def test_what_is_not_one_token_of_one_sequence_goes_block_by_block(family, role, stock, calls):
    model = quamba.load(stock("w4a8", family), device="cpu")[0]
    assert len(logits(model, torch.tensor([[3, 1, 4], [1, 5, 9]]))) == 5 and calls == []
    decoder = Decoder(model, capture=False)
    seen = []
    with torch.inference_mode():
        decoder.prefill(torch.tensor([[3, 1, 4]]))
        decoder.step(torch.tensor([1]))
        assert len(calls) == 1
        first = stack._mixer(decoder._stacks[0].blocks[0])
        first.linear(role).input.peek = seen.append
        decoder.step(torch.tensor([5]))
    assert len(calls) == 1 and seen


@pytest.mark.parametrize("part", ["", "mixer", "mixer.in_proj", "mixer.x_proj", "mixer.out_proj"])
def test_what_has_a_hook_is_called(part, stock, calls):
    """What it sees and what it changes are those of its block."""
    prompts = torch.tensor([[3, 1, 4]])
    plain = logits(quamba.load(stock("w4a8", "mamba"), device="cpu")[0], prompts)
    count = len(calls)
    model = quamba.load(stock("w4a8", "mamba"), device="cpu")[0]
    block = model.backbone.layers[0]
    seen = []
    handle = block.get_submodule(part).register_forward_hook(lambda module, args, y: seen.append(y) or 2 * y)
    assert len(logits(model, prompts)) == 5 and len(seen) == 5 and len(calls) == count
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(logits(model, prompts), plain, strict=True))
    assert len(seen) == 5 and len(calls) == 2 * count


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_a_model_that_is_bound_again_steps_with_what_it_has_then(family, stock, calls):
    model = quamba.load(stock("w4a8", family), device="cpu")[0]
    decoder = Decoder(model, capture=False)
    with torch.inference_mode():
        decoder.prefill(torch.tensor([[3, 1, 4]]))
        decoder.step(torch.tensor([1]))
        before = decoder._stacks[0]._constants
        decoder.step(torch.tensor([1]))
        assert decoder._stacks[0]._constants is before
        model.state_dict()  # unbinds
        decoder.step(torch.tensor([1]))
        assert decoder._stacks[0]._constants is not before and len(calls) == 3
        for linear in stack._joint(decoder._stacks[0].blocks[1]).linears(stack._mixer(decoder._stacks[0].blocks[1])):
            before = decoder._stacks[0]._constants
            linear.unbind()
            decoder.step(torch.tensor([1]))
            assert decoder._stacks[0]._constants is not before


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_blocks_of_one_kind_stand_together(family, stock, calls):
    model = quamba.load(stock("w4a8", family), device="cpu")[0]
    found = stack.stacks_of(model)
    assert [len(s.blocks) for s in found] == [model.config.num_hidden_layers]
    with stack.joined(found):
        assert all(block.stack is found[0] for block in found[0].blocks)
    assert all(block.stack is None for block in found[0].blocks)


def test_blocks_that_differ_do_not(stock, calls):
    model = quamba.load(stock("w4a8", "mamba"), device="cpu")[0]
    first, *rest = (block for s in stack.stacks_of(model) for block in s.blocks)
    assert rest
    first.mixer.dt_proj.input.spec = first.mixer.dt_proj.input.spec.model_copy(update={"scale": "static"})
    assert all(first not in s.blocks for s in stack.stacks_of(model))


@pytest.mark.parametrize("family, module", [("mamba", selective), ("mamba2", cuda)])
@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4a16"])
def test_a_backend_is_asked_about_the_sizes_of_the_blocks(recipe, family, module, stock, monkeypatch):
    asked, problems = [], []

    def why_not(setting):
        asked.append(setting.shape)
        return None if setting.shape["residual_bits"] == 32 else "other residuals"

    model = quamba.load(stock(recipe, family), device="cpu")[0]
    block = model.backbone.layers[0]
    op = stack._joint(block).op
    monkeypatch.setattr(op, "backends", [Backend("kernel", op.reference, why_not)])
    monkeypatch.setattr(Mixer, "_fused", lambda self, op, *parts: op.candidates[-1])
    [found] = stack.stacks_of(model)
    assert found.backend.name == "kernel" and len(found.blocks) == model.config.num_hidden_layers

    def serves(name, problem):
        problems.append((name, problem))
        return True

    monkeypatch.setattr(module, "D_STATE", asked[0]["N"])
    monkeypatch.setattr(module, "library", lambda index: SimpleNamespace(serves=serves))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert module.why_not(asked[0], torch.float16) is None
    [(name, problem)] = problems
    assert name == f"quamba_{op.name}_{recipe}_serves"
    into = stack._mixer(block).linear("in_proj")
    assert model.config.hidden_size == problem.D and problem.mixer.block == block.mixer.block
    assert (0 if recipe == "w8a8" else into.features // into._weights[1].shape[-1]) == problem.S
    assert block.mixer.conv_channels["x"] == problem.mixer.H * problem.mixer.P
    assert problem.mixer.state_type == {"float16": 1, "int8": 3}[block.mixer.state_spec.dtype]
    if family == "mamba":
        assert model.config.time_step_rank == problem.R

    for forced, number in (("kernel", 1), ("torch", 0), ("triton", 0)):
        monkeypatch.setenv("QUAMBA_BACKEND", f"{op.name}={forced}")
        assert len(stack.stacks_of(model)) == number, forced
    parts = {"mamba": ("linear_w8a8", "conv_decode", "selective_decode"), "mamba2": ("ssd_decode",)}[family]
    for part in (f"linear_{recipe}", "norm_linear", *parts):
        monkeypatch.setenv("QUAMBA_BACKEND", f"{part}=torch")
        assert stack.stacks_of(model) == [], part
    monkeypatch.setenv("QUAMBA_BACKEND", "ssd_scan=torch,selective_scan=torch")  # of prompts
    assert len(stack.stacks_of(model)) == 1
    monkeypatch.delenv("QUAMBA_BACKEND")
    for part in model.backbone.layers:
        part.residual_dtype = torch.float16
    assert stack.stacks_of(model) == []


SIZES = Sizes(256, 4, 64, 1, 128, 1, 256)
SELECTIVE = testing_selective_stack.Sizes(256, 512, 16, 16, 512)


@pytest.fixture
def launches(launches_of):
    return launches_of(cuda, cuda.QuambaStackLayer)


def launch(drawn, linear="linear_w4a8", x=None, dtype=torch.float16, groups=SIZES.norm_groups):
    x = torch.zeros(1, SIZES.D) if x is None else x
    kept = [[t for t in tensors if t is not None] for tensors in zip(*(m for _, m in drawn), strict=True)]
    constants = cuda.flatten([b for b, _ in drawn])
    return cuda.ssd_stack(x, constants, *kept, linear, 1e-5, 1e-6, 0.0, 1.0, groups, SIZES.block, dtype)


@pytest.mark.parametrize("linear", ["linear_w8a8", "linear_w4a8", "linear_w4a16"])
def test_all_layers_reach_one_launch(linear, launches):
    rng = torch.Generator().manual_seed(0)
    drawn = [draw(linear, rng, SIZES, torch.float16, torch.int8, noisy=True) for _ in range(3)]
    if linear == "linear_w4a16":
        drawn = list(zip(of_blocks(int4_order.ordered)(tuple(b for b, _ in drawn)), (m for _, m in drawn), strict=True))
    assert launch(drawn, linear).shape == (1, SIZES.D)
    [(name, problem, layer)] = launches
    block, memory = drawn[0]
    assert name == f"quamba_ssd_stack_{linear.removeprefix('linear_')}"
    assert (problem.count, problem.D, problem.S) == (3, SIZES.D, 0 if linear == "linear_w8a8" else 128)
    assert (problem.mixer.H, problem.mixer.channels, problem.mixer.state_type) == (4, 512, 3)
    assert getattr(layer, "in").w == block.in_weights[0].data_ptr() and layer.out.w == block.out_weights[0].data_ptr()
    assert layer.state == memory.state.data_ptr() and layer.rng == memory.rng.data_ptr()
    assert layer.gate_weight == block.gate_weight.data_ptr()
    assert layer.conv_state == memory.conv_state.data_ptr() and layer.out.bias == block.out_bias.data_ptr()


def test_layers_that_differ_are_refused(launches):
    rng = torch.Generator().manual_seed(0)
    first = block, memory = draw("linear_w4a8", rng, SIZES, torch.float16, torch.int8)
    for other, message in (
        (draw("linear_w4a8", rng, SIZES, torch.float16, torch.float16), "come with"),
        (draw("linear_w4a8", rng, SIZES, torch.float16, torch.int8, static=False), "same types"),
        (draw("linear_w4a8", rng, SIZES, torch.float16, torch.int8, gains=False), "same types"),
        (draw("linear_w4a8", rng, SIZES._replace(H=8), torch.float16, torch.int8), "same sizes"),
        (draw("linear_w8a8", rng, SIZES, torch.float16, torch.int8), "tensors of weights"),
        ((block._replace(A=block.A[:2].clone()), memory), "A has to be"),
        ((block, memory._replace(conv_state=memory.conv_state.expand(2, -1, -1))), "conv_state has to be"),
    ):
        with pytest.raises(ValueError, match=message):
            launch([first, other])
    with pytest.raises(ValueError, match="one token of float32"):
        launch([first], x=torch.zeros(2, SIZES.D))
    with pytest.raises(ValueError, match="one token of float32"):
        launch([first], x=torch.zeros(1, SIZES.D, dtype=torch.float16))
    with pytest.raises(TypeError):
        launch([first], dtype=torch.bfloat16)
    two = memory._replace(state=torch.cat([memory.state] * 2), state_scale=torch.cat([memory.state_scale] * 2))
    with pytest.raises(ValueError, match="state has to be"):
        launch([(block, two)])
    assert launches == []


def test_a_gain_without_a_norm_is_refused(launches):
    """The kernel multiplies by it where it normalises."""
    drawn = draw("linear_w4a8", torch.Generator().manual_seed(0), SIZES, torch.float16, torch.int8)
    assert launch([drawn], groups=1).shape == (1, SIZES.D) and len(launches) == 1
    with pytest.raises(ValueError, match="gate_weight"):
        launch([drawn], groups=0)
    assert len(launches) == 1


@pytest.mark.parametrize("name", ["ssd_stack", "selective_stack"])
def test_without_data_a_stack_gives_a_residual_stream(name):
    backend = next(b for b in OPS[name].backends if b.name == "cuda")
    for case in cases(name)[:3]:
        with FakeTensorMode():
            args = change(case.args, lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"))
            y = backend(*args, **case.kwargs)
        assert (y.shape, y.dtype, y.device.type) == (case.args[0].shape, torch.float32, "cuda")


@pytest.mark.parametrize("changes, reason", [
    ({"N": 64}, "d_state"), ({"W": 3}, "taps"), ({"residual_bits": 16}, "32 bits"), ({"state_bits": 32}, "8 or 16"),
    ({"codes": 0}, "where the linears"), ({"codes": -1}, "where the linears"), ({"D": 320}, "no stack of 1 layers"),
    ({}, None),
])  # fmt: skip
@pytest.mark.parametrize("module, sizes", [(cuda, SIZES), (selective, SELECTIVE)], ids=["ssd", "selective"])
def test_sizes_that_the_kernel_does_not_take(module, sizes, changes, reason, monkeypatch):
    asked = []

    def serves(name, problem):
        mixer, rank = problem.mixer, getattr(problem, "R", 0)
        asked.append((name, mixer.state_type, mixer.conv_state_type, problem.S, rank))
        return problem.D % 128 == 0

    monkeypatch.setattr(module, "library", lambda index: SimpleNamespace(serves=serves))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    said = module.why_not({**sizes.shape("linear_w4a8", torch.int8), **changes}, torch.float16)
    assert said is None if reason is None else reason in said
    assert len(asked) == (reason is None or "no stack" in reason)
    kernel = "ssd_stack" if module is cuda else "selective_stack"
    assert all(call == (f"quamba_{kernel}_w4a8_serves", 3, 3, 128, getattr(sizes, "R", 0)) for call in asked)


def test_mixers_in_floats_go_block_by_block(monkeypatch):
    """Float linears have no op of a stack, and a forced backend that has none serves the blocks."""
    from transformers import AutoConfig

    from quamba.bench import materialise
    from quamba.models import ARCHITECTURES
    from quamba.recipe import parse_recipe

    monkeypatch.setattr(Mixer, "_fused", lambda self, op, *parts: op.candidates[-1])
    config = AutoConfig.for_model("mamba2", **ARCHITECTURES["mamba2"].tiny[0])
    recipe = parse_recipe({"linears": {"default": {"format": "float"}}}, "floats")
    model = materialise.build(config, recipe, torch.float32, torch.device("cpu"))
    assert stack.stacks_of(model) == []
    assert len(logits(model, torch.tensor([[3, 1, 4]]))) == 5
