"""Mamba2's scan in CUDA on a GPU, beyond the loop of test_ops.py: sizes of models, cuts, pieces, sequences, graphs."""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.functional import softplus

from quamba_kernels import OPS, Setting
from quamba_kernels.cuda import ssd
from quamba_kernels.ops.rowwise import dequantize
from quamba_kernels.ops.ssd import group_scale
from quamba_kernels.testing import TOLERANCE, disagreement, error, followed

F32, F16, BF16, INT8 = torch.float32, torch.float16, torch.bfloat16, torch.int8
LENGTHS = [1, 3, 63, 64, 65, 255, 257, 1000, 4096]
RAGGED = (0, 1, 3, 63, 0, 255, 257, 64, 1000, 2, 0)


def why_skip() -> str | None:
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    return OPS["ssd_scan"].explain(Setting("cuda", BF16, {"P": 64, "N": 128}))["cuda"]


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(why_skip()), reason=str(why_skip()))]


def kernel(*args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    (mine,) = (b for b in OPS["ssd_scan"].backends if b.name == "cuda")
    return mine(*args, **options)


class Sizes(NamedTuple):
    H: int
    P: int
    G: int
    N: int


MODEL = Sizes(80, 64, 1, 128)


def scales(*shape: int) -> torch.Tensor:
    return torch.rand(shape, device="cuda") * 0.02 + 0.005


def arguments(
    batch: int, tokens: int, sizes: Sizes, kind: torch.dtype, sequences: int | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """x, B and C are columns of one tensor, as the convolution leaves them; dt those of a projection. A y of few tokens
    is fp16: roundings to bf16, of sums that differ by as much for a whole head, do not even out."""
    H, P, G, N = sizes
    width = H * P + 2 * G * N
    if kind == INT8:
        mixed = torch.randint(-127, 128, (batch, tokens, width), device="cuda", dtype=INT8)
        options = {"x_scale": scales(H, P), "B_scale": scales(G), "C_scale": scales(G)}
    else:
        mixed, options = torch.randn(batch, tokens, width, device="cuda").to(kind), {}
    x, B, C = followed(mixed).split([H * P, G * N, G * N], -1)
    half = F16 if kind == INT8 else kind
    dt = followed((torch.randn(batch, tokens, H + 16, device="cuda") * 2 - 3).to(half))[..., 16:]
    A = -torch.rand(H, device="cuda") * 15 - 0.01
    state = torch.randn(sequences or batch, H, P, N, device="cuda") * 3
    D, dt_bias = torch.randn(H, device="cuda"), torch.randn(H, device="cuda")
    x, B, C = x.unflatten(-1, (H, P)), B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))
    return (x, dt, A, B, C, D, dt_bias, state), {**options, "out_dtype": half if tokens >= 63 else F16}


def exact_state(args: tuple[Any, ...], options: dict[str, Any]) -> torch.Tensor:
    """What a scan leaves, in fp64 and not token by token: the body rounds its fp32 state once a token."""
    x, dt, A, B, _, _, bias, state = args
    x = dequantize(x, options.get("x_scale")).double()
    B = dequantize(B, group_scale(options.get("B_scale"))).double()
    steps = softplus(dt.double() if bias is None else dt.double() + bias.double())
    steps = steps.clamp(*options.get("dt_limit", (0.0, math.inf)))
    bounds = options.get("cu_seqlens")
    pieces = range(len(x)) if bounds is None else [slice(a, b) for a, b in pairwise(bounds.tolist())]
    lasts = []
    for index, piece in enumerate(pieces):
        one, b, step = (t[piece] if bounds is None else t[0, piece] for t in (x, B, steps))
        decay = step * A.double()
        weight = step * (decay.sum(0) - decay.cumsum(0)).exp()
        weighted = (weight.unsqueeze(-1) * one).unflatten(1, (b.shape[1], -1))
        last = torch.einsum("tghp,tgn->ghpn", weighted, b).flatten(0, 1)
        lasts.append(last if state is None else last + decay.sum(0).exp()[:, None, None] * state[index].double())
    return torch.stack(lasts)


