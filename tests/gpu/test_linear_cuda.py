"""The CUDA linears on a GPU, beyond the loop of test_ops.py: real sizes, streams, graphs, torch.compile, refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from quamba_kernels import OPS, Backend, BackendUnavailable, Setting
from quamba_kernels.cuda import linear
from quamba_kernels.testing import TOLERANCE, disagreement, followed

NAMES = ["linear_w8a8", "linear_w4a8", "linear_w4a16"]
ROWS = [1, 3, 17, 63, 129, 1000]
SHAPES = [(96, 40, 32), (512, 192, 64), (1600, 520, 64), (2560, 1056, 128), (2560, 264, 2560), (5120, 2568, 128)]
"""K in features, O out features, S group size."""
ZEROS = -0x77777778
"""A word of eight int4 zeros."""


def why_skip() -> str | None:
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    return OPS["linear_w4a16"].explain(Setting("cuda", torch.bfloat16, {"K": 512, "O": 192, "S": 64}))["cuda"]


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(why_skip()), reason=str(why_skip()))]


def kernel(name: str) -> Backend:
    return next(b for b in OPS[name].backends if b.name == "cuda")


def prepacked(name: str, weights: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    found = kernel(name).prepack(weights)
    return weights if found is weights else tuple(map(followed, found))


def backend(name: str) -> Callable[..., Any]:
    """The kernel for weights as they are stored."""
    return lambda *given, **options: kernel(name)(
        *(prepacked(name, part) if isinstance(part, tuple) else part for part in given), **options
    )


def draw(name: str, rows: int, shape: tuple[int, int, int], dtype: torch.dtype = torch.bfloat16, seed=0) -> list[Any]:
    """x, its scale if it is int8, and weights: saturating values in the first row, zeros in the last ones."""
    K, O, S = shape
    rng = torch.Generator("cuda").manual_seed(seed)

    def codes(low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high + 1, size, generator=rng, device="cuda", dtype=torch.int8)

    def positive(*size: int) -> torch.Tensor:
        return torch.rand(size, generator=rng, device="cuda") * 0.02 + 0.005

    if name == "linear_w8a8":
        w = codes(-127, 127, O, K)
        w[0], w[-1] = 127, 0
        weights = (w, positive(O))
    else:
        low = -7 if name == "linear_w4a8" else -8
        nibbles = codes(low + 8, 15, O, K // 8, 8).int()
        nibbles[0] = 15
        packed = (nibbles << torch.arange(0, 32, 4, device="cuda", dtype=torch.int32)).sum(-1, dtype=torch.int32)
        packed[-1, : S // 8] = ZEROS
        packed[O // 2] = ZEROS
        signed = positive(O, K // S) * (codes(0, 1, O, K // S) * 2 - 1)
        weights = (packed, codes(1, 17, O, K // S), positive(O)) if name == "linear_w4a8" else (packed, signed.half())
    if name == "linear_w4a16":
        x = torch.randn(rows, K, generator=rng, device="cuda").to(dtype)
        x[-1] = 0 if rows > 1 else 1
        return [followed(x), tuple(map(followed, weights))]
    x = codes(-127, 127, rows, K)
    x[0] = 127
    scale = positive(rows, 1) if rows % 2 else torch.tensor([0.02], device="cuda")
    return [followed(x), followed(scale), tuple(map(followed, weights))]


def variants(name: str, rows: int, outputs: int) -> list[dict[str, Any]]:
    """Epilogues: floats of each type, bias and residual, int8 with one scale and with one per channel."""
    bias, residual = torch.randn(outputs, device="cuda"), torch.randn(rows, outputs, device="cuda")
    scales = torch.rand(outputs, device="cuda") * 0.5 + 0.05
    floats = (torch.bfloat16, torch.float16, torch.float32)
    plain = [{"out_dtype": dtype} for dtype in floats]
    added = [{"bias": followed(bias.to(d)), "residual": followed(residual.to(d)), "out_dtype": d} for d in floats]
    mixed = [{"bias": bias.bfloat16(), "residual": residual, "out_dtype": torch.bfloat16}]
    codes = [{"out_scale": scales}, {"out_scale": scales[:1].clone(), "residual": residual.bfloat16()}]
    return plain + added + mixed + codes


def tolerance(name: str, given: list[Any], options: dict[str, Any]) -> float:
    """That of the coarsest type that takes part: of x, or of the result."""
    types = {options.get("out_dtype", torch.float32)} | ({given[0].dtype} - {torch.int8})
    known = TOLERANCE[name]
    return max(known.get(dtype, known[torch.bfloat16]) for dtype in types)


def check(name: str, given: list[Any], options: dict[str, Any], label: str, got: torch.Tensor | None = None) -> None:
    want = OPS[name].reference(*given, **options)
    got = backend(name)(*given, **options) if got is None else got
    if name == "linear_w4a16" and got.dtype == torch.int8:
        # A kernel may round q * scale to the type of x, by up to half a unit of its last place; the sum of a row then
        # moves by less than that share of itself, and a code changes as often as that is of a code.
        gap, ulp = (got.int() - want.int()).abs(), {torch.bfloat16: 2**-8, torch.float16: 2**-11}[given[0].dtype]
        share = ulp * float(want.float().square().mean().sqrt()) + 0.005
        expected = share * gap.numel()  # of a small result the codes that change are few, and vary
        assert gap.max() <= 1 and int((gap > 0).sum()) < expected + 4 * expected**0.5, label
        return
    difference = disagreement([got], [want], tolerance(name, given, options))
    assert difference is None, f"{name} {label}: {difference}"


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "K{} O{} S{}".format(*s))
@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_the_torch_body(name: str, shape: tuple[int, int, int]) -> None:
    for index, rows in enumerate(ROWS):
        for dtype in linear.HALVES if name == "linear_w4a16" else (torch.bfloat16,):
            given, epilogues = draw(name, rows, shape, dtype), variants(name, rows, shape[1])
            for options in epilogues if rows in (3, 129) else epilogues[index::3]:
                check(name, given, options, f"{rows} rows {shape} {dtype} {list(options)}")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", NAMES)
def test_every_row_count_up_to_the_gemm(name: str) -> None:
    """Rows beyond M are neither read nor written: what lies behind the result stays as it was."""
    for rows in [*range(1, 40), *range(60, 70), *range(125, 132), 255, 256, 257]:
        check(name, draw(name, rows, (512, 72, 128)), {"out_dtype": torch.float32}, f"{rows} rows")


@pytest.mark.parametrize("name", NAMES)
def test_shapes_of_models(name: str) -> None:
    for shape in ((2560, 10576, 128), (5120, 2560, 128), (5120, 192, 128), (160, 5120, 160)):
        for rows in (1, 64, 300):
            check(name, draw(name, rows, shape), {"out_dtype": torch.bfloat16}, f"{rows} rows {shape}")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    "shape", [(2560, 10576, 128), (5120, 2560, 128), (2560, 2568, 128), (512, 2560, 128), (5120, 184, 128)]
)
@pytest.mark.parametrize("name", NAMES)
def test_prompts(name: str, shape: tuple[int, int, int]) -> None:
    """The tiles of many rows, with ends that they do not divide and every epilogue."""
    for rows in (2048, 1930, 4100):
        given = draw(name, rows, shape)
        for options in variants(name, rows, shape[1]):
            check(name, given, options, f"{rows} rows {shape} {list(options)}")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    "shape",
    [
        (2560, 10576, 128), (5120, 2560, 128), (8192, 1032, 128), (640, 184, 640), (512, 2640, 128), (384, 4384, 128),
        (1600, 520, 32), (1600, 520, 64), (8320, 264, 128),
    ],
    ids=lambda s: "K{} O{} S{}".format(*s),
)  # fmt: skip
def test_int4_is_multiplied_directly_in_every_tile(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an expansion would be faster, too; odd numbers of rows, every epilogue, groups of any size and number."""
    if linear.library(0).arch != "sm_90a":
        pytest.skip("is for Hopper")
    monkeypatch.setattr(linear, "FEW_TILES", dict.fromkeys(linear.FEW_TILES, {}))
    monkeypatch.setattr(linear, "W4A8_SKINNY_ROWS", 0)
    monkeypatch.setattr(linear, "W4A8_GEMM_O", 0)
    for limit in ("W4A8_ANY_ROWS", "W4A8_GEMM_ROWS", "W4A8_MOST_ROWS"):
        monkeypatch.setattr(linear, limit, 10**6)
    K, outputs, size = shape
    for rows in (3, 129, 600, 2048, 1930, 4100):
        given = draw("linear_w4a8", rows, shape)
        assert linear.w4a8_gemm(rows, outputs, K, size, given[0].device)
        for options in variants("linear_w4a8", rows, shape[1]):
            check("linear_w4a8", given, options, f"{rows} rows {shape} {list(options)}")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_that_splits_columns_serves_every_shape(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that fill no tile, columns that fill no step or lie across groups, out features that fill no tile."""
    if linear.library(0).arch != "sm_90a":
        pytest.skip("is for Hopper")
    monkeypatch.setattr(linear, "FEW_TILES", dict.fromkeys(linear.FEW_TILES, {1000: 10**6}))
    shapes = [(192, 264, 64), (1600, 520, 64), (5120, 192, 640), (1152, 136, 192), (64, 8, 64), (8192, 1032, 128)]
    for shape in [*shapes, (2560, 264, 64), (2560, 10576, 128), (2560, 50280, 128)]:
        counts = (1, 4, 7, 9, 15, 16, 27, 33, 64, 65, 129, 255, 1000) if shape[1] < 10000 else (2, 16, 61)
        for index, rows in enumerate(counts):
            given, epilogues = draw(name, rows, shape), variants(name, rows, shape[1])
            options = epilogues[index % len(epilogues)]
            first = backend(name)(*given, **options)
            check(name, given, options, f"{rows} rows {shape} {list(options)}", first)
            assert all(torch.equal(backend(name)(*given, **options), first) for _ in range(3))


@pytest.mark.parametrize("dtype", linear.HALVES)
def test_what_is_not_finite_reaches_the_result_as_defined(dtype: torch.dtype) -> None:
    """An infinity times the code 0 is no number, times another an infinity, of the sign that the scale gives it."""
    name, rest = "linear_w4a16", {"out_dtype": torch.float32}
    for rows in (1, 9, 20, 40, 300):
        x, weights = draw(name, rows, (640, 264, 64), dtype)
        x[0, 5] = torch.inf
        x[rows // 2, 130] = -torch.inf
        x[-1, 639] = torch.nan if rows > 9 else x[-1, 639]
        want, got = OPS[name].reference(x, weights, **rest), backend(name)(x, weights, **rest)
        assert want.isinf().any() and want.isnan().any() and torch.equal(got.isnan(), want.isnan()), f"{rows} rows"
        assert torch.equal(got.nan_to_num(0).sign() * got.isinf(), want.nan_to_num(0).sign() * want.isinf())


@pytest.mark.parametrize("name", NAMES)
def test_both_paths_agree_on_every_row_count(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "FEW_TILES", dict.fromkeys(linear.FEW_TILES, {}))
    constant = {"linear_w8a8": "W8A8", "linear_w4a8": "W4A8", "linear_w4a16": "W4A16"}[name] + "_SKINNY_ROWS"
    for limit, counts, narrowest in ((0, (1, 2, 16, 63), 0), (0, (1, 63), 4096), (256, (65, 128, 255, 256), 0)):
        monkeypatch.setattr(linear, constant, limit)
        monkeypatch.setattr(linear, "W4A8_GEMM_O", narrowest)
        for rows in counts:
            check(name, draw(name, rows, (1600, 264, 64)), {"out_dtype": torch.float32}, f"{rows} rows, limit {limit}")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("name", NAMES)
def test_a_linear_that_normalises_its_input(name: str) -> None:
    """Static and dynamic scales, with and without gain."""
    dtype, op = torch.float16, "norm_linear"
    for shape in ((2560, 10576, 128), (5120, 2560, 128), (4096, 1056, 128), (640, 264, 128)):
        K, outputs, _ = shape
        for rows in (1, 2, 3, 64):
            *_, weights = draw(name, rows, shape, dtype)
            x = torch.randn(rows, K, device="cuda").to(torch.float32 if rows % 2 else dtype)
            gain = torch.rand(K, device="cuda").to(dtype) + 0.5 if rows != 2 else None
            into: dict[str, Any] = {"in_dtype": dtype}
            if name != "linear_w4a16":
                into |= {"per_token": True} if rows == 2 else {"in_scale": torch.tensor([0.05], device="cuda")}
            given = (x, gain, 1e-5, weights, None, torch.randn(rows, outputs, device="cuda").to(dtype))
            options = {"linear": name, "out_dtype": dtype, **into}
            want, got = OPS[op].reference(*given, **options), backend(op)(*given, **options)
            difference = disagreement([got], [want], TOLERANCE[op][dtype])
            assert difference is None, f"{name} {rows} rows {shape}: {difference}"


@pytest.mark.parametrize(("name", "rows", "size"), [
    ("linear_w8a8", 600, 128), ("linear_w8a8", 2048, 128), ("linear_w8a8", 9000, 128), ("linear_w4a8", 100, 32),
    ("linear_w4a8", 600, 128), ("linear_w4a8", 2048, 128), ("linear_w4a8", 9000, 128),
])  # fmt: skip
def test_many_tokens_pass_norms_and_linears_that_overlap(name: str, rows: int, size: int) -> None:
    """In a chain, where a linear's scratch lies where those before it were read; eager, and in a graph replayed."""
    dtype, scale = torch.float16, torch.tensor([0.05], device="cuda")
    layers = [draw(name, 1, (2560, 2560, size), dtype, seed=i)[-1] for i in range(6)]
    first = torch.randn(rows, 2560, device="cuda")
    ones = torch.ones(2560, device="cuda")

    def chain(x: torch.Tensor, together: bool) -> list[torch.Tensor]:
        found = []
        for weights in layers:
            if together:
                options = {"in_scale": scale, "in_dtype": dtype, "out_dtype": torch.float32, "linear": name}
                x = backend("norm_linear")(x, ones, 1e-5, weights, None, x, **options)
            else:
                u = backend("rms_norm")(x, ones, 1e-5, out_scale=scale, out_dtype=dtype)
                torch.cuda.synchronize()
                x = backend(name)(*u, weights, None, x, out_dtype=torch.float32)
                torch.cuda.synchronize()
            found.append(x)
        return found

    want = chain(first, together=False)
    for _ in range(5):
        assert all(map(torch.equal, chain(first, together=True), want))
    strided = first.unsqueeze(-1).repeat(1, 1, 2)[..., 0]
    assert all(map(torch.equal, chain(strided, together=True), want))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(first, together=True)
    for _ in range(5):
        for tensor in got:
            tensor.zero_()
        graph.replay()
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("name", NAMES)
def test_leading_dimensions_and_no_rows(name: str) -> None:
    x, *rest = draw(name, 6, (512, 192, 64))
    want = backend(name)(x, *rest)
    y = backend(name)(x.view(2, 3, 512), *rest)
    assert y.shape == (2, 3, 192) and torch.equal(y.view(6, 192), want)
    assert backend(name)(x[:0].view(2, 0, 512), *rest).shape == (2, 0, 192)


@pytest.mark.parametrize("rows", [3, 200])
@pytest.mark.parametrize("name", NAMES)
def test_layouts_are_read_right_or_refused(name: str, rows: int) -> None:
    run, (x, *scale, stored) = kernel(name), draw(name, rows, (512, 192, 64))
    weights = run.prepack(stored)
    want = run(x, *scale, weights)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view(x.shape).copy_(x)
    for same in (x.T.contiguous().T, torch.cat([x, x], 1)[:, :512], shifted):
        assert torch.equal(run(same, *scale, weights), want)
    transposed = (weights[0].transpose(0, 1).contiguous().transpose(0, 1), *weights[1:])
    with pytest.raises(ValueError, match="w .* is not contiguous"):
        run(x, *scale, transposed)
    flat = torch.empty(weights[0].numel() + 1, dtype=weights[0].dtype, device="cuda")[1:]
    with pytest.raises(ValueError, match="w .*does not start at a multiple of 16 bytes"):
        run(x, *scale, (flat.view(weights[0].shape).copy_(weights[0]), *weights[1:]))
    with pytest.raises(ValueError, match="lies on cpu"):
        run(x, *scale, (weights[0].cpu(), *weights[1:]))
    if name == "linear_w4a16" and linear.library(0).arch == "sm_90a":
        with pytest.raises(ValueError, match=r"w as prepacked has to be \[192, 16, 4\], got \[192, 64\]"):
            run(x, *scale, stored)


@pytest.mark.parametrize("rows", [2, 300])
@pytest.mark.parametrize("name", NAMES)
def test_runs_on_the_current_stream(name: str, rows: int) -> None:
    """The input is written on a stream of its own, late: a kernel on any other stream would read what was there."""
    x, *rest = draw(name, rows, (2560, 264, 128))
    want, late, stream = backend(name)(x, *rest), torch.zeros_like(x), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        y = backend(name)(late, *rest)
    stream.synchronize()
    assert torch.equal(y, want)


@pytest.mark.parametrize("rows", [1, 16, 300])
@pytest.mark.parametrize("name", NAMES)
def test_a_captured_graph_replays(name: str, rows: int) -> None:
    x, *rest = draw(name, rows, (2560, 264, 128))
    options = {"residual": torch.randn(rows, 264, device="cuda"), "out_dtype": torch.bfloat16}
    backend(name)(x, *rest, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = backend(name)(x, *rest, **options)
        z = backend(name)(x, *rest, **options)  # a second one, so that scratch memory is used again
    for seed in (1, 2, 3):
        x.copy_(draw(name, rows, (2560, 264, 128), seed=seed)[0])
        y.fill_(torch.nan), z.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        check(name, [x, *rest], options, f"replay {seed}", y)
        assert torch.equal(y, z)


@pytest.mark.parametrize("rows", [1, 64, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_same_inputs_give_the_same_bits(name: str, rows: int) -> None:
    given = draw(name, rows, (5120, 2568, 128))
    first = backend(name)(*given, out_dtype=torch.float32)
    assert all(torch.equal(backend(name)(*given, out_dtype=torch.float32), first) for _ in range(5))


@pytest.mark.parametrize("name", NAMES)
def test_compiles_into_one_graph(name: str) -> None:
    torch.compiler.reset()
    run, (x, *rest) = kernel(name), draw(name, 4, (512, 192, 64))
    rest[-1] = run.prepack(rest[-1])
    compiled = torch.compile(lambda x: run.fn(x, *rest, out_dtype=torch.bfloat16) * 2, fullgraph=True)
    assert torch.equal(compiled(x), run(x, *rest, out_dtype=torch.bfloat16) * 2)
    checks = ("test_schema", "test_faketensor")
    arguments = (*(t for part in (x, *rest) for t in (part if isinstance(part, tuple) else (part,))), None, None, None)
    torch.library.opcheck(getattr(torch.ops.quamba, name).default, (*arguments, torch.bfloat16), test_utils=checks)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", NAMES)
def test_runs_on_the_device_of_its_input(name: str) -> None:
    given = draw(name, 5, (512, 192, 64))
    moved = [tuple(t.to("cuda:1") for t in g) if isinstance(g, tuple) else g.to("cuda:1") for g in given]
    y = backend(name)(*moved)
    assert y.device == torch.device("cuda:1") and torch.equal(y.cpu(), backend(name)(*given).cpu())


def test_an_unsupported_shape_is_refused_when_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUAMBA_BACKEND", "cuda")
    for name in NAMES:
        assert OPS[name].bind(Setting("cuda", torch.bfloat16, {"K": 256, "O": 64, "S": 64})).name == "cuda"
        with pytest.raises(BackendUnavailable, match="K a multiple of 32 and O a multiple of 8, got K=200 and O=64"):
            OPS[name].bind(Setting("cuda", torch.bfloat16, {"K": 200, "O": 64, "S": 200}))
