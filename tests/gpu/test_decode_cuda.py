"""The CUDA decode steps on a GPU, beyond the loop of test_ops.py: sizes of models, runs of tokens, graphs, refusals."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from quamba_kernels import OPS, Backend, BackendUnavailable, Setting
from quamba_kernels.testing import TOLERANCE, Case, cases, change, disagreement, flat, followed

NAMES = ["ssd_decode", "selective_decode", "conv_decode"]
STEPS = ["ssd_decode", "selective_decode"]


def why_skip() -> str | None:
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    return OPS["conv_decode"].explain(Setting("cuda", torch.bfloat16, {"W": 4}))["cuda"]


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(why_skip()), reason=str(why_skip()))]


def backend(name: str) -> Backend:
    return next(b for b in OPS[name].backends if b.name == "cuda")


def on_gpu(case: Case) -> Case:
    args, kwargs = change((case.args, case.kwargs), lambda t: t.cuda())
    return replace(case, args=args, kwargs=kwargs)


def step(fn: Any, case: Case) -> list[torch.Tensor]:
    """What a call returns, and what it leaves in its arguments."""
    return flat((fn(*case.args, **case.kwargs), case.args, case.kwargs))


def copied(case: Case) -> Case:
    args, kwargs = change((case.args, case.kwargs), torch.clone)
    return replace(case, args=args, kwargs=kwargs)


def check(name: str, case: Case, label: str = "") -> None:
    """One step of the kernels against one of the torch body, both on the GPU."""
    want, got = step(OPS[name].reference, copied(case)), step(backend(name), copied(case))
    difference = disagreement(got, want, TOLERANCE[name][case.dtype])
    assert difference is None, f"{name} {case.label} {label}: {difference}"


def model_case(model: str, batch: int, kind: torch.dtype, noisy: bool = False, seed: int = 0) -> tuple[str, Case]:
    """A step of a published model in bf16: quantised where the state is int8, else in floats."""
    rng = torch.Generator("cuda").manual_seed(seed)
    made: dict[str, Any] = {"generator": rng, "device": "cuda"}

    def codes(*size: int) -> torch.Tensor:
        return followed(torch.randint(-127, 128, size, dtype=torch.int8, **made))

    def positive(*size: int) -> torch.Tensor:
        return followed(torch.rand(size, **made) * 0.02 + 0.005)

    def normal(*size: int) -> torch.Tensor:
        return followed(torch.randn(size, **made))

    int8 = kind == torch.int8
    noise = torch.tensor([7, 3], device="cuda") if noisy else None
    out = {"out_scale": torch.tensor([0.02], device="cuda")} if int8 else {"out_dtype": torch.bfloat16}
    if model == "mamba1-2.8b":
        inner, N = 5120, 16
        state = codes(batch, inner, N) if int8 else normal(batch, inner, N).to(kind)
        x = codes(batch, inner) if int8 else normal(batch, inner).bfloat16()
        z = normal(batch, 2 * inner).bfloat16()[:, inner:]
        B, C = normal(batch, 160 + 2 * N).bfloat16()[:, 160:].split(N, -1)
        scales = {"x_scale": positive(1), "B_scale": positive(1), "C_scale": positive(1), "z_scale": positive(inner)}
        given = (z, state, positive(batch, inner) if int8 else None, noise, x, normal(batch, inner).bfloat16(),
                 -torch.rand(inner, N, **made) * 4 - 0.1, B, C, normal(inner))  # fmt: skip
        options = {**(scales if int8 else {}), "block": inner, **out}
        return "selective_decode", Case(f"{model} {batch} {kind}", given, options, dtype=torch.bfloat16)
    H, P, G, N = {"mamba2-2.7b": (80, 64, 1, 128), "mamba2-8b": (128, 64, 8, 128)}[model]
    inner, channels = H * P, H * P + 2 * G * N
    state = codes(batch, H, P, N) if int8 else normal(batch, H, P, N).to(kind)
    scales = {
        "conv_in_scale": positive(channels), "conv_weight_scale": positive(channels) * 0.2,
        "conv_out_scale": positive(channels), "x_scale": positive(H, P), "B_scale": positive(G),
        "C_scale": positive(G), "z_scale": positive(inner),
    }  # fmt: skip
    conv = (codes(channels, 4), normal(channels).bfloat16())
    window = codes(batch, 3, channels) if int8 else normal(batch, 3, channels).bfloat16()
    if not int8:
        scales, conv = {}, ((normal(channels, 4) * 0.5).bfloat16(), conv[1])
    projected, scale = normal(batch, inner + channels + H).bfloat16(), positive(batch, H, P) if int8 else None
    A, gain = -torch.rand(H, **made) * 2 - 0.1, normal(inner).bfloat16()
    given = (projected, window, state, scale, noise, *conv, A, normal(H), normal(H), gain, 1e-5)
    options = {**scales, "norm_groups": G, "block": inner, **out}
    return "ssd_decode", Case(f"{model} {batch} {kind}", given, options, dtype=torch.bfloat16)


MODELS = ["mamba1-2.8b", "mamba2-2.7b", "mamba2-8b"]
KINDS = [(torch.float32, False), (torch.float16, False), (torch.int8, False), (torch.int8, True)]


@pytest.mark.parametrize("model", MODELS)
def test_models_at_every_size_of_batch(model: str) -> None:
    for batch in (1, 2, 7, 16, 65, 200):
        for kind, noisy in KINDS:
            name, case = model_case(model, batch, kind, noisy, seed=batch)
            check(name, case)


@pytest.mark.parametrize("model", MODELS)
def test_a_run_of_tokens_stays_with_the_torch_body(model: str) -> None:
    """Back to back on one state, so that a kernel that read ahead of its predecessor's writes would show."""
    name, case = model_case(model, 3, torch.float32)
    mine, other = copied(case), copied(case)
    activations = 0 if name == "ssd_decode" else 4
    for token in range(12):
        fresh = torch.randn(case.args[activations].shape, device="cuda").to(case.args[activations].dtype)
        for each in (mine, other):
            each.args[activations].copy_(fresh)
        torch.cuda.synchronize()
        want = step(OPS[name].reference, other)
        got = step(backend(name), mine)
        difference = disagreement(got, want, 2e-2)
        assert difference is None, f"token {token}: {difference}"


