"""What of the linears' benchmark needs no GPU: its problems, gate, verdicts, tables and command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "kernels" / "benchmarks"
NAMES = ("problems", "timing", "targets", "peers", "linear")


@pytest.fixture(scope="module")
def modules(kernel_benchmark):
    return {name: kernel_benchmark(name) for name in NAMES}


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def made(modules, op: str, rng: torch.Generator, rows: int = 5):
    """A small problem, its inputs and the reference."""
    problems = modules["problems"]
    given = problems.problem(problems.Shape("tiny", "in_proj", 256, 48), op, "cpu", rng)
    x = problems.inputs(256, rows, op, "cpu", rng)
    return given, x, problems.reference(given, x)


@pytest.mark.parametrize("op", ["fp16", "linear_w8a8", "linear_w4a8", "linear_w4a16"])
def test_problems_are_what_the_ops_take(modules, op: str, rng: torch.Generator) -> None:
    given, x, want = made(modules, op, rng)
    assert want.shape == (5, 48) and 0.3 < want.std() < 3
    assert given.weight_bytes == modules["problems"].weight_bytes(given.shape, op)
    assert given.group == (128 if op in ("linear_w4a8", "linear_w4a16") else 256)
    if op != "fp16":
        from quamba_kernels.ops.linear import unpack_int4

        codes = given.weights[0] if op == "linear_w8a8" else unpack_int4(given.weights[0])
        low, high = {"linear_w8a8": (-127, 127), "linear_w4a8": (-7, 7), "linear_w4a16": (-8, 7)}[op]
        assert codes.shape == (48, 256) and codes.min() == low and codes.max() == high


def test_many_rows_are_sampled(modules, rng: torch.Generator) -> None:
    sampled = modules["problems"].sampled
    assert sampled(64).tolist() == list(range(64))
    assert len(sampled(8192).unique()) == 64 and sampled(8192)[-1] == 8191
    _, x, want = made(modules, "linear_w8a8", rng, rows=100)
    assert want.shape == (64, 48) and x.x.shape == (100, 256)


def test_shapes_are_the_published_ones(modules) -> None:
    shapes = modules["problems"].SHAPES
    assert len(shapes) == 10 and len({s.model for s in shapes}) == 3
    assert [s.O for s in shapes if s.role == "lm_head"] == [50288, 50280, 256000]
    assert all(s.K % 128 == 0 and s.O % 8 == 0 for s in shapes)


@pytest.mark.parametrize("name, op", [("Cublas", "fp16"), ("IntMm", "linear_w8a8")])
def test_torch_peers_pass_the_gate_and_wrong_ones_do_not(modules, name: str, op: str, rng: torch.Generator) -> None:
    peer, linear = getattr(modules["peers"], name)(), modules["linear"]
    given, x, want = made(modules, op, rng, rows=33)
    it = linear.theirs(peer)
    packed = peer.pack(given)
    assert linear.gate(it, given, [packed, packed], x, want) <= peer.tolerance
    wrong = (packed[0].flip(0).contiguous(), *packed[1:])
    with pytest.raises(ValueError, match="relative error .* above"):
        linear.gate(it, given, [packed, wrong], x, want)


def test_our_backends_pass_the_gate(modules, rng: torch.Generator) -> None:
    from quamba_kernels import OPS

    for op in modules["problems"].OPS:
        given, x, want = made(modules, op, rng)
        it = modules["linear"].ported(OPS[op].candidates[-1], op, True, 1e-3)
        assert it.name == "quamba/torch"
        assert modules["linear"].gate(it, given, [it.pack(given)], x, want) <= 1e-3


def test_a_peer_that_is_missing_is_listed(modules) -> None:
    found, versions = modules["peers"].installed(modules["peers"].NAMES)
    assert [p.name for p in found][:2] == ["cublas-fp16", "torch._int_mm"]
    missing = {n for n in modules["peers"].NAMES if n not in [p.name for p in found]}
    assert all(versions[n] == "not installed" or "does not import" in versions[n] for n in missing)


def test_int_mm_says_why_it_cannot_run(modules) -> None:
    peer = modules["peers"].IntMm()
    assert peer.why_not("linear_w8a8", 17) is None
    assert "more than 16 rows, got 16" in peer.why_not("linear_w8a8", 16)
    assert "no linear_w4a8" in peer.why_not("linear_w4a8", 64)


def test_gemlite_borrows_the_nearest_configuration(modules) -> None:
    from types import SimpleNamespace

    peers, problems = modules["peers"], modules["problems"]
    known = {"(1, 4096, 4096, 128, 8, 104)": {"mine": 1}, "(1, 8192, 2560, 128, 8, 104)": {"mine": 2},
             "(1, 10576, 2560, 64, 8, 104)": {"mine": 3}, "(16, 10576, 2560, 128, 8, 104)": {"mine": 4}}  # fmt: skip
    peer = object.__new__(peers.Gemlite)
    peer.core, peer.closest = SimpleNamespace(GEMLITE_TRITON_CONFIG_CACHE={"GEMV": known}), lambda m: m
    meta = [0, 4, 128, 15, 8, 1, 1, 0, 1, 0, 4, 1]
    given = problems.Problem(problems.Shape("m", "in_proj", 2560, 10576), "linear_w4a16", ())
    peer.borrow(given, 1, "GEMV", meta)
    assert known["(1, 10576, 2560, 128, 8, 104)"] == {"mine": 2}


def test_copies_exceed_four_times_l2(modules) -> None:
    timing = modules["timing"]
    for weight_bytes in (500_000, 14_000_000, 60_000_000, 1 << 30):
        copies = timing.copies_needed(weight_bytes, 50 << 20, 1)
        assert copies >= 2 and (copies * weight_bytes > 4 * (50 << 20) or copies == timing.MOST_COPIES)
        launches = timing.launches_needed(copies, 1, weight_bytes)
        assert launches % copies == 0 and 20 <= launches <= 1024
    assert timing.copies_needed(500_000, 50 << 20, 2048) == timing.FEW_COPIES
    assert timing.launches_needed(4, 8192, 14_000_000) == 8


def test_times_are_of_one_launch(modules) -> None:
    time = modules["timing"].summary([1.0, 3.0, 2.0], launches=10)
    assert time.median == 200 and time.replays == 3
    assert time.p10 == pytest.approx(120) and time.p90 == pytest.approx(280)


def row(implementation: str, us: float, op: str = "linear_w4a16", M: int = 1, **changes):
    return {
        "model": "mamba2-2.7b", "role": "in_proj", "op": op, "M": M, "implementation": implementation,
        "bound": implementation == "quamba/cuda", "status": "ok", "us": us, "us_p10": us, "us_p90": us,
        "gb_s": 14e6 / us / 1000, "copy_share": 14e6 / us / 1000 / 3000, "weight_bytes": 14_000_000, **changes,
    }  # fmt: skip


def marks(modules, rows) -> dict[str, bool | None]:
    (comparison,) = modules["targets"].comparisons(rows)
    return {v.target.measure: v.passed for v in comparison.verdicts()}


def test_verdicts_follow_the_targets(modules) -> None:
    fp16, humming = row("cublas-fp16", 20.0, "fp16"), row("humming", 9.0)
    assert marks(modules, [fp16, row("quamba/cuda", 6.0), humming]) == {"copy": True, "peer": True}
    assert marks(modules, [fp16, row("quamba/cuda", 8.0), humming]) == {"copy": False, "peer": False}
    assert marks(modules, [row("quamba/cuda", 6.0, weight_bytes=7_000_000), humming]) == {"peer": True}
    assert marks(modules, [row("quamba/cuda", 6.0)]) == {"copy": True, "peer": None}
    few = [row("cublas-fp16", 20.0, "fp16", 16), row("quamba/cuda", 9.0, M=16), row("humming", 9.0, M=16)]
    assert marks(modules, few) == {"peer": True, "fp16": False}
    many = [row("cublas-fp16", 100.0, "fp16", 2048), row("quamba/cuda", 60.0, "linear_w8a8", 2048)]
    assert marks(modules, many) == {"fp16": True}
    in_turns = [many[0], row("quamba/cuda", 60.0, "linear_w8a8", 2048, fp16_us=90.0)]
    assert marks(modules, in_turns) == {"fp16": False}


def test_a_failed_peer_is_no_rival_and_our_failure_misses(modules) -> None:
    broken = row("humming", 1.0, status="failed", reason="relative error 1.4e+00 above 2e-02")
    rows = [row("gemlite", 9.0), broken, row("quamba/cuda", 6.0), row("quamba/triton", 3.0)]
    (comparison,) = modules["targets"].comparisons(rows)
    assert comparison.peer["implementation"] == "gemlite"
    assert modules["targets"].problems_of(rows) == [
        "humming linear_w4a16 mamba2-2.7b in_proj M=1: relative error 1.4e+00 above 2e-02"
    ]
    ours = row("quamba/cuda", 6.0, status="failed", reason="relative error nan above 1e-03")
    assert marks(modules, [ours, row("gemlite", 9.0)]) == {"copy": False, "peer": False}
    assert "relative error nan" in modules["targets"].table([ours, row("gemlite", 9.0)])


def test_the_table_and_the_file(modules, tmp_path: Path) -> None:
    rows = [row("cublas-fp16", 20.0, "fp16"), row("quamba/cuda", 6.0), row("humming", 9.0)]
    output = tmp_path / "results.json"
    modules["linear"].write(output, {"device": "none", "complete": False}, rows, modules["linear"].tables(rows))
    read = json.loads(output.read_text())
    assert read["rows"] == rows and read["device"] == "none"
    text = (tmp_path / "results.md").read_text()
    assert "| mamba2-2.7b | in_proj | w4a16 | 1 | 6.0 |" in text and "PASS 0.65 copy; PASS 1.2 peer" in text
    assert "| M = 1..4, W4: times the best peer | 1.2 | 1 | 1 | 1.50 |" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.json", "results.md"]


def test_heads_of_long_prompts_are_left_out(modules) -> None:
    linear, shapes = modules["linear"], modules["problems"].SHAPES
    head = next(s for s in shapes if s.role == "lm_head")
    assert max(linear.wanted_rows(linear.parser().parse_args([]), head)) == 256
    assert max(linear.wanted_rows(linear.parser().parse_args(["--long-heads"]), head)) == 8192
    assert max(linear.wanted_rows(linear.parser().parse_args([]), shapes[0])) == 8192


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a CUDA device")
def test_without_a_device_it_says_so() -> None:
    for options, code, said in ((["--help"], 0, "--budget-s"), ([], 2, "needs a CUDA device")):
        done = subprocess.run([sys.executable, str(FOLDER / "linear.py"), *options], capture_output=True, text=True)
        assert done.returncode == code and said in done.stdout + done.stderr
