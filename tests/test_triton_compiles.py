"""Triton's kernels of the non-linear operators, compiled as they are launched, for cards that need not be here."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="the extra `triton` is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
KINDS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int8: "*i8", torch.int32: "*i32",
    torch.int64: "*i64",
}  # fmt: skip
BF16, F16, F32, I8, NO_LIMIT = torch.bfloat16, torch.float16, torch.float32, torch.int8, (0.0, float("inf"))
Launch = tuple[JITFunction, dict[str, Any], dict[str, Any]]


@pytest.fixture
def launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """Kernels, arguments and options of every launch, none of which happens."""
    seen: list[Launch] = []

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        options = {key: named.pop(key) for key in OPTIONS if key in named}
        seen.append((kernel, dict(zip(kernel.arg_names, args, strict=False)) | named, options))

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    yield seen


def kind(value: Any) -> Any:
    if isinstance(value, tuple):  # of addresses
        return ("i64",) * len(value)
    return KINDS[value.dtype] if isinstance(value, torch.Tensor) else "fp32" if isinstance(value, float) else "i32"


def compiled(launch: Launch, capability: int) -> Any:
    """As Triton specialises it: absent tensors and ones are constants, multiples of 16 are known to be so."""
    kernel, bound, options = launch
    names = kernel.arg_names
    constants = {p.name for p in kernel.params if p.is_constexpr}
    constants |= {k for k, v in bound.items() if v is None or (type(v) is int and v == 1)}
    signature = {name: "constexpr" if name in constants else kind(bound[name]) for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
        if name not in constants
        and (isinstance(bound[name], torch.Tensor) or (type(bound[name]) is int and bound[name] % 16 == 0))
    }  # fmt: skip
    aligned |= {
        (i, part): [["tt.divisibility", 16]] for i, name in enumerate(names) if isinstance(bound[name], tuple)
        for part in range(len(bound[name]))
    }  # fmt: skip
    fixed = {(names.index(name),): bound[name] for name in constants}
    return triton.compile(ASTSource(kernel, signature, fixed, aligned), GPUTarget("cuda", capability, 32), options)


def zeros(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def ssd_scan(tokens: int, H: int, P: int, G: int, N: int, out_dtype: torch.dtype, sequences: int = 0) -> None:
    from quamba_kernels.triton.ssd import ssd_scan as scan

    mixed = zeros(1, tokens, H * P + 2 * G * N, dtype=I8)  # as the convolution leaves it
    x, B, C = mixed.split([H * P, G * N, G * N], -1)
    bounds = zeros(sequences + 1, dtype=torch.int32) if sequences else None
    scan(
        x.unflatten(-1, (H, P)), zeros(1, tokens, H, dtype=BF16), zeros(H), B.unflatten(-1, (G, N)),
        C.unflatten(-1, (G, N)), zeros(H), zeros(H), zeros(sequences or 1, H, P, N), zeros(H, P), zeros(G), zeros(G),
        NO_LIMIT, out_dtype, bounds,
    )  # fmt: skip


def selective_scan(tokens: int) -> None:
    from quamba_kernels.triton.selective import selective_scan as scan

    B = zeros(1, tokens, 16, dtype=I8)
    scan(
        zeros(1, tokens, 5120, dtype=I8), zeros(1, tokens, 5120, dtype=BF16), zeros(5120, 16), B, B, zeros(5120), None,
        zeros(1, 5120, 16), zeros(1), zeros(1), zeros(1), BF16, None,
    )  # fmt: skip


def updates(batch: int, dtype: torch.dtype) -> None:
    from quamba_kernels.triton import update

    rng = zeros(2, dtype=torch.int64) if dtype == I8 else None
    B, C = zeros(batch, 1, 128, dtype=I8), zeros(batch, 1, 128, dtype=I8)
    update.ssd_update(
        zeros(batch, 80, 64, 128, dtype=dtype), zeros(batch, 80, 64) if rng is not None else None, rng,
        zeros(batch, 80, 64, dtype=I8), zeros(batch, 80, dtype=BF16), zeros(80), B, C, zeros(80), zeros(80),
        zeros(80, 64), zeros(1), zeros(1), (0.0, 1.0), BF16,
    )  # fmt: skip
    update.selective_update(
        zeros(batch, 5120, 16, dtype=dtype), zeros(batch, 5120) if rng is not None else None, rng,
        zeros(batch, 5120, dtype=I8), zeros(batch, 5120, dtype=BF16), zeros(5120, 16), zeros(batch, 16, dtype=I8),
        zeros(batch, 16, dtype=I8), zeros(5120), None, zeros(1), zeros(1), zeros(1), BF16,
    )  # fmt: skip


def rowwise(rows: int) -> None:
    from quamba_kernels.triton import rowwise, state

    x = zeros(rows, 2560, dtype=BF16)
    rowwise.quantize(x, None)
    rowwise.rms_norm(x, zeros(2560, dtype=BF16), 1e-5, zeros(1), False, BF16)
    rows_of_state = zeros(rows, 80, 64, 128)
    stored = rows_of_state.to(I8), rows_of_state[..., 0].contiguous(), zeros(2).long()
    state.quantize_state(rows_of_state, *stored)
    state.quantize_states((rows_of_state,) * 3, *((part,) * 3 for part in stored))


def gate_output(channels: int) -> None:
    from quamba_kernels.triton.gate import gate_output as gate

    y, z = zeros(2, channels, dtype=BF16), zeros(2, channels, dtype=I8)
    gate(y, z, zeros(channels, dtype=BF16), 1e-5, zeros(channels), 1, channels, zeros(1), False, BF16)


def causal_conv1d(tokens: int, sequences: int = 0) -> None:
    from quamba_kernels.triton.conv import causal_conv1d as conv

    x = zeros(1, tokens, 10576, dtype=I8)[..., 5120:10496]  # as in_proj leaves it
    bounds, C = zeros(sequences + 1, dtype=torch.int32) if sequences else None, zeros(5376)
    conv(x, zeros(5376, 4, dtype=I8), C, zeros(sequences or 1, 3, 5376, dtype=I8), C, C, C, BF16, bounds)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda: ssd_scan(1, 24, 64, 1, 16, F16), id="ssd-T1"),
        pytest.param(lambda: ssd_scan(130, 24, 32, 8, 64, F32, sequences=3), id="ssd-packed-exact"),
        pytest.param(lambda: selective_scan(1), id="selective-T1"),
        pytest.param(lambda: selective_scan(2048), id="selective"),
        pytest.param(lambda: updates(1, I8), id="update-int8"),
        pytest.param(lambda: updates(64, F16), id="update-fp16"),
        pytest.param(lambda: rowwise(1), id="rowwise"),
        pytest.param(lambda: gate_output(1536), id="gate-12*128"),
        pytest.param(lambda: causal_conv1d(1), id="conv-T1"),
        pytest.param(lambda: causal_conv1d(130, sequences=3), id="conv-packed"),
    ],
)
def test_it_compiles(call: Callable[[], None], capability: int, launches: list[Launch]) -> None:
    call()
    assert launches
    for launch in launches:
        made = compiled(launch, capability)
        assert made.asm["cubin"] and made.metadata.shared <= 99 * 1024  # what every card since sm_80 has, Orin included


@pytest.mark.parametrize("capability, product", [(80, "mma.sync"), (90, "wgmma.mma_async.sync")])
def test_the_scan_of_mamba2_runs_on_tensor_cores(capability: int, product: str, launches: list[Launch]) -> None:
    ssd_scan(2048, 80, 64, 1, 64, BF16)
    assert [launch[1]["OUTPUT"] for launch in launches] == [False, True]
    ptx = compiled(launches[1], capability).asm["ptx"]
    used = [line for line in ptx.splitlines() if product in line]
    assert any("s32.s8.s8" in line for line in used) and any("f32.bf16.bf16" in line for line in used)
    assert "cp.async" in ptx
