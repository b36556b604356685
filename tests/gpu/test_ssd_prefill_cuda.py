"""ssd_prefill in CUDA on a GPU: the bits of the convolution and the scan, which it is itself below 1,024 tokens."""

from typing import Any

import pytest
import torch

from quamba_kernels import OPS, Setting
from quamba_kernels.testing import followed

F16, BF16, INT8 = torch.float16, torch.bfloat16, torch.int8
P, N, W = 64, 128, 4


def why_skip() -> str | None:
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    return OPS["ssd_prefill"].explain(Setting("cuda", F16, {"P": P, "N": N, "W": W}))["cuda"]


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(why_skip()), reason=str(why_skip()))]


def kernel(name: str) -> Any:
    (mine,) = (b for b in OPS[name].backends if b.name == "cuda")
    return mine


def scales(*shape: int) -> torch.Tensor:
    return torch.rand(shape, device="cuda") * 0.02 + 0.005


def arguments(
    batch: int, tokens: int, H: int, G: int, kind: torch.dtype, coded: bool, stateful: bool = True
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """mixed and dt are columns of one projection, as in_proj leaves them."""
    channels = H * P + 2 * G * N
    projected = followed(torch.randn(batch, tokens, H * P + channels + H, device="cuda").to(kind))
    _, mixed, dt = projected.split([H * P, channels, H], -1)
    options: dict[str, Any] = {"groups": G, "d_state": N, "out_dtype": kind}
    kept, weight = torch.randn(batch, W - 1, channels, device="cuda").to(kind), torch.randn(channels, W, device="cuda")
    if coded:
        codes = torch.randint(-127, 128, (channels, W + W * batch), device="cuda", dtype=INT8)
        weight, kept = codes[:, :W].contiguous(), codes[:, W : W + (W - 1) * batch].reshape(batch, W - 1, channels)
        x_scale, B_scale, C_scale = scales(H, P), scales(G), scales(G)
        out = torch.cat([x_scale.flatten(), B_scale.repeat_interleave(N), C_scale.repeat_interleave(N)])
        options |= {
            "conv_in_scale": scales(channels), "conv_weight_scale": scales(channels) / 10, "conv_out_scale": out,
            "x_scale": x_scale, "B_scale": B_scale, "C_scale": C_scale,
        }  # fmt: skip
    A, (D, dt_bias) = -torch.rand(H, device="cuda") * 15 - 0.01, torch.randn(2, H, device="cuda")
    state = torch.randn(batch, H, P, N, device="cuda") if stateful else None
    bias = torch.randn(channels, device="cuda").to(kind)
    return (mixed, dt, weight, bias, kept.contiguous() if stateful else None, A, D, dt_bias - 3, state), options


def chain(args: tuple[Any, ...], options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernels of the two ops, one after the other."""
    mixed, dt, weight, bias, kept, A, D, dt_bias, state = args
    G, n, kind = options["groups"], options["d_state"], options["out_dtype"]
    mixed = kernel("causal_conv1d")(
        mixed, weight, bias, kept, in_scale=options.get("conv_in_scale"), weight_scale=options.get("conv_weight_scale"),
        out_scale=options.get("conv_out_scale"), out_dtype=kind,
    )  # fmt: skip
    x, B, C = mixed.split([mixed.shape[-1] - 2 * G * n, G * n, G * n], -1)
    given = {name: options[name] for name in ("x_scale", "B_scale", "C_scale") if name in options}
    done: tuple[torch.Tensor, torch.Tensor] = kernel("ssd_scan")(
        x.unflatten(-1, (len(A), -1)), dt, A, B.unflatten(-1, (G, n)), C.unflatten(-1, (G, n)), D, dt_bias, state,
        out_dtype=kind, **given,
    )  # fmt: skip
    return done


def check(args: tuple[Any, ...], options: dict[str, Any], label: str) -> None:
    again = tuple(t.clone() if i == 4 and t is not None else t for i, t in enumerate(args))
    got, want = kernel("ssd_prefill")(*args, **options), chain(again, options)
    for what, mine, other in zip(("y", "the last state"), got, want, strict=True):
        assert torch.equal(mine, other), f"{label}: {what} differs in {(mine != other).sum()} of {mine.numel()}"
    if args[4] is not None:
        assert torch.equal(args[4], again[4]), f"{label}: the state of the convolution"


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("coded", [True, False], ids=["codes", "floats"])
@pytest.mark.parametrize("kind", [F16, BF16])
@pytest.mark.parametrize("tokens", [1, 3, 65, 1000, 1024, 1025, 1039, 1087, 1089, 2048, 3001])
def test_bits_of_the_chain(tokens: int, kind: torch.dtype, coded: bool) -> None:
    for batch, H, G, stateful in ((1, 80, 1, True), (1, 24, 1, False), (3, 16, 8, True), (2, 5, 1, False)):
        check(*arguments(batch, tokens, H, G, kind, coded, stateful), f"{batch} x {tokens}, {H} heads, {G} groups")


@pytest.mark.usefixtures("poison")
def test_many_sequences_of_many_tokens() -> None:
    check(*arguments(12, 1100, 80, 1, F16, True), "12 x 1100")
    check(*arguments(1, 20000, 128, 8, F16, True), "1 x 20000")


def test_layouts_that_the_kernel_does_not_take_go_through_the_chain() -> None:
    (mixed, *rest), options = arguments(2, 1130, 16, 1, F16, True)
    wider = torch.cat([mixed, mixed[..., :3]], -1)[..., : mixed.shape[-1]]
    assert wider.stride(1) % 4
    check((wider, *rest), options, "rows off the grid")


def test_replays_in_a_captured_graph() -> None:
    args, options = arguments(1, 1700, 80, 1, F16, True)
    kept = args[4].clone()
    want = kernel("ssd_prefill")(*args, **options)
    args[4].copy_(kept)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = kernel("ssd_prefill")(*args, **options)
    for _ in range(3):
        args[4].copy_(kept)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
