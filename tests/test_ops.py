"""Every op, every backend usable here, against the torch body."""

import inspect
import itertools
from collections.abc import Iterator

import pytest
import torch

from quamba_kernels import OPS, Backend
from quamba_kernels.ops.rowwise import dequantize
from quamba_kernels.ops.ssd import group_scale
from quamba_kernels.testing import (
    PER_TOKEN,
    TOLERANCE,
    Case,
    cases,
    change,
    disagreement,
    error,
    flat,
    followed,
    outcome,
)  # fmt: skip

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PAIRS = [
    pytest.param(name, backend, device, id=f"{name}-{backend.name}-{device}")
    for name, op in sorted(OPS.items()) for backend in op.candidates for device in DEVICES
]  # fmt: skip
GROUP_SCALES = ("B_scale", "C_scale", "q_scale", "k_scale")
VALUE_SCALES = ("x_scale", "v_scale", *GROUP_SCALES)
SCANS = [p for p in PAIRS if p.values[0].endswith("_scan")]
CONVOLUTIONS = [p for p in PAIRS if p.values[0] == "causal_conv1d"]

pytestmark = pytest.mark.usefixtures("poison")


def torch_body(name: str) -> Backend:
    return OPS[name].candidates[-1]


def served(name: str, backend: Backend, device: str) -> list[Case]:
    """The cases that a backend accepts; skips with the reasons when there are none."""
    reasons = [(case, backend.why_not(case.setting(device))) for case in cases(name)]
    chosen = [case for case, reason in reasons if reason is None]
    if not chosen:
        pytest.skip("; ".join(sorted({str(reason) for _, reason in reasons})))
    return chosen


def test_every_op_has_cases_and_a_tolerance() -> None:
    assert set(OPS) == set(TOLERANCE)
    assert all(cases(name) for name in OPS)


@pytest.mark.parametrize("name, backend, device", PAIRS)
def test_backend_agrees_with_the_torch_body(name: str, backend: Backend, device: str) -> None:
    for case in served(name, backend, device):
        want = outcome(torch_body(name), case)
        got = outcome(backend, case, device, followed)
        difference = disagreement(got, want, TOLERANCE[name][case.dtype], case.flips)
        assert difference is None, f"{case.label}: {difference}"


