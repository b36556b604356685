"""The CUDA kernels between the linears on a GPU, beyond the loop of test_ops.py: real sizes, streams, graphs."""

from typing import Any

import pytest
import torch

from quamba_kernels import OPS, Backend, Setting
from quamba_kernels.cuda import scan
from quamba_kernels.testing import TOLERANCE, change, disagreement, flat, followed

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = [
    "rms_norm", "quantize", "gate_output", "rotate_input", "causal_conv1d", "selective_scan", "selective_prefill",
]  # fmt: skip
LENGTHS = [1, 3, 63, 255, 257, 1000]
RAGGED = (0, 1, 3, 63, 0, 255, 257, 1000, 2, 0)


def why_skip() -> str | None:
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    return OPS["rms_norm"].explain(Setting("cuda", BF16))["cuda"]


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(why_skip()), reason=str(why_skip()))]


def backend(name: str) -> Backend:
    return next(b for b in OPS[name].backends if b.name == "cuda")


def normal(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return followed(torch.randn(shape, device="cuda").to(dtype))


def codes(*shape: int) -> torch.Tensor:
    return followed(torch.randint(-127, 128, shape, device="cuda", dtype=torch.int8))


def scales(*shape: int) -> torch.Tensor:
    return followed(torch.rand(shape, device="cuda") * 0.02 + 0.005)


def part_of_wider(tensor: torch.Tensor, left: int = 24, right: int = 40) -> torch.Tensor:
    """The same values as columns of a wider tensor, as a projection's outputs lie."""
    wide = torch.full((*tensor.shape[:-1], left + tensor.shape[-1] + right), 3, device="cuda").to(tensor.dtype)
    view = wide[..., left : left + tensor.shape[-1]]
    return view.copy_(tensor)


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the same strides, of all that lies around it too."""
    whole = tensor.untyped_storage().clone()
    return tensor.new_empty(0).set_(whole, tensor.storage_offset(), tensor.shape, tensor.stride())


def check(name: str, args: tuple[Any, ...], options: dict[str, Any], label: str) -> None:
    """What the kernel returns and leaves in its arguments against the torch body, which runs on the same device."""
    own, theirs = change((args, options), copied), change((args, options), copied)
    want = flat(OPS[name].reference(*theirs[0], **theirs[1])) + flat(theirs)
    got = flat(backend(name)(*own[0], **own[1])) + flat(own)  # states are updated in place
    dtype = options.get("out_dtype", F32)
    tolerance = TOLERANCE[name].get(dtype, TOLERANCE[name][BF16])
    difference = disagreement(got, want, tolerance)
    assert difference is None, f"{name} {label}: {difference}"


def outputs() -> list[dict[str, Any]]:
    """int8 with a static scale and with one per row, and floats of each type."""
    return [{"out_scale": scales(1)}, {"per_token": True}, *({"out_dtype": dtype} for dtype in (F32, F16, BF16))]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("width", [1, 7, 1000, 2560, 4096, 5120, 8192, 10576, 16384, 20001])
def test_rows(width: int) -> None:
    for index, rows in enumerate([*LENGTHS, 131]):
        dtype = (F32, F16, BF16)[index % 3]
        x = normal(rows, width, dtype=dtype) * 5
        x[-1] = 0
        weight = [None, normal(width, dtype=dtype)][rows % 2]
        for given in (x, part_of_wider(x), part_of_wider(x, 1, 2)):
            for out in outputs():
                check("rms_norm", (given, weight, 1e-5), out, f"{rows} x {width} {dtype} {list(out)}")
            for scale in (None, scales(1), scales(width)):
                check("quantize", (given, scale), {}, f"{rows} x {width} {dtype}")


GATES = [
    (192, (192, 64, 12, 0), (0, 1, 2)), (1536, (1536, 512), (1,)), (2048, (2048,), (0, 4)),
    (2560, (2560, 128), (0, 1)), (3072, (3072,), (1,)),
    (4096, (4096,), (0, 1, 8)), (5120, (5120, 1024, 0), (0, 1, 10)), (8192, (8192,), (1, 8)), (1792, (1792, 28), (1,)),
    (9216, (9216, 36), (3,)), (10240, (10240,), (1,)), (20480, (20480,), (8,)), (130, (2, 0), (5, 13)),
]  # fmt: skip
"""Channels, Hadamard blocks, groups of the norm."""


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("inner, blocks, groups", GATES, ids=[str(g[0]) for g in GATES])
def test_gate_output(inner: int, blocks: tuple[int, ...], groups: tuple[int, ...]) -> None:
    for index, rows in enumerate((1, 3, 63, 300)):
        for block in blocks:
            for norm_groups in groups:
                dtype = (F32, BF16, F16)[index % 3]
                weight = normal(inner, dtype=dtype) if norm_groups else None
                y, z = normal(rows, inner, dtype=dtype), part_of_wider(normal(rows, inner, dtype=dtype))
                z[0, ::7] *= 100  # far beyond the scales
                gates = ((z, None), (part_of_wider(codes(rows, inner)), scales(1)), (z, scales(1)), (z, scales(inner)))
                for kind, (gate, z_scale) in enumerate(gates):
                    for out in outputs()[(index + kind) % 2 :: 2]:
                        options = {"z_scale": z_scale, "norm_groups": norm_groups, "block": block, **out}
                        label = f"{rows} x {inner} block {block} groups {norm_groups} {dtype} z {kind} {list(out)}"
                        check("gate_output", (y, gate, weight, 1e-5), options, label)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("inner", [2048, 3072, 4096, 5120, 8192, 10240])
def test_gate_output_of_the_type_of_its_inputs(inner: int, dtype: torch.dtype) -> None:
    """What 16-bit activations take: no scales, a weight of their type or none; more rows than blocks find room, too."""
    for rows in (1, 3, 300, 1101):
        for norm_groups in (0, 1, 4, inner // 256):
            for weight in (None, normal(inner, dtype=dtype)):
                y, z = normal(rows, inner, dtype=dtype), part_of_wider(normal(rows, inner, dtype=dtype))
                z[0, ::7] *= 100
                options = {"norm_groups": norm_groups, "block": inner, "out_dtype": dtype}
                label = f"{rows} x {inner} groups {norm_groups} {dtype} weight {weight is not None}"
                check("gate_output", (y, z, weight, 1e-5), options, label)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("inner, blocks", [g[:2] for g in GATES], ids=[str(g[0]) for g in GATES])
def test_rotate_input(inner: int, blocks: tuple[int, ...]) -> None:
    for index, rows in enumerate((1, 3, 63, 700)):
        for block in blocks:
            for dtype in (F32, BF16, F16):
                x = normal(rows, inner, dtype=dtype)
                x[-1] = 0
                for given in (x, part_of_wider(x)):
                    for out in outputs()[index % 2 :: 2]:
                        label = f"{rows} x {inner} block {block} {dtype} {list(out)}"
                        check("rotate_input", (given, block), out, label)


def conv_arguments(
    batch: int, tokens: int, channels: int, width: int, mode: str, sequences: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """mode: "int8", "float" or "rounds"."""
    int8 = mode != "float"
    x = codes(batch, tokens, channels) if mode == "int8" else normal(batch, tokens, channels, dtype=BF16)
    state = codes(sequences, width - 1, channels) if int8 else normal(sequences, width - 1, channels, dtype=BF16)
    weight = codes(channels, width) if int8 else normal(channels, width, dtype=BF16)
    options: dict[str, Any] = {"weight_scale": scales(channels), "out_scale": scales(channels)} if int8 else {}
    options |= {"int8": {"x_scale": scales(channels)}, "rounds": {"in_scale": scales(channels)}}.get(mode, {})
    return (part_of_wider(x), weight, normal(channels, dtype=BF16), state), options


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mode", ["int8", "float", "rounds"])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_causal_conv1d(tokens: int, mode: str) -> None:
    for batch, channels, width in ((1, 5376, 4), (2, 130, 4), (5, 41, 3), (3, 64, 2), (4, 3, 4)):
        args, options = conv_arguments(batch, tokens, channels, width, mode, batch)
        label = f"{batch} x {tokens} x {channels} W={width} {mode}"
        check("causal_conv1d", args, options, label)
        check("causal_conv1d", (args[0], args[1]), {**options, "out_scale": None, "out_dtype": F32}, label)


def bounds(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor((0, *lengths), device="cuda").cumsum(0, dtype=torch.int32)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("lengths", [*((n,) for n in LENGTHS), RAGGED, (1,) * 40, (2, 9, 1, 8, 3, 7, 17) * 9], ids=str)
def test_convolution_of_the_type_of_its_inputs(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    """What 16-bit activations take; weights of any type, sequences as rows or one after the other."""
    tokens, ragged = sum(lengths), len(lengths) > 1
    for batch, channels in ((1, 5376), (1, 132), *(() if ragged else ((3, 68), (70, 132)))):
        sequences = len(lengths) if ragged else batch
        options = {"out_dtype": dtype, **({"cu_seqlens": bounds(lengths)} if ragged else {})}
        int8 = codes(channels, 4), {"weight_scale": scales(channels)}
        for weight, extra in ((normal(channels, 4, dtype=dtype), {}), (normal(channels, 4), {}), int8):
            x, state = normal(batch, tokens, channels, dtype=dtype), normal(sequences, 3, channels, dtype=dtype)
            label = f"{lengths} {batch} x {channels} {dtype} weight {weight.dtype}"
            bias = normal(channels, dtype=weight.dtype if weight.is_floating_point() else F32)
            check("causal_conv1d", (part_of_wider(x), weight, bias, state), {**options, **extra}, label)
            check("causal_conv1d", (x, weight), {**options, **extra}, f"{label} alone")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("mode", ["int8", "float", "rounds"])
def test_convolution_of_sequences(mode: str) -> None:
    for lengths in (RAGGED, (1,) * 40, (2, 9, 1, 8, 3, 7, 17) * 9, (1581,)):
        for width in (2, 3, 4):
            args, options = conv_arguments(1, sum(lengths), 72, width, mode, len(lengths))
            check("causal_conv1d", args, {**options, "cu_seqlens": bounds(lengths)}, f"{lengths} W={width} {mode}")


def scan_arguments(
    batch: int, tokens: int, inner: int, d_state: int, mode: str, sequences: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """mode: "int8", "float", or "x": that alone is int8."""
    x = normal(batch, tokens, inner, dtype=BF16) if mode == "float" else codes(batch, tokens, inner)
    options = {} if mode == "float" else {"x_scale": scales(1)}
    if mode == "int8":
        B, C = codes(batch, tokens, d_state), codes(batch, tokens, d_state)
        options |= {"B_scale": scales(1), "C_scale": scales(1)}
    else:
        B, C = (part_of_wider(normal(batch, tokens, d_state, dtype=BF16), 160, 16) for _ in range(2))
    A = -torch.rand(inner, d_state, device="cuda") * 16 - 0.01
    dt = normal(batch, tokens, inner, dtype=BF16) - 2
    state = normal(sequences, inner, d_state)
    return (part_of_wider(x), dt, A, B, C, normal(inner), normal(inner), state), options


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("lanes", [4, 8, 24])
def test_selective_scan(lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "LANES", lanes)
    for index, tokens in enumerate(LENGTHS):
        for batch, inner in ((1, 1604), (index % 5 + 1, 83), (3, 164)):
            for mode in ("int8", "float", "x"):
                args, options = scan_arguments(batch, tokens, inner, 16, mode, batch)
                options["out_dtype"] = (F32, BF16)[index % 2]
                check("selective_scan", args, options, f"{batch} x {tokens} x {inner} {mode}")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("lanes", [4, 8, 24])
def test_typed_scan_of_sequences(lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """16-bit outputs of rows in whole quads, by the kernels that know their types."""
    monkeypatch.setattr(scan, "LANES", lanes)
    for lengths in (RAGGED, (1,) * 40, (47, 48, 49, 95, 96, 97, 145)):
        for mode in ("int8", "float"):
            for dtype in (F16, BF16):
                args, options = scan_arguments(1, sum(lengths), 72, 16, mode, len(lengths))
                x, dt, A, B, C, *rest = args
                if mode == "float":
                    x, B, C = (part_of_wider(t.to(dtype)) for t in (x, B, C))
                options |= {"cu_seqlens": bounds(lengths), "out_dtype": dtype}
                check("selective_scan", (x, dt.to(dtype), A, B, C, *rest), options, f"{lengths} {mode} {dtype}")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("d_state", [8, 16, 32])
def test_scan_of_sequences(d_state: int) -> None:
    for lengths in (RAGGED, (1,) * 40, (400,)):
        mode = {8: "float", 16: "int8", 32: "x"}[d_state]
        args, options = scan_arguments(1, sum(lengths), 72, d_state, mode, len(lengths))
        options["cu_seqlens"] = bounds(lengths)
        check("selective_scan", args, options, f"{lengths} N={d_state}")
        check("selective_scan", (*args[:6], None, None), options, f"{lengths} N={d_state} from zeros")


def prefill_arguments(
    batch: int, tokens: int, inner: int, rank: int, coded: bool, dtype: torch.dtype = BF16, d_state: int = 16
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x = part_of_wider(codes(batch, tokens, inner) if coded else normal(batch, tokens, inner, dtype=dtype))
    projected = normal(batch, tokens, rank + 2 * d_state, dtype=dtype)
    projected[:, 0] = 0
    weights = codes(inner, rank), torch.rand(inner, device="cuda") * 2e-3
    A = -torch.rand(inner, d_state, device="cuda") * 16 - 0.01
    options = {"x_scale": scales(1), "B_scale": scales(1), "C_scale": scales(1)} if coded else {}
    z = part_of_wider(normal(batch, tokens, inner, dtype=dtype) * 3)
    z[:, ::5, ::7] *= 100  # far beyond the scales
    if coded:
        options["z_scale"] = scales(inner)
    args = x, projected, weights, normal(inner) - 2, A, normal(inner), z, normal(batch, inner, d_state)
    return args, {**options, "out_dtype": dtype}


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("lanes", [4, 8, 24])
@pytest.mark.parametrize("coded", [True, False], ids=["int8", "float"])
def test_selective_prefill(coded: bool, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "LANES", lanes)
    for index, tokens in enumerate((*LENGTHS, 15, 16, 17, 33)):
        for batch, inner, rank, d_state in (
            (1, 1608, 160, 16), (index % 5 + 1, 88, 32, 8), (3, 168, 96, 32), (2, 512, 128, 16), (1, 264, 64, 16)
        ):  # fmt: skip
            args, options = prefill_arguments(batch, tokens, inner, rank, coded, d_state=d_state)
            check("selective_prefill", args, options, f"{batch} x {tokens} x {inner}, rank {rank}")
            if coded and index % 2:
                z = (codes(batch, tokens, inner), args[6].float())[index // 2 % 2]
                args = args[0], args[1].float(), args[2], None, *args[4:6], z, None
                options |= {"x_scale": scales(inner), "z_scale": scales(1), "out_dtype": F16}
                check("selective_prefill", args, options, f"{batch} x {tokens} x {inner}, rank {rank}, from zeros")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("coded", [True, False], ids=["int8", "float"])
def test_prefill_has_the_bits_of_its_parts(coded: bool, dtype: torch.dtype) -> None:
    """silu(32) is 32 in fp32, which changes no bit of a y but its exponent's."""
    for tokens in (1, 47, 193, 2048):
        args, options = prefill_arguments(2 if tokens < 2048 else 1, tokens, 5120, 160, coded, dtype)
        x, projected, weights, bias, A, D, z, state = args
        z.fill_(32)
        z_scale = options.pop("z_scale", None)
        gates = {} if z_scale is None else {"z_scale": z_scale.fill_(0.5)}
        rank, B, C = projected.split([160, 16, 16], -1)
        dt = OPS["linear_w8a8"].reference(*backend("quantize")(rank), weights, bias, out_dtype=dtype)
        if coded:
            B, C = (backend("quantize")(t, options[name]).data for t, name in ((B, "B_scale"), (C, "C_scale")))
        want = backend("selective_scan")(x, dt, A, B, C, D, None, state, **options)
        got = backend("selective_prefill")(*args, **options, **gates)
        normals = want[0].abs() > torch.finfo(dtype).tiny
        assert torch.equal(got[0][normals], want[0][normals] * 32), f"{tokens} tokens"
        assert torch.equal(got[1], want[1]) and normals.float().mean() > 0.99, f"{tokens} tokens"


def test_tensors_of_more_than_two_to_the_31_elements() -> None:
    tokens, channels, tail = 131072, 16416, 200
    assert tokens * channels > 1 << 31
    x = torch.randint(-127, 128, (1, 1, channels), device="cuda", dtype=torch.int8).expand(1, tokens, -1).contiguous()
    x[:, -tail:] = codes(1, tail, channels)
    args, options = (codes(channels, 4), None), {"x_scale": scales(channels), "out_scale": scales(1)}
    y = backend("causal_conv1d")(x, *args, **options)
    want = OPS["causal_conv1d"].reference(x[:, -tail - 3 :], *args, **options)[:, 3:]
    assert disagreement([y[:, -tail:].cpu()], [want.cpu()], 0) is None

    dt, B, C = (normal(1, tokens, n, dtype=BF16) for n in (1, 16, 16))
    dt = dt.expand(1, tokens, channels)
    got, want = backend("quantize")(dt).data[0, -tail:], OPS["quantize"].reference(dt[0, -tail:]).data
    assert disagreement([got.cpu()], [want.cpu()], 0) is None
    del got
    given = (-torch.rand(channels, 16, device="cuda"), normal(channels))
    options = {"x_scale": scales(1), "out_dtype": BF16}

    def run(part: slice, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        whole = x[:, part], dt[:, part].contiguous(), given[0], B[:, part], C[:, part], given[1]
        return backend("selective_scan")(*whole, None, state, **options)

    y, last = run(slice(0, tokens))
    end = y[:, -tail:].clone()
    del y
    _, before = run(slice(0, tokens - tail))
    again, last_again = run(slice(tokens - tail, tokens), before)
    assert torch.equal(end, again) and torch.equal(last, last_again)


def small(name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of one call of an op, on a prompt of 70 tokens."""
    if name == "rms_norm":
        return (normal(70, 2560), normal(2560), 1e-5), {"per_token": True}
    if name == "quantize":
        return (normal(70, 2560, dtype=BF16), scales(1)), {}
    if name == "gate_output":
        options = {"z_scale": scales(5120), "norm_groups": 1, "block": 5120, "out_scale": scales(1)}
        return (normal(70, 5120, dtype=BF16), normal(70, 5120, dtype=BF16), normal(5120), 1e-5), options
    if name == "rotate_input":
        return (normal(1100, 5120, dtype=BF16), 5120), {"out_scale": scales(1)}
    if name == "causal_conv1d":
        return conv_arguments(2, 70, 640, 4, "rounds", 2)
    if name == "selective_prefill":
        return prefill_arguments(2, 70, 640, 160, True)
    return scan_arguments(2, 70, 640, 16, "int8", 2)


@pytest.mark.parametrize("name", NAMES)
def test_same_inputs_give_the_same_bits(name: str) -> None:
    args, options = small(name)
    outcomes = [flat(backend(name)(*change(args, torch.Tensor.clone), **options)) for _ in range(5)]
    assert all(torch.equal(a, b) for other in outcomes[1:] for a, b in zip(outcomes[0], other, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_runs_on_the_current_stream(name: str) -> None:
    """The input is written on a stream of its own, late: a kernel on any other stream would read what was there."""
    (x, *rest), options = small(name)
    want = flat(backend(name)(x, *change(tuple(rest), torch.Tensor.clone), **options))
    late, stream = torch.zeros_like(x), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        got = flat(backend(name)(late, *rest, **options))
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_chains_in_a_captured_graph(name: str) -> None:
    """Kernels that may start before their predecessor ends still see all that it wrote."""
    (x, *rest), options = small(name)
    held = change(tuple(rest), torch.Tensor.clone)
    backend(name)(x, *held, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outcomes = []
        for _ in range(20):
            x.add_(1)
            for own, first in zip(flat(held), flat(tuple(rest)), strict=True):
                own.copy_(first)
            outcomes.append(flat(backend(name)(x, *held, **options)))
    start = x.clone()
    for _ in range(3):
        x.copy_(start)
        graph.replay()
        torch.cuda.synchronize()
        x.copy_(start)
        for got in outcomes:
            x.add_(1)
            want = flat(backend(name)(x, *change(tuple(rest), torch.Tensor.clone), **options))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_prefill_in_a_captured_graph_sees_the_codes_before_it() -> None:
    (x, projected, *rest), options = small("selective_prefill")
    backend("selective_prefill")(x, projected, *rest, **options)
    graph, start = torch.cuda.CUDAGraph(), projected.clone()
    with torch.cuda.graph(graph):
        outcomes = []
        for _ in range(20):
            projected.mul_(-0.9)
            outcomes.append(flat(backend("selective_prefill")(x, projected, *rest, **options)))
    for _ in range(3):
        projected.copy_(start)
        graph.replay()
    torch.cuda.synchronize()
    projected.copy_(start)
    for got in outcomes:
        projected.mul_(-0.9)
        want = flat(backend("selective_prefill")(x, projected, *rest, **options))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_norm_and_quantisation_follow_each_other() -> None:
    """Two kernels of ours back to back, so that the second starts early."""
    x = normal(300, 2560, dtype=BF16)
    for _ in range(20):
        x = x.roll(1, 0)
        middle = backend("rms_norm")(x, None, 1e-5, out_dtype=BF16).data
        got = backend("quantize")(middle)
        want = OPS["quantize"].reference(OPS["rms_norm"].reference(x, None, 1e-5, out_dtype=BF16).data)
        assert disagreement([t.cpu() for t in got], [t.cpu() for t in want], 1e-6) is None


@pytest.mark.parametrize("name", NAMES)
def test_custom_op_is_registered_right(name: str) -> None:
    x, w, b, one = normal(1, 8, 16), normal(16), None, scales(1)
    state, A, D = normal(1, 3, 16), -torch.rand(16, 16, device="cuda"), normal(16)
    given = {
        "rms_norm": (x, w, 1e-5, None, True, BF16),
        "quantize": (x, None),
        "gate_output": (x, x, w, 1e-5, None, 1, 16, scales(1), False, BF16),
        "rotate_input": (x, 16, scales(1), False, BF16),
        "causal_conv1d": (x, normal(16, 4), b, state, None, None, None, None, BF16, None),
        "selective_scan": (x, x, A, x, x, D, None, None, None, None, None, BF16, None),
        "selective_prefill": (
            codes(1, 8, 16), normal(1, 8, 64), codes(16, 32), w, b, A, D, x, None, one, one, one, one, BF16
        ),
    }[name]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.quamba, name).default, given, test_utils=checks)


def test_what_a_kernel_would_misread_is_refused() -> None:
    args, options = small("causal_conv1d")
    with pytest.raises(ValueError, match=r"state has to be \[2, 3, 640\]"):
        backend("causal_conv1d")(*args[:3], args[3][:1], **options)
    with pytest.raises(TypeError, match="state has to be torch.int8"):
        backend("causal_conv1d")(*args[:3], args[3].float(), **options)
    with pytest.raises(ValueError, match="block"):
        backend("gate_output")(normal(2, 44), normal(2, 44), None, 1e-5, block=44)
    with pytest.raises(ValueError, match="lies on cpu"):
        backend("rms_norm")(normal(2, 44), torch.ones(44), 1e-5)
