"""Triton's kernels: in its interpreter on the CPU, and the linears compiled for cards that need not be here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quamba_kernels import OPS, Setting
from quamba_kernels.backends import triton as backend

triton = pytest.importorskip("triton", reason="the extra `triton` is not installed")

ROOT = Path(__file__).resolve().parents[1]
LINEARS = ("linear_w8a8", "linear_w4a8", "linear_w4a16")
CHOICE = "triton and (linear or embedding or likeliest) and (agrees or exact or (strided and (w8a8 or embedding)))"
"""Of the loop over backends, what says most per second in the interpreter."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device runs the same comparison compiled")
@pytest.mark.parametrize(
    "chosen, passed",
    [(["-k", CHOICE, "tests/test_ops.py"], 9), (["-m", "not slow", "tests/test_triton_operators.py"], 25)],
)
def test_kernels_agree_with_the_torch_body_in_the_interpreter(chosen: list[str], passed: int) -> None:
    # a process of its own: the interpreter is chosen when the kernels are imported, and would serve every other test
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    environment = {**os.environ, backend.INTERPRET: "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"{passed} passed" in done.stdout and "skipped" not in done.stdout and "failed" not in done.stdout


@pytest.mark.parametrize("name", LINEARS)
def test_it_says_why_it_does_not_serve(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (mine,) = (b for b in OPS[name].backends if b.name == "triton")
    monkeypatch.delenv(backend.INTERPRET, raising=False)
    assert mine.why_not(Setting("cuda", torch.bfloat16, {"K": 2560, "O": 10576, "S": 128})) is None
    assert "these are on cpu" in str(mine.why_not(Setting("cpu")))
    if name != "linear_w8a8":
        assert "got 36 in features" in str(mine.why_not(Setting("cuda", shape={"K": 36})))
    monkeypatch.setenv(backend.INTERPRET, "1")
    assert mine.why_not(Setting("cpu", torch.float16)) is None
    assert "these are on cuda" in str(mine.why_not(Setting("cuda")))
    assert "no bf16" in str(mine.why_not(Setting("cpu", torch.bfloat16)))
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    assert "pip install triton" in str(mine.why_not(Setting("cpu")))


def test_it_stands_between_cuda_and_torch() -> None:
    served = [order for op in OPS.values() if "triton" in (order := [b.name for b in op.candidates])]
    assert len(served) >= 13
    for order in served:
        assert order.index("triton") < order.index("torch")
        assert "cuda" not in order or order.index("cuda") < order.index("triton")


def test_weights_of_another_linear_are_refused() -> None:
    from quamba_kernels.triton.linear import linear

    x, nothing = torch.zeros(2, 64, dtype=torch.int8), (None,) * 4
    with pytest.raises(ValueError, match="x has 64 in features and the weights 32"):
        linear(x, torch.ones(1), torch.zeros(8, 32, dtype=torch.int8), None, *nothing, torch.float32)
    with pytest.raises(ValueError, match="3 groups do not divide 64"):
        words, factor = torch.zeros(8, 8, dtype=torch.int32), torch.ones(8, 3, dtype=torch.int8)
        linear(x, torch.ones(1), words, factor, *nothing, torch.float32)


def compiled(name: str, rows: int, capability: int) -> str:
    """PTX of a linear for K = 2560 in groups of 128, fp16 where it is not int8."""
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from quamba_kernels.triton.linear import linear_kernel, tile

    int8, BM, BO, BK = name != "linear_w4a16", *tile(rows, name != "linear_w4a16", wide=False)[:3]
    fixed = {
        "PER_ELEMENT": 1 if name == "linear_w8a8" else 8, "GROUPED": name != "linear_w8a8", "EVEN": True,
        "ACC": tl.int32 if int8 else tl.float32, "TOKEN_SCALE": True, "CHANNEL_OUT_SCALE": False,
        "BM": BM, "BO": BO, "BK": min(BK, 128), "bias_ptr": None, "out_scale_ptr": None,
    }  # fmt: skip
    kinds = {
        "x_ptr": "*i8" if int8 else "*fp16", "w_ptr": "*i8" if name == "linear_w8a8" else "*i32", "y_ptr": "*fp16",
        "residual_ptr": "*fp16", "x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32",
        "factor_ptr": "*i8" if int8 else "*fp16",
    }  # fmt: skip
    fixed |= {"factor_ptr": None} if name == "linear_w8a8" else {}
    fixed |= {} if int8 else {"x_scale_ptr": None, "w_scale_ptr": None}
    names = linear_kernel.arg_names
    signature = {arg: "constexpr" if arg in fixed else kinds.get(arg, "i32") for arg in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(names) if arg not in fixed and arg != "M"}
    source = ASTSource(linear_kernel, signature, {(names.index(arg),): v for arg, v in fixed.items()}, aligned)
    return triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": 4, "num_stages": 3}).asm["ptx"]


@pytest.mark.parametrize("capability, rows, product", [(80, 1, "mma.sync"), (90, 64, "wgmma.mma_async.sync")])
@pytest.mark.parametrize("name", LINEARS)
def test_it_compiles_to_tensor_cores(
    name: str, capability: int, rows: int, product: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    ptx = compiled(name, rows, capability)
    kind = "f32.f16.f16" if name == "linear_w4a16" else "s32.s8.s8"
    assert [line for line in ptx.splitlines() if product in line and kind in line]
    assert "cp.async" in ptx