@pytest.mark.parametrize("batch", [5, 40])
@pytest.mark.parametrize("model", MODELS)
def test_steps_without_a_pause_equal_steps_with_one(model: str, batch: int) -> None:
    for kind, noisy in KINDS[1:]:
        name, case = model_case(model, batch, kind, noisy)
        hasty, patient = copied(case), copied(case)
        last = [step(backend(name), hasty) for _ in range(20)][-1]
        for _ in range(20):
            want = step(backend(name), patient)
            torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(last, want, strict=True)), f"{model} {kind}"


@pytest.mark.parametrize("batch", [2, 40])
@pytest.mark.parametrize("model", ["mamba1-2.8b", "mamba2-2.7b"])
def test_a_captured_graph_replays_and_draws_anew(model: str, batch: int) -> None:
    name, case = model_case(model, batch, torch.int8, noisy=True)
    eager, captured = copied(case), copied(case)
    step(backend(name), copied(case))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = flat(backend(name)(*captured.args, **captured.kwargs))
    for replay in range(4):
        graph.replay()
        torch.cuda.synchronize()
        want = step(backend(name), eager)
        got = [*outputs, *flat((captured.args, captured.kwargs))]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), f"replay {replay}"
    assert captured.args[3 if name == "selective_decode" else 4].tolist() == [7, 7]


@pytest.mark.parametrize("batch", [1, 8])
def test_stochastic_rounding_is_unbiased(batch: int) -> None:
    """Many draws of one step: the mean of the stored state approaches the state that the floats would leave."""
    name, case = model_case("mamba2-2.7b", batch, torch.int8, noisy=True)
    exact = copied(case)
    exact.args[4].copy_(torch.tensor([7, 3]))
    nearest = copied(replace(case, args=(*case.args[:4], None, *case.args[5:])))
    step(backend(name), nearest)
    total = torch.zeros(case.args[2].shape, device="cuda", dtype=torch.float64)
    for draw in range(200):
        once = copied(case)
        once.args[4][1] = draw
        step(backend(name), once)
        total += once.args[2].double()
    gap = total / 200 - nearest.args[2].double()
    assert abs(float(gap.mean())) < 2e-3 and float(gap.abs().max()) < 1.0 and float(gap.std()) < 0.4