@pytest.mark.parametrize("name, backend, device", PAIRS)
def test_same_inputs_give_the_same_bits(name: str, backend: Backend, device: str) -> None:
    for case in served(name, backend, device)[::3]:
        first, second = outcome(backend, case, device), outcome(backend, case, device)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), case.label


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, every second element of a larger tensor that holds other values between them."""
    if tensor.dim() == 0:
        return tensor.clone()
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 3).to(tensor)
    view = wide[..., ::2]
    view.copy_(tensor)
    return view


@pytest.mark.parametrize("name, backend, device", PAIRS)
def test_strided_inputs_are_read_right_or_refused(name: str, backend: Backend, device: str) -> None:
    for case in served(name, backend, device):
        want = outcome(torch_body(name), case)
        try:
            got = outcome(backend, case, device, strided)
        except (ValueError, TypeError, RuntimeError):
            continue
        difference = disagreement(got, want, TOLERANCE[name][case.dtype], case.flips)
        assert difference is None, f"{case.label}: {difference}"


@pytest.mark.parametrize("name, backend, device", [p for p in PAIRS if cases(p.values[0])[0].weights is not None])
def test_unpack_undoes_prepack(name: str, backend: Backend, device: str) -> None:
    for case in served(name, backend, device):
        weights = change(case.args[case.weights], lambda t: t.to(device))
        back = backend.unpack(backend.prepack(weights))
        assert len(back) == len(weights)
        for a, b in zip(flat(back), flat(weights), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b), case.label


INTEGER = [p for p in PAIRS if p.values[0] in ("linear_w8a8", "linear_w4a8")]


@pytest.mark.parametrize("name, backend, device", INTEGER)
def test_accumulators_are_exact(name: str, backend: Backend, device: str) -> None:
    from quamba_kernels.ops.linear import expand_two_level

    for case in served(name, backend, device):
        if case.dtype != torch.float32 or "out_scale" in case.kwargs:
            continue
        x, weights = case.args[0], case.args[2]
        codes = weights[0] if name == "linear_w8a8" else expand_two_level(*weights[:2])
        weights = (*weights[:-1], torch.ones_like(weights[-1]))
        got = backend(x.to(device), torch.ones(1, device=device), backend.prepack(tuple(w.to(device) for w in weights)))
        exact = x.flatten(0, -2).long() @ codes.long().T
        assert torch.equal(got.cpu().flatten(0, -2), exact.float()), case.label


def call(backend: Backend, case: Case, device: str = "cpu", **changes):
    """Run a case with some arguments replaced by name."""
    bound = inspect.signature(backend.fn).bind(*case.args, **case.kwargs)
    bound.arguments.update(changes)
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in bound.arguments.items()}
    return backend(**moved)


def arguments(name: str, case: Case) -> dict:
    bound = inspect.signature(OPS[name].reference).bind(*case.args, **case.kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def per_token(name: str, given: dict) -> dict[str, torch.Tensor]:
    """The arguments of a scan or a convolution that have an axis of tokens."""
    return {key: given[key] for key in PER_TOKEN.get(name, ("x",)) if given[key] is not None}


def pieces(name: str, given: dict) -> Iterator[tuple[dict, list[slice]]]:
    """Arguments of three calls that share out the tokens of each sequence, and where their outputs lie in the whole."""
    bounds, inputs = given.get("cu_seqlens"), per_token(name, given)
    total = next(iter(inputs.values())).shape[1]
    spans = itertools.pairwise([0, total] if bounds is None else bounds.tolist())
    ends = [(start, start + (end - start) // 3, max(start, end - 1), end) for start, end in spans]
    for i in range(3):
        parts = [slice(cut[i], cut[i + 1]) for cut in ends]
        part = {key: torch.cat([t[:, p] for p in parts], 1) for key, t in inputs.items()}
        if bounds is not None:
            lengths = torch.tensor([0, *(p.stop - p.start for p in parts)])
            part["cu_seqlens"] = lengths.cumsum(0, dtype=torch.int32)
        if any(p.stop > p.start for p in parts):
            yield part, parts


@pytest.mark.parametrize("name, backend, device", SCANS)
def test_scan_in_pieces_equals_the_whole(name: str, backend: Backend, device: str) -> None:
    for case in served(name, backend, device):
        given = arguments(name, case)
        state, (whole, last) = given["state"], call(backend, case, device)
        joined = torch.full_like(whole, torch.nan)
        for part, places in pieces(name, given):
            y, state = call(backend, case, device, state=state, **part)
            for place, own in zip(places, y.split([p.stop - p.start for p in places], 1), strict=True):
                joined[:, place] = own
        assert error(joined, whole) < TOLERANCE[name][case.dtype], case.label
        assert error(state, last) < TOLERANCE[name][torch.float32], case.label


@pytest.mark.parametrize("name, backend, device", CONVOLUTIONS)
def test_convolution_in_pieces_equals_the_whole(name: str, backend: Backend, device: str) -> None:
    for case in served(name, backend, device):
        given = arguments(name, case)
        if given["state"] is None:
            continue
        last, state = given["state"].to(device, copy=True), given["state"].to(device, copy=True)
        whole = call(backend, case, device, state=last)
        joined = torch.full_like(whole, 3)
        for part, places in pieces(name, given):
            y = call(backend, case, device, state=state, **part)
            for place, own in zip(places, y.split([p.stop - p.start for p in places], 1), strict=True):
                joined[:, place] = own
        assert disagreement([joined.cpu()], [whole.cpu()], TOLERANCE[name][case.dtype]) is None, case.label
        assert torch.equal(state, last), case.label


@pytest.mark.parametrize("name, backend, device", SCANS + CONVOLUTIONS)
def test_a_sequence_does_not_see_its_neighbours(name: str, backend: Backend, device: str) -> None:
    for case in served(name, backend, device):
        given = arguments(name, case)
        if given.get("cu_seqlens") is None or len(given["cu_seqlens"]) < 3:
            continue
        start, end = given["cu_seqlens"][-3:-1].tolist()
        seen = []
        for fill in (3, 5):
            changed = {key: torch.full_like(given[key], fill) for key in ("x", "dt", "B", "C") if key in given}
            for key, value in changed.items():
                value[:, start:end] = given[key][:, start:end]
            state = None if given["state"] is None else given["state"].clone()
            result = call(backend, case, device, state=state, **changed)
            y, last = result if isinstance(result, tuple) else (result, state)
            seen.append((y[:, start:end], y.new_zeros(1) if last is None else last[-2]))
        assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True)), case.label


@pytest.mark.parametrize("name, backend, device", SCANS)
def test_scan_then_update_equals_a_longer_scan(name: str, backend: Backend, device: str) -> None:
    update = OPS[name.replace("_scan", "_update")]
    for case in served(name, backend, device):
        given = arguments(name, case)
        if case.args[0].shape[1] < 2 or given.get("cu_seqlens") is not None:
            continue
        whole, last = call(backend, case, device)
        head = {key: t[:, :-1] for key, t in per_token(name, given).items()}
        _, state = call(backend, case, device, **head)
        rest = {key: t[:, -1].to(device) for key, t in per_token(name, given).items()}
        kept = {k: v for k, v in given.items() if k not in ("state", "cu_seqlens")}
        shared = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kept.items()}
        y = update(state, None, None, **{**shared, **rest})
        assert error(y, whole[:, -1]) < TOLERANCE[name][case.dtype], case.label
        assert error(state, last) < TOLERANCE[name][torch.float32], case.label


@pytest.mark.parametrize("name, backend, device", SCANS + [p for p in PAIRS if p.values[0].endswith("_update")])
def test_scales_stand_for_the_values(name: str, backend: Backend, device: str) -> None:
    seen = 0
    for case in served(name, backend, device):
        given = arguments(name, case)
        scales = {key: t for key, t in given.items() if key in VALUE_SCALES and t is not None}
        if not scales or case.dtype != torch.float32:
            continue
        floats = dict.fromkeys(scales)
        for key, scale in scales.items():
            x = key.removesuffix("_scale")
            floats[x] = dequantize(given[x], group_scale(scale) if key in GROUP_SCALES else scale)
        kept = {k: v.clone() for k, v in given.items() if k in ("state", "state_scale", "rng") and v is not None}
        with_scales, without = call(backend, case, device, **kept), call(backend, case, device, **floats)
        if isinstance(without, torch.Tensor):
            with_scales, without = (with_scales,), (without,)
        for a, b in zip(with_scales, without, strict=True):
            assert error(a, b) < TOLERANCE[name][torch.float32], case.label
        seen += 1
    if not seen:
        assert backend.name != "torch"
        pytest.skip(f"{backend.name} serves no case in fp32 that has scales")
