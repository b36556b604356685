"""Weights that scans and convolutions write out as int8 beside their own work, on a GPU."""

import pytest
import torch

from quamba_kernels import OPS, Setting, ops
from quamba_kernels.cuda.expansion import ahead, expanded
from quamba_kernels.ops.linear import expand_two_level

F16, INT8 = torch.float16, torch.int8
WEIGHTS = [(2560, 5120, 128), (264, 1600, 32), (40, 96, 96), (8, 64, 32), (1000, 2560, 2560), (40000, 8192, 8192)]
"""O out features, K in features, S group size."""


def why_skip() -> str | None:
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    return OPS["ssd_scan"].explain(Setting("cuda", F16, {"P": 64, "N": 128}))["cuda"]


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(why_skip()), reason=str(why_skip()))]


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, device="cuda", dtype=INT8)


def scale(*shape: int) -> torch.Tensor:
    return torch.rand(shape, device="cuda") * 0.02 + 0.005


def weight(O: int, K: int, S: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes in [-7, 7], multipliers in 1..17, the extremes among them."""
    nibbles = torch.randint(1, 16, (O, K // 8, 8), device="cuda", dtype=torch.int32)
    nibbles[0], nibbles[-1] = 1, 15
    shifts = torch.arange(0, 32, 4, device="cuda", dtype=torch.int32)
    multiplier = torch.randint(1, 18, (O, K // S), device="cuda", dtype=INT8)
    multiplier[0], multiplier[-1] = 17, 17
    return (nibbles << shifts).sum(-1, dtype=torch.int32), multiplier


def mamba2(batch: int, tokens: int, H: int, P: int, N: int):
    """A call of the SSD scan."""
    x, B, C = codes(batch, tokens, H, P), codes(batch, tokens, 1, N), codes(batch, tokens, 1, N)
    dt, D = torch.randn(batch, tokens, H, device="cuda").half() - 3, torch.randn(H, device="cuda")
    A, scales = -torch.rand(H, device="cuda") - 0.1, {"x_scale": scale(H, P), "B_scale": scale(1), "C_scale": scale(1)}
    backend = ops.ssd_scan.bind(Setting("cuda", F16, {"P": P, "N": N}))
    return lambda: backend(x, dt, A, B, C, D, D, None, **scales, out_dtype=F16)


def mamba1(batch: int, tokens: int, I: int, N: int):
    """A call of the selective scan."""
    x, B, C = codes(batch, tokens, I), codes(batch, tokens, N), codes(batch, tokens, N)
    dt, D = torch.rand(batch, tokens, I, device="cuda").half(), torch.randn(I, device="cuda")
    A, scales = -torch.rand(I, N, device="cuda") - 0.1, {"x_scale": scale(I), "B_scale": scale(1), "C_scale": scale(1)}
    backend = ops.selective_scan.bind(Setting("cuda", F16, {"I": I, "N": N}))
    return lambda: backend(x, dt, A, B, C, D, None, None, **scales, out_dtype=F16)


def convolution(batch: int, tokens: int, C: int, *, rounds: bool = True):
    """A call of the convolution, in codes or in floats."""
    x = torch.randn(batch, tokens, C, device="cuda", dtype=F16)
    backend = ops.causal_conv1d.bind(Setting("cuda", F16, {"W": 4}))
    if not rounds:
        taps = torch.randn(C, 4, device="cuda", dtype=F16)
        return lambda: (backend(x, taps, None, None, out_dtype=F16),)
    scales = {"in_scale": scale(C), "weight_scale": scale(C), "out_scale": scale(C)}
    taps = codes(C, 4)
    return lambda: (backend(x, taps, None, None, **scales, out_dtype=F16),)


CARRIERS = {
    "convolution, codes": lambda: convolution(1, 2048, 5120),
    "convolution, rows of a batch": lambda: convolution(3, 37, 264),
    "convolution, floats": lambda: convolution(1, 300, 5120, rounds=False),
    "convolution, the kernel for other sizes": lambda: convolution(2, 50, 37),
    "ssd, with idle multiprocessors": lambda: mamba2(1, 2048, 80, 64, 128),
    "ssd, a few tokens": lambda: mamba2(1, 5, 80, 64, 128),
    "ssd, more blocks than multiprocessors": lambda: mamba2(5, 300, 80, 64, 128),
    "ssd, the kernel for other sizes": lambda: mamba2(2, 300, 24, 32, 64),
    "selective, with idle multiprocessors": lambda: mamba1(1, 2048, 5120, 16),
    "selective, a few tokens": lambda: mamba1(1, 5, 5120, 16),
    "selective, the kernel for other sizes": lambda: mamba1(2, 300, 256, 8),
}


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", CARRIERS)
def test_a_kernel_expands_a_weight_and_gives_the_same_bits(name: str) -> None:
    call = CARRIERS[name]()
    alone = call()
    for shape in WEIGHTS:
        w, multiplier = weight(*shape)
        with ahead(w, multiplier):
            beside = call()
            found = expanded(w)
        assert found is not None and torch.equal(found, expand_two_level(w, multiplier)), f"{name} {shape}"
        assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True)), f"{name} {shape}"


def test_in_a_captured_graph_each_replay_expands_anew() -> None:
    scan, (w, multiplier) = mamba2(1, 2048, 80, 64, 128), weight(2560, 5120, 128)
    scan()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), ahead(w, multiplier):
        scan()
        found = expanded(w)
    assert found is not None
    for _ in range(2):
        found.fill_(77)
        graph.replay()
        assert torch.equal(found, expand_two_level(w, multiplier))


def test_a_linear_over_many_rows_takes_what_was_expanded() -> None:
    w, multiplier = weight(2560, 5120, 128)
    weights, x, x_scale = (w, multiplier, scale(2560)), codes(1, 2048, 5120), scale(1)
    linear = ops.linear_w4a8.bind(Setting("cuda", F16, {"K": 5120, "O": 2560, "S": 128}))
    want = linear(x, x_scale, weights, out_dtype=F16)
    with linear.ahead(weights, 2048):
        mamba2(1, 2048, 80, 64, 128)()
        found = expanded(w)
        assert found is not None and torch.equal(linear(x, x_scale, weights, out_dtype=F16), want)
        found.zero_()
        assert not linear(x, x_scale, weights, out_dtype=F16).any()
