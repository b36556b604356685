"""Triton's kernels of the non-linear operators against the torch bodies, at the sizes where their paths part.

In Triton's interpreter, where ``tests/test_triton.py`` runs what is not slow, or compiled where there is a GPU:
``TRITON_INTERPRET=1 python -m pytest tests/test_triton_operators.py`` runs everything by hand.
"""

import os
from itertools import accumulate
from typing import Any

import pytest
import torch

from quamba_kernels import OPS
from quamba_kernels.backends.triton import INTERPRET
from quamba_kernels.hadamard import factor
from quamba_kernels.testing import TOLERANCE, Case, cases, disagreement, error, outcome

pytest.importorskip("triton", reason="the extra `triton` is not installed")
DEVICE = "cpu" if os.environ.get(INTERPRET) == "1" else "cuda"
pytestmark = [
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(),
        reason="no GPU; tests/test_triton.py runs these in Triton's interpreter",
    ),
    pytest.mark.usefixtures("poison"),
]
F32 = torch.float32
SHORT = 20
"""Tokens a case may have in the interpreter, which takes a millisecond for each of a sequential scan."""


def agree(name: str, case: Case, tolerance: float | None = None) -> None:
    (mine,) = (b for b in OPS[name].backends if b.name == "triton")
    assert mine.why_not(case.setting(DEVICE)) is None
    want = outcome(OPS[name].candidates[-1], case)
    difference = disagreement(outcome(mine, case, DEVICE), want, tolerance or TOLERANCE[name][case.dtype])
    assert difference is None, f"{case.label}: {difference}"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randint(-127, 128, shape, generator=rng, dtype=torch.int8)


def scale(*shape: int) -> torch.Tensor:
    return normal(*shape).abs() * 0.01 + 0.005


def ssd(B: int, T: int, H: int, P: int, G: int, N: int, lengths: tuple[int, ...] = (), **options: Any) -> Case:
    """int8 throughout, with a state to begin from."""
    A, D, dt_bias = -normal(H).abs() - 0.1, normal(H, seed=1), normal(H, seed=2)
    args = (codes(B, T, H, P), normal(B, T, H), A, codes(B, T, G, N), codes(B, T, G, N, seed=1), D, dt_bias)
    state = normal(len(lengths) or B, H, P, N)
    options |= {"x_scale": scale(H, P), "B_scale": scale(G), "C_scale": scale(G)}
    return Case(f"ssd {B}x{T} {H} {P} {G} {N} {lengths}", (*args, state), options | packed(lengths))


def selective(B: int, T: int, inner: int, N: int, lengths: tuple[int, ...] = ()) -> Case:
    A, D, dt_bias = -normal(inner, N).abs() - 0.1, normal(inner, seed=1), normal(inner, seed=2)
    args = (codes(B, T, inner), normal(B, T, inner), A, codes(B, T, N), codes(B, T, N, seed=1), D, dt_bias)
    options = {"x_scale": scale(1), "B_scale": scale(1), "C_scale": scale(1)}
    state = normal(len(lengths) or B, inner, N)
    return Case(f"selective {B}x{T} {inner} {N} {lengths}", (*args, state), options | packed(lengths))


def conv(B: int, T: int, C: int, lengths: tuple[int, ...] = (), W: int = 4) -> Case:
    args = (codes(B, T, C), codes(C, W), normal(C), codes(len(lengths) or B, W - 1, C))
    options = {"x_scale": scale(C), "weight_scale": scale(C), "out_scale": scale(C) * 5}
    return Case(f"conv {B}x{T} {C} {lengths}", args, options | packed(lengths))


def packed(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {"cu_seqlens": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)} if lengths else {}


def gate(rows: int, channels: int, block: int, groups: int) -> Case:
    args = (normal(rows, channels), codes(rows, channels), normal(channels), 1e-5)
    options = {"z_scale": scale(channels), "norm_groups": groups, "block": block}
    return Case(f"gate {channels} block={block} groups={groups}", args, options)