def check(args: tuple[Any, ...], options: dict[str, Any], label: str) -> None:
    want, got = OPS["ssd_scan"].reference(*args, **options), kernel(*args, **options)
    difference = disagreement([t.cpu() for t in got], [t.cpu() for t in want], TOLERANCE["ssd_scan"][BF16])
    assert difference is None, f"{label}: {difference}"
    assert error(got[1].cpu(), exact_state(args, options).cpu()) < TOLERANCE["ssd_scan"][F32], f"{label}: the state"


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("kind", [INT8, F16, BF16])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_lengths(tokens: int, kind: torch.dtype) -> None:
    for batch, sizes in ((1, MODEL), (LENGTHS.index(tokens) % 5 + 1, Sizes(16, 64, 8, 128))):
        args, options = arguments(batch, tokens, sizes, kind)
        check(args, options, f"{batch} x {tokens} {sizes} {kind}")
    check((*args[:6], None, None), {**options, "dt_limit": (0.1, 0.8)}, f"{batch} x {tokens} {sizes} {kind} from zeros")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("P", ssd.CHANNELS)
@pytest.mark.parametrize("N", ssd.STATES)
def test_sizes(N: int, P: int) -> None:
    for index, (batch, tokens, G) in enumerate(((2, 1, 1), (3, 70, 2), (1, 515, 4))):
        kind = (INT8, F16, BF16)[(index + N // 16 + P // 16) % 3]
        args, options = arguments(batch, tokens, Sizes(8, P, G, N), kind)
        check(args, options, f"{batch} x {tokens} P={P} N={N} G={G} {kind}")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("kind", [INT8, F16, BF16])
def test_any_number_of_cuts(kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for sizes, tokens in ((Sizes(4, 64, 2, 128), 700), (Sizes(2, 128, 1, 128), 333), (Sizes(2, 64, 1, 256), 400)):
        args, options = arguments(2, tokens, sizes, kind)
        for cuts in (1, 2, 3, 7, 11, 32):
            monkeypatch.setattr(ssd, "CUTS", cuts)
            check(args, options, f"{sizes} {tokens} tokens in {cuts} {kind}")


@pytest.mark.usefixtures("poison")
def test_inputs_of_several_types() -> None:
    for x_kind in (INT8, F16, BF16):
        for bc_kind in (INT8, F16, BF16):
            (x, dt, A, *_), scaled = arguments(2, 150, Sizes(4, 64, 2, 128), x_kind)
            (_, _, _, B, C, *rest), more = arguments(2, 150, Sizes(4, 64, 2, 128), bc_kind)
            options = {k: v for k, v in scaled.items() if k == "x_scale"} | {
                k: v for k, v in more.items() if k in ("B_scale", "C_scale")
            }
            for out in (F16, BF16):
                check((x, dt.float(), A, B, C, *rest), {**options, "out_dtype": out}, f"{x_kind} {bc_kind} {out}")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("lengths", [RAGGED, (1,) * 40, (400,), (64, 64, 128)], ids=["ragged", "ones", "one", "whole"])
def test_sequences(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = torch.tensor((0, *lengths), device="cuda").cumsum(0, dtype=torch.int32)
    for index, (sizes, cuts) in enumerate(((MODEL, 0), (Sizes(4, 32, 2, 64), 3), (Sizes(2, 64, 1, 256), 5))):
        monkeypatch.setattr(ssd, "CUTS", cuts)
        args, options = arguments(1, sum(lengths), sizes, (INT8, F16, BF16)[index], len(lengths))
        options |= {"cu_seqlens": bounds, "out_dtype": F16}  # some have few tokens
        check(args, options, f"{sizes} {lengths}")
        check((*args[:6], None, None), options, f"{sizes} {lengths} from zeros")


@pytest.mark.parametrize("kind", [INT8, F16, BF16])
def test_pieces_leave_what_the_whole_leaves(kind: torch.dtype) -> None:
    (x, dt, A, B, C, D, bias, state), options = arguments(1, 3000, MODEL, kind)
    y, last = kernel(x, dt, A, B, C, D, bias, state, **options)
    parts = []
    for start, end in ((0, 1), (1, 130), (130, 1999), (1999, 3000)):
        part, state = kernel(
            x[:, start:end], dt[:, start:end], A, B[:, start:end], C[:, start:end], D, bias, state, **options
        )
        parts.append(part)
    assert error(torch.cat(parts, 1).cpu(), y.cpu()) < TOLERANCE["ssd_scan"][BF16]
    assert error(state.cpu(), last.cpu()) < TOLERANCE["ssd_scan"][F32]


@pytest.mark.parametrize("kind", [INT8, F16, BF16])
@pytest.mark.parametrize("extreme", ["x", "tiny x", "dt", "tiny dt", "state", "decay", "padding"])
def test_magnitudes(extreme: str, kind: torch.dtype) -> None:
    """Nothing overflows in fp16 on the way, and small factors keep their digits."""
    (x, dt, A, B, C, D, bias, state), options = arguments(2, 200, Sizes(4, 64, 1, 128), kind)
    D, bias, out = D * 0, None, {**options, "out_dtype": BF16}
    factor = {"x": 1e4, "tiny x": 1e-3}.get(extreme, 1.0)
    if kind == INT8:
        out |= {"x_scale": options["x_scale"] * factor}
    else:
        x, B, C = x * factor, B * (100 if factor > 1 else 1), C * (100 if factor > 1 else 1)
    dt = {"dt": dt + 400, "tiny dt": dt - 10}.get(extreme, dt)
    state = {"state": state * 1e6, "tiny dt": None, "tiny x": None}.get(extreme, state)
    A = {"decay": A * 100, "dt": A * 1e-4, "tiny dt": A * 1e-3}.get(extreme, A)
    if extreme == "padding":
        x, B, C = (t.clone() for t in (x, B, C))
        x[:, :90] = B[:, :90] = C[:, :90] = 0
    check((x, dt, A, B, C, D, bias, state), out, f"{extreme} {kind}")


@pytest.mark.usefixtures("poison")
def test_inputs_off_the_grid_are_copied() -> None:
    (x, dt, A, B, C, D, bias, state), options = arguments(2, 70, Sizes(4, 64, 2, 64), INT8)

    def shifted(t: torch.Tensor) -> torch.Tensor:
        wide = torch.zeros((*t.shape[:-1], t.shape[-1] + 3), device="cuda", dtype=t.dtype)
        return wide[..., 3:].copy_(t)

    want = kernel(x, dt, A, B, C, D, bias, state, **options)
    got = kernel(shifted(x), shifted(dt), A, shifted(B), shifted(C), D, bias, state, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_long_prompt_of_many_heads() -> None:
    """Offsets beyond 2^31 elements: the end of a prompt as from the state before it."""
    tokens, tail, sizes = 131072, 200, Sizes(264, 64, 1, 16)
    assert tokens * sizes.H * sizes.P > 1 << 31
    (x, dt, A, B, C, D, bias, _), options = arguments(1, tokens, sizes, INT8)
    y, last = kernel(x, dt, A, B, C, D, bias, None, **options)
    end = y[:, -tail:].clone()
    del y
    head = slice(0, tokens - tail)
    _, before = kernel(x[:, head], dt[:, head], A, B[:, head], C[:, head], D, bias, None, **options)
    end_of = (x[:, -tail:], dt[:, -tail:], A, B[:, -tail:], C[:, -tail:], D, bias, before)
    want, state = OPS["ssd_scan"].reference(*end_of, **options)
    assert disagreement([end.cpu()], [want.cpu()], TOLERANCE["ssd_scan"][BF16]) is None
    assert error(last.cpu(), state.cpu()) < TOLERANCE["ssd_scan"][F32]


def test_same_inputs_give_the_same_bits() -> None:
    args, options = arguments(1, 1000, MODEL, INT8)
    first = kernel(*args, **options)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, kernel(*args, **options), strict=True))


def test_runs_on_the_current_stream() -> None:
    (x, *rest), options = arguments(1, 300, MODEL, INT8)
    want = kernel(x, *rest, **options)
    late, stream = torch.zeros_like(x), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        got = kernel(late, *rest, **options)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_chains_in_a_captured_graph() -> None:
    """Launches that may start before their predecessor ends still see all that it wrote."""
    (x, dt, A, B, C, D, bias, state), options = arguments(1, 700, MODEL, F16)
    held, want = state.clone(), state
    for _ in range(3):
        y, want = kernel(x, dt, A, B, C, D, bias, want, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        last = held
        for _ in range(3):
            out, last = kernel(x, dt, A, B, C, D, bias, last, **options)
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, y) and torch.equal(last, want)