def test_codes_of_values_beside_an_integer_are_off_by_one_at_most() -> None:
    """An input of zero leaves the old codes, a last place above or below an integer: where the dither wraps around and
    the torch body's does not, or the other way round, such a code is off by 2."""
    _, case = model_case("mamba2-2.7b", 65, torch.int8, noisy=True)
    case.args[2].clamp_(max=-1)[..., 0] = 127
    case.kwargs["x_scale"].zero_()
    for draw in range(24):
        case.args[4][1] = draw
        check("ssd_decode", case, f"draw {draw}")


@pytest.mark.parametrize("idle", [False, True])
def test_rows_whose_decay_underflows_are_forgotten(idle: bool) -> None:
    """With an input and without: nothing is left of the old codes, and without one the row is zero."""
    _, case = model_case("mamba2-2.7b", 65, torch.int8, noisy=True)
    case.args[7].fill_(-1e6)  # A
    if idle:
        case.kwargs["x_scale"].zero_()
    check("ssd_decode", case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("model", ["mamba2-2.7b", "mamba2-8b"])
def test_int8_states_of_float_activations(model: str, dtype: torch.dtype) -> None:
    for batch in (3, 16, 65):
        for noisy in (False, True):
            _, codes = model_case(model, batch, torch.int8, noisy, seed=batch)
            _, floats = model_case(model, batch, torch.float16, seed=batch)
            given = [
                t.to(dtype) if isinstance(t, torch.Tensor) and t.dtype == torch.bfloat16 else t for t in floats.args
            ]
            given[2:5] = codes.args[2:5]
            check("ssd_decode", replace(floats, args=tuple(given), kwargs={**floats.kwargs, "out_dtype": dtype}))


@pytest.mark.parametrize(
    ("H", "G", "N"), [(16, 1, 64), (16, 2, 64), (16, 2, 128), (16, 4, 128), (16, 1, 256), (16, 2, 256), (1, 1, 128)]
)
def test_groups_of_many_sequences_that_blocks_fill_in_part(H: int, G: int, N: int) -> None:
    """About as many rows as the device streams in one wave, in groups that whole blocks do not always make up."""
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    rng, P = torch.Generator("cuda").manual_seed(G * N), 64
    batch = 300 * sms // (H * P) + 3
    made: dict[str, Any] = {"generator": rng, "device": "cuda"}
    inner, channels = H * P, H * P + 2 * G * N

    def positive(*size: int) -> torch.Tensor:
        return torch.rand(size, **made) * 0.02 + 0.005

    def codes(*size: int) -> torch.Tensor:
        return torch.randint(-127, 128, size, dtype=torch.int8, **made)

    for noise in (None, torch.tensor([5, 9], device="cuda")):
        given = (
            torch.randn(batch, inner + channels + H, **made).half(), codes(batch, 3, channels), codes(batch, H, P, N),
            positive(batch, H, P), noise, codes(channels, 4), torch.randn(channels, **made),
            -torch.rand(H, **made), torch.randn(H, **made), torch.randn(H, **made), None, 1e-5,
        )  # fmt: skip
        options = {
            "conv_in_scale": positive(1), "conv_weight_scale": positive(channels) * 0.2,
            "conv_out_scale": positive(channels), "x_scale": positive(H, P), "B_scale": positive(G),
            "C_scale": positive(G), "z_scale": positive(1), "block": min(inner, 256), "per_token": True,
            "dt_limit": (0.01, 2.0),
        }  # fmt: skip
        check("ssd_decode", Case(f"H={H} G={G} N={N} rng={noise is not None}", given, options, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", NAMES)
def test_same_inputs_give_the_same_bits(name: str) -> None:
    for case in map(on_gpu, cases(name)[::4]):
        first = step(backend(name), copied(case))
        for _ in range(3):
            again = step(backend(name), copied(case))
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), case.label


@pytest.mark.parametrize("name", NAMES)
def test_runs_on_the_current_stream(name: str) -> None:
    """The input is written on a stream of its own, late: a kernel on any other stream would read what was there."""
    case = on_gpu(cases(name)[-1])
    want, late, stream = step(backend(name), copied(case)), copied(case), torch.cuda.Stream()
    first = late.args[0].clone()
    late.args[0].zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.args[0].copy_(first)
        got = step(backend(name), late)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", STEPS)
def test_layouts_are_read_right_or_refused(name: str) -> None:
    case = on_gpu(next(c for c in cases(name) if "int8" in c.label and c.args[0].shape[0] > 1))
    want = step(backend(name), copied(case))
    apart = copied(case)
    first = apart.args[0]
    apart = replace(apart, args=(torch.cat([first, first], 1)[:, : first.shape[1]], *apart.args[1:]))
    assert all(torch.equal(a, b) for a, b in zip(step(backend(name), apart), want, strict=True))
    at = 1 if name == "selective_decode" else 2
    state = case.args[at]
    transposed = state.transpose(0, 1).contiguous().transpose(0, 1)
    shifted = torch.empty(state.numel() + 1, dtype=state.dtype, device="cuda")[1:].view(state.shape).copy_(state)
    for other in (transposed, shifted):
        with pytest.raises(ValueError, match="state .* has to be contiguous and aligned"):
            backend(name)(*case.args[:at], other, *case.args[at + 1 :], **case.kwargs)
    with pytest.raises(ValueError, match="state has to be .* on cuda"):
        backend(name)(*case.args[:at], state.cpu(), *case.args[at + 1 :], **case.kwargs)


def test_constants_that_would_have_to_be_copied_are_refused() -> None:
    """The kernels read them before they wait for those before them, so for a copy too."""
    _, case = model_case("mamba2-2.7b", 1, torch.int8)

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device="cuda")[1:].view(tensor.shape).copy_(tensor)

    taps, D, dt_bias, gain = 5, 8, 9, 10
    for at, other, sentence in (
        (taps, shifted(case.args[taps]), "conv_weight .* has to be contiguous and aligned; pass a clone"),
        (gain, shifted(case.args[gain]), "norm_weight .* has to be contiguous and aligned; pass a clone"),
        (D, case.args[D].half(), "D has to be torch.float32"),
        (dt_bias, case.args[dt_bias].half(), "dt_bias has to be torch.float32"),
    ):
        with pytest.raises(ValueError, match=sentence):
            backend("ssd_decode")(*case.args[:at], other, *case.args[at + 1 :], **case.kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_says_what_is_written(name: str) -> None:
    case = on_gpu(cases(name)[2])
    names = [argument.name for argument in getattr(torch.ops.quamba, name).default._schema.arguments]
    bound = dict(zip(names, case.args, strict=False)) | case.kwargs
    low, high = bound.pop("dt_limit", (0.0, float("inf")))
    defaults = {"norm_groups": 0, "block": 0, "per_token": False, "dt_min": low, "dt_max": high,
                "out_dtype": torch.float32}  # fmt: skip
    given = tuple(bound.get(n, defaults.get(n)) for n in names)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.quamba, name).default, given, test_utils=checks)


def test_an_unsupported_shape_is_refused_when_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUAMBA_BACKEND", "cuda")
    sizes = {"H": 8, "P": 64, "G": 1, "N": 128, "W": 4, "I": 512}
    assert OPS["ssd_decode"].bind(Setting("cuda", torch.bfloat16, sizes)).name == "cuda"
    with pytest.raises(BackendUnavailable, match="takes d_state 16 or 32 or 64 or 128 or 256, got 96"):
        OPS["ssd_decode"].bind(Setting("cuda", torch.bfloat16, {**sizes, "N": 96}))
    with pytest.raises(BackendUnavailable, match="takes convolutions over 4 tokens, got 3"):
        OPS["ssd_decode"].bind(Setting("cuda", torch.bfloat16, {**sizes, "W": 3}))