@pytest.mark.parametrize(
    "name", ["quantize", "rms_norm", "quantize_state", "quantize_states", "ssd_update", "selective_update"]
)
def test_rowwise_operators_and_updates(name: str) -> None:
    chosen = [case for case in cases(name) if case.dtype == F32]
    for case in chosen[:: 2 if name in ("rms_norm", "ssd_update") else 1]:
        agree(name, case)


@pytest.mark.parametrize("name", ["causal_conv1d", "ssd_scan", "selective_scan"])
def test_short_prompts(name: str) -> None:
    seen = [case for case in cases(name) if case.dtype == F32 and case.args[0].shape[1] <= SHORT]
    assert len(seen) > 4
    for case in seen:
        agree(name, case)


LENGTHS = (0, 1, 3, 0, 13, 0)


@pytest.mark.parametrize("cuts", [1, 3])
def test_packed_sequences_cut_into_segments(cuts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from quamba_kernels.triton import selective as channels
    from quamba_kernels.triton import ssd as heads

    for module in (heads, channels):
        monkeypatch.setattr(module, "segments", lambda *sizes: cuts)
    monkeypatch.setattr(heads, "tile", lambda *sizes: (16, 16, 4, 1))
    agree("ssd_scan", ssd(1, 70, 2, 16, 1, 8, (0, 1, 3, 0, 66, 0)))
    agree("selective_scan", selective(1, sum(LENGTHS), 20, 8, LENGTHS))
    if cuts > 1:
        agree("ssd_scan", ssd(2, 50, 2, 16, 2, 8))
        agree("selective_scan", selective(2, 10, 20, 8))


@pytest.mark.parametrize("lengths", [(0, 1, 3, 0, 63, 0), (67,)])
def test_packed_sequences_are_convolved_alone(lengths: tuple[int, ...]) -> None:
    agree("causal_conv1d", conv(1, 67, 24, lengths))


def test_products_of_half_precision_lose_no_more_than_the_output() -> None:
    x, dt, A, *_, D, dt_bias, state = ssd(1, 70, 2, 16, 1, 16).args
    B, C = normal(1, 70, 1, 16).half(), normal(1, 70, 1, 16, seed=1).half()
    args = (normal(1, 70, 2, 16).half(), dt, A, B, C, D, dt_bias, state)
    case = Case("fp16", args, {"out_dtype": torch.float16}, dtype=torch.float16)
    (mine,) = (b for b in OPS["ssd_scan"].backends if b.name == "triton")
    got, want = outcome(mine, case, DEVICE), outcome(OPS["ssd_scan"].candidates[-1], case)
    assert error(got[0], want[0]) < 2e-5  # most outputs round alike; one rounding of all would be 2e-4
    assert error(got[1], want[1]) < TOLERANCE["ssd_scan"][F32]


ROTATIONS = [
    (12, 12), (20, 20), (28, 28), (36, 36), (40, 40), (24, 24), (80, 40), (144, 144), (96, 2), (48, 1), (48, 0),
]  # fmt: skip
"""Channels and block: the base matrices alone, times powers of two, several blocks."""


def test_rotations_with_every_base_matrix() -> None:
    for channels, block in ROTATIONS:
        agree("gate_output", gate(2, channels, block, groups=1))
    assert {factor(block)[0] for _, block in ROTATIONS if block} >= {1, 12, 20, 28, 36}  # 40 is 20 * 2


@pytest.mark.parametrize("block", [16, 32, 64, 512, 2048])
def test_rotations_by_powers_of_two(block: int) -> None:
    agree("gate_output", gate(1, 2048, block, groups=8))


def test_what_is_written_in_place_must_be_contiguous() -> None:
    from quamba_kernels.triton import conv as convolution
    from quamba_kernels.triton import update

    state = codes(1, 3, 48)[..., ::2]
    with pytest.raises(ValueError, match="the convolution's state is updated in place and must be contiguous"):
        convolution.causal_conv1d(codes(1, 2, 24), codes(24, 4), None, state, None, None, None, F32, None)
    with pytest.raises(ValueError, match="rng is int64 \\[2\\], seed and step, got torch.int32 \\[2\\]"):
        update.check_rng(torch.zeros(2, dtype=torch.int32))


SSD_SIZES = [
    (1, 1, 2, 32, 1, 16), (2, 3, 8, 64, 8, 64), (3, 63, 2, 128, 1, 128), (4, 255, 8, 32, 8, 256),
    (5, 257, 2, 64, 1, 16), (1, 1000, 8, 128, 8, 64), (2, 257, 3, 48, 3, 24),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SSD_SIZES, ids=str)
def test_ssd_at_many_sizes(sizes: tuple[int, ...]) -> None:
    agree("ssd_scan", ssd(*sizes))
    B, T, H, P, G, N = sizes
    case = ssd(B, T, H, P, G, N)
    x, dt, A, B_, C_, D, dt_bias, _ = case.args
    for state, row, rng in (
        (normal(B, H, P, N), None, None), (normal(B, H, P, N).half(), None, None),
        (codes(B, H, P, N), scale(B, H, P), None), (codes(B, H, P, N), scale(B, H, P), torch.tensor([2**40 + 3, 5])),
    ):  # fmt: skip
        args = (state, row, rng, x[:, 0], dt[:, 0], A, B_[:, 0], C_[:, 0], D, dt_bias)
        # a state that differs in its last fp32 bits differs by a step of fp16 where it lies on a tie
        flips = 1e-5 if state.dtype == torch.float16 else None
        agree("ssd_update", Case(f"update {state.dtype}", args, case.kwargs), flips)


@pytest.mark.slow
@pytest.mark.parametrize("tokens, batch", [(1, 5), (3, 4), (63, 3), (255, 1), (257, 2), (1000, 1)])
def test_convolution_and_selective_scan_at_many_lengths(tokens: int, batch: int) -> None:
    for width in (2, 3, 4):
        agree("causal_conv1d", conv(batch, tokens, 300, W=width))
    agree("selective_scan", selective(batch, tokens, 40, 16))


@pytest.mark.slow
@pytest.mark.parametrize("channels", [768, 1536, 2560, 3072, 4096, 5120, 7168, 8192, 10240, 9216])
def test_rotations_of_models(channels: int) -> None:
    for groups in (0, 1, 8):
        agree("gate_output", gate(2, channels, channels, groups))


def test_the_likeliest_of_rows_with_numbers_that_are_none() -> None:
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[-inf, -inf, -inf], [-inf, -3.0, -2.0], [1.0, nan, nan], [inf, 5.0, inf], [-nan, inf, 0.0]])
    (mine,) = (b for b in OPS["likeliest"].backends if b.name == "triton")
    assert mine(logits.to(DEVICE)).tolist() == logits.argmax(-1).tolist() == [0, 2, 1, 0, 0]


@pytest.mark.parametrize("wrong", ["h", "state", "rows"])
def test_states_of_layers_that_are_not_alike_are_refused(wrong: str) -> None:
    from quamba_kernels.triton import state as rows

    h, codes, scale = [torch.zeros(2, 3, 8)] * 2, [torch.zeros(2, 3, 8, dtype=torch.int8)] * 2, [torch.ones(2, 3)] * 2
    if wrong == "h":
        h[1] = h[1].half()
    elif wrong == "state":
        codes[1] = codes[1].float()
    else:
        h[1], codes[1], scale[1] = h[1][:1], codes[1][:1], scale[1][:1]
    with pytest.raises(ValueError, match="layers alike"):
        rows.quantize_states(tuple(h), tuple(codes), tuple(scale), None)
