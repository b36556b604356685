"""What a stack of Mamba1 blocks is launched with, and what is refused; tests/test_stack.py has the joining."""

import pytest
import torch

from quamba_kernels.backends.cuda import of_blocks
from quamba_kernels.cuda import int4_order, stack
from quamba_kernels.cuda import selective_stack as cuda
from quamba_kernels.testing_selective_stack import Sizes, draw

SIZES = Sizes(256, 512, 16, 16, 512)


@pytest.fixture
def launches(launches_of):
    return launches_of(stack, cuda.QuambaSelectiveStackLayer)


def launch(drawn, linear="linear_w4a8", x=None, dtype=torch.float16):
    x = torch.zeros(1, SIZES.D) if x is None else x
    kept = [[t for t in tensors if t is not None] for tensors in zip(*(m for _, m in drawn), strict=True)]
    return cuda.selective_stack(x, stack.flatten([b for b, _ in drawn]), *kept, linear, 1e-5, SIZES.block, dtype)


@pytest.mark.parametrize("linear", ["linear_w8a8", "linear_w4a8", "linear_w4a16"])
def test_all_layers_reach_one_launch(linear, launches):
    rng = torch.Generator().manual_seed(0)
    drawn = [draw(linear, rng, SIZES, torch.float16, torch.int8, noisy=True) for _ in range(3)]
    if linear == "linear_w4a16":
        drawn = list(zip(of_blocks(int4_order.ordered)(tuple(b for b, _ in drawn)), (m for _, m in drawn), strict=True))
    assert launch(drawn, linear).shape == (1, SIZES.D)
    [(name, problem, layer)] = launches
    block, memory = drawn[0]
    assert name == f"quamba_selective_stack_{linear.removeprefix('linear_')}"
    sizes = problem.count, problem.D, problem.R, problem.S
    assert sizes == (3, SIZES.D, SIZES.R, 0 if linear == "linear_w8a8" else 128)
    assert (problem.mixer.H, problem.mixer.P, problem.mixer.channels, problem.mixer.state_type) == (512, 1, 512, 3)
    for of, weights in (("in", block.in_weights), ("x", block.x_weights), ("dt", block.dt_weights)):
        assert getattr(layer, of).w == weights[0].data_ptr()
    scale = 2 if linear == "linear_w4a8" else 1
    assert layer.out.w_scale == block.out_weights[scale].data_ptr()
    assert layer.dt.w_scale == block.dt_weights[1].data_ptr()
    assert layer.dt.bias == block.dt_bias.data_ptr() and layer.x.bias is None
    assert layer.state == memory.state.data_ptr() and layer.rng == memory.rng.data_ptr()
    assert layer.conv_state == memory.conv_state.data_ptr() and block.A.data_ptr() == layer.A
    assert layer.B_scale == (None if block.B_scale is None else block.B_scale.data_ptr())


def test_layers_that_differ_are_refused(launches):
    rng = torch.Generator().manual_seed(0)
    first = block, memory = draw("linear_w4a8", rng, SIZES, torch.float16, torch.int8)
    for other, message in (
        (draw("linear_w4a8", rng, SIZES, torch.float16, torch.float16), "come with"),
        (draw("linear_w4a8", rng, SIZES, torch.float16, torch.int8, static=False), "same types"),
        (draw("linear_w4a8", rng, SIZES, torch.float16, torch.int8, gains=False), "same types"),
        (draw("linear_w4a8", rng, SIZES._replace(I=1024), torch.float16, torch.int8), "same sizes"),
        (draw("linear_w4a8", rng, SIZES._replace(R=32), torch.float16, torch.int8), "has to be"),
        (draw("linear_w8a8", rng, SIZES, torch.float16, torch.int8), "tensors of weights"),
        ((block._replace(A=block.A[:, :8].contiguous()), memory), "A has to be"),
        ((block._replace(x_scale=block.x_scale.expand(512).contiguous()), memory), "x_scale has to be"),
        ((block._replace(dt_bias=None), memory), "same types"),
    ):
        with pytest.raises(ValueError, match=message):
            launch([first, other])
    with pytest.raises(ValueError, match="one token of float32"):
        launch([first], x=torch.zeros(2, SIZES.D))
    with pytest.raises(ValueError, match="one token of float32"):
        launch([first], x=torch.zeros(1, SIZES.D, dtype=torch.float16))
    with pytest.raises(TypeError):
        launch([first], dtype=torch.bfloat16)
    assert launches == []
