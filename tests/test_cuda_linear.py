"""The linears of the cuda backend without a GPU: kernels in C behind the same ABI, called with tensors on the CPU."""

import contextlib
import ctypes
import shutil
from types import SimpleNamespace

import pytest
import torch

from quamba_kernels import OPS
from quamba_kernels.cuda import build as building
from quamba_kernels.cuda import expansion, int4_order, linear
from quamba_kernels.cuda import library as loading
from quamba_kernels.cuda.library import Library
from quamba_kernels.cuda.toolchain import CannotBuild
from quamba_kernels.testing import TOLERANCE, Case, cases, disagreement

KERNELS = r"""
#include <stdint.h>
#include <string.h>
#include "linear.h"
#define TEXT(t) #t
#define EXPANDED(m) TEXT(m)
const char* quamba_identity(void) { return EXPANDED(QUAMBA_IDENTITY); }
const char* quamba_error_string(int status) { return status == 700 ? "an illegal address" : "?"; }
const char* last = "";

static float from_bits(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static float half(uint16_t h) { return from_bits((h & 0x8000u) << 16 | (((h & 0x7fffu) << 13) + (112u << 23))); }
static float at(const void* p, int dtype, long i) {
  if (dtype == QUAMBA_F32) return ((const float*)p)[i];
  if (dtype == QUAMBA_BF16) return from_bits((uint32_t)((const uint16_t*)p)[i] << 16);
  return dtype == QUAMBA_F16 ? half(((const uint16_t*)p)[i]) : ((const int8_t*)p)[i];
}
static int code(const QuambaLinear* a, int packed, long o, long k) {
  if (!packed) return ((const int8_t*)a->w)[o * a->K + k];
  const uint32_t* w = (const uint32_t*)a->w + (o * a->K + k) / 32 * 4;
  int ordered = packed == 2 && a->S % 64 == 0;
  int word = ordered ? k % 8 / 2 : k % 32 / 8, nibble = ordered ? k % 32 / 8 + k % 2 * 4 : k % 8;
  int q = (int)(w[word] >> 4 * nibble & 15) - 8;
  return a->w_multiplier ? q * ((const int8_t*)a->w_multiplier)[(o * a->K + k) / a->S] : q;
}
static int run(const QuambaLinear* a, int packed) {
  for (long m = 0; m < a->M; m++) for (long o = 0; o < a->O; o++) {
    double sum = 0;
    for (long k = 0; k < a->K; k++) {
      double w = code(a, packed, o, k);
      if (!a->x_scale) w *= half(((const uint16_t*)a->w_scale)[(o * a->K + k) / a->S]);
      sum += w * at(a->x, a->x_dtype, m * a->K + k);
    }
    float y = sum;
    if (a->x_scale) y = y * a->x_scale[a->x_scale_count == 1 ? 0 : m] * ((const float*)a->w_scale)[o];
    if (a->bias) y += at(a->bias, a->bias_dtype, o);
    if (a->residual) y += at(a->residual, a->residual_dtype, m * a->O + o);
    if (a->out_scale) {
      y = __builtin_nearbyintf(y / a->out_scale[a->out_scale_count == 1 ? 0 : o]);
      if (a->y_dtype != QUAMBA_I8) return QUAMBA_UNSUPPORTED;
      ((int8_t*)a->y)[m * a->O + o] = y > 127 ? 127 : y < -127 ? -127 : y;
    } else if (a->y_dtype == QUAMBA_F32) {
      ((float*)a->y)[m * a->O + o] = y;
    } else if (a->y_dtype == QUAMBA_BF16) {
      uint32_t bits; memcpy(&bits, &y, 4);
      ((uint16_t*)a->y)[m * a->O + o] = bits + 0x7fff + (bits >> 16 & 1) >> 16;
    } else return QUAMBA_UNSUPPORTED;
  }
  return QUAMBA_OK;
}
#define LINEAR(name, packed) int name(const QuambaLinear* a, void* s) { last = #name; return run(a, packed); }
LINEAR(quamba_linear_w8a8_skinny, 0)
LINEAR(quamba_linear_w4a8_skinny, 1)
LINEAR(quamba_linear_w4a16_skinny, 1)
LINEAR(quamba_linear_w4a8_gemm, 1)
LINEAR(quamba_linear_w4a16_gemm, 2)
LINEAR(quamba_linear_w8a8_few, 0)
LINEAR(quamba_linear_w4a8_few, 1)
LINEAR(quamba_linear_w4a16_few, 2)
long long quamba_linear_w8a8_gemm_workspace(const QuambaLinear* a) { return 4 * a->O; }
int quamba_linear_w8a8_gemm(const QuambaLinear* a, void* s) {
  last = "quamba_linear_w8a8_gemm";
  if (a->O == 24) return 700;
  if (a->O == 456) return QUAMBA_UNSUPPORTED;
  if (!a->workspace || a->workspace_bytes != 4 * a->O) return 1;
  memset(a->workspace, 1, a->workspace_bytes);
  return run(a, 0);
}
int quamba_expand_w4a8(const QuambaLinear* a, void* s) {
  if (a->bias || a->residual || a->out_scale || a->y_dtype != QUAMBA_I8) return 1;
  for (long i = 0; i < (long)a->O * a->K; i++) ((int8_t*)a->y)[i] = code(a, 1, i / a->K, i % a->K);
  return QUAMBA_OK;
}
int quamba_expand_w4a16(const QuambaLinear* a, void* s) {
  for (long i = 0; i < (long)a->O * a->K; i++) {
    float w = code(a, 1, i / a->K, i % a->K) * half(((const uint16_t*)a->w_scale)[i / a->S]);
    uint32_t bits; memcpy(&bits, &w, 4);
    ((uint16_t*)a->y)[i] = bits + 0x7fff + (bits >> 16 & 1) >> 16;
  }
  return a->y_dtype == QUAMBA_BF16 ? QUAMBA_OK : QUAMBA_UNSUPPORTED;
}
"""


@pytest.fixture
def kernels(fake_nvcc, monkeypatch: pytest.MonkeyPatch):
    """arch -> the library of the kernels above, which the ops then use for tensors on the CPU."""
    csrc = fake_nvcc / "csrc"
    csrc.mkdir()
    shutil.copy(building.CSRC / "linear.h", csrc)
    others = [name for name in (*building.KERNELS, *building.HOPPER) if name not in KERNELS]
    stubs = [f"int {name}(const void* a, void* s) {{ return QUAMBA_UNSUPPORTED; }}" for name in others]
    (csrc / "kernels.cu").write_text("\n".join([KERNELS, *stubs]))
    monkeypatch.setattr(loading, "identity", lambda arch: building.identity(arch, csrc))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))

    def made(arch: str) -> Library:
        loaded = Library(building.build(arch, csrc), arch)
        monkeypatch.setattr(linear, "library", lambda index: loaded)
        return loaded

    return made


def last(library: Library) -> str:
    return ctypes.c_char_p.in_dll(library._loaded, "last").value.decode()


def prepacked(case: Case) -> tuple[torch.Tensor, ...]:
    """The weights in the order that the library's kernels take."""
    weights = case.args[case.weights]
    return int4_order.ordered(weights) if linear.on_hopper(weights[0].device) else weights


def call(name: str, case: Case, **changes) -> torch.Tensor:
    """An op's implementation, called as the dispatcher would call it for tensors on a GPU."""
    first = case.args[: case.weights]
    rest = (*case.args[case.weights + 1 :], None, None)[:2]
    options = {"out_scale": None, "out_dtype": torch.float32, **case.kwargs, **changes}
    return getattr(linear, name)(*first, *prepacked(case), *rest, options["out_scale"], options["out_dtype"])


def served(name: str) -> list[Case]:
    """The cases in types that the kernels above write."""
    types = (torch.bfloat16,) if name == "linear_w4a16" else (torch.float32, torch.bfloat16)
    found = [case for case in cases(name) if linear.shape_why_not(*(case.shape[axis] for axis in "KOS")) is None]
    return [case for case in found if case.dtype in types]


NAMES = ["linear_w8a8", "linear_w4a8", "linear_w4a16"]


@pytest.mark.parametrize("arch", ["sm_90a", "sm_87"])
@pytest.mark.parametrize("rows", [0, 10**6], ids=["many", "few"])
@pytest.mark.parametrize("name", NAMES)
def test_arguments_reach_the_kernels(
    kernels, name: str, rows: int, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if arch != "sm_90a" and name == "linear_w4a16" and not rows:
        pytest.skip("is torch's product there")
    library = kernels(arch)
    for constant in ("W8A8_SKINNY_ROWS", "W4A8_SKINNY_ROWS", "W4A16_SKINNY_ROWS"):
        monkeypatch.setattr(linear, constant, rows)
    monkeypatch.setattr(linear, "W4A8_GEMM_O", 0)
    monkeypatch.setattr(linear, "FEW_TILES", dict.fromkeys(linear.FEW_TILES, {}))
    assert served(name)
    for case in served(name):
        want = OPS[name].reference(*case.args, **case.kwargs)
        assert disagreement([call(name, case)], [want], TOLERANCE[name][case.dtype]) is None, case.label
        gemm = f"quamba_{name}_gemm" if arch == "sm_90a" else "quamba_linear_w8a8_gemm"
        skinny = rows and prepacked(case)[0].dim() == 2
        assert last(library) == (f"quamba_{name}_skinny" if skinny else gemm)


@pytest.mark.parametrize("name", NAMES)
def test_hopper_splits_the_columns_of_few_rows(kernels, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For groups that it takes and as many rows as it is for; another architecture never asks for it."""
    few = f"quamba_{name}_few"
    for case in served(name):
        library = kernels("sm_90a")
        want = OPS[name].reference(*case.args, **case.kwargs)
        assert disagreement([call(name, case)], [want], TOLERANCE[name][case.dtype]) is None, case.label
        groups = case.shape["S"] if name != "linear_w8a8" else 128
        assert (last(library) == few) == (groups == 64 or groups % 128 == 0), case.label
    library = kernels("sm_87")
    monkeypatch.setattr(linear, "W4A16_SKINNY_ROWS", 10**6)
    for case in served(name):
        call(name, case)
        assert last(library) != few
    library = kernels("sm_90a")
    for rows, expected in ((1, True), (64, True), (513, False)):
        x, x_scale, w, w_scale = draw(rows)
        run(x, x_scale, w, w_scale)
        assert last(library).endswith("_few") == expected, rows


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("most", [0, 10**6], ids=["many", "few"])
def test_a_norm_holds_back_what_only_waits_for_it(
    kernels, name: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The int8 GEMM alone, of so few rows."""
    held = []

    def norm(x, weight, eps, scale, per_token, dtype, holds_next):
        held.append(holds_next)
        return x.to(dtype if scale is None else torch.int8), torch.empty(0)

    library = kernels("sm_90a")
    monkeypatch.setattr(linear, "rms_norm", norm)
    monkeypatch.setattr(linear, "FEW_TILES", dict.fromkeys(linear.FEW_TILES, {}))
    for constant in ("W8A8_SKINNY_ROWS", "W4A8_SKINNY_ROWS", "W4A16_SKINNY_ROWS"):
        monkeypatch.setattr(linear, constant, most)
    for case in served(name):
        x, weights, given = case.args[0], case.args[case.weights], prepacked(case)
        scale = None if name == "linear_w4a16" else torch.tensor([0.02])
        w, multiplier, w_scale = given if len(given) == 3 else (given[0], None, given[1])
        halves = torch.bfloat16, torch.bfloat16
        got = linear.norm_linear(x.float(), None, 1e-5, w, multiplier, w_scale, None, None, scale, False, *halves)
        want = OPS[name].reference(*((x,) if scale is None else (x, scale)), weights, out_dtype=torch.bfloat16)
        assert disagreement([got], [want], TOLERANCE[name][torch.bfloat16]) is None, case.label
        assert held.pop() == (name == "linear_w8a8" and last(library) == "quamba_linear_w8a8_gemm"), case.label
        assert last(library).endswith("_skinny") == bool(most and w.dim() == 2), case.label


def test_w4a16_is_expanded_where_there_is_no_kernel(kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels("sm_87")
    monkeypatch.setattr(linear, "W4A16_SKINNY_ROWS", 0)
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: product(a.to(out_dtype), b.to(out_dtype)))
    for case in served("linear_w4a16"):
        want = OPS["linear_w4a16"].reference(*case.args, **case.kwargs)
        got = call("linear_w4a16", case)
        assert disagreement([got], [want], TOLERANCE["linear_w4a16"][case.dtype]) is None, case.label


def draw(rows: int = 3, features: int = 64, outputs: int = 16) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-127, 128, (n, features), generator=rng, dtype=torch.int8) for n in (rows, outputs))
    return [x, torch.tensor([0.5]), w, torch.rand(outputs, generator=rng)]


def run(x, x_scale, w, w_scale, bias=None, residual=None, out_scale=None, out_dtype=torch.float32) -> torch.Tensor:
    return linear.linear_w8a8(x, x_scale, w, w_scale, bias, residual, out_scale, out_dtype)


def test_activations_of_any_layout_are_read_right(kernels) -> None:
    kernels("sm_80")
    x, x_scale, w, w_scale = draw()
    want = run(x, x_scale, w, w_scale)
    shifted = torch.zeros(x.numel() + 3, dtype=torch.int8)[3:].view(x.shape).copy_(x)
    for same in (x.T.contiguous().T, shifted, x.unsqueeze(1)):
        assert torch.equal(run(same, x_scale, w, w_scale).view(want.shape), want)
    residual = torch.rand(16, 3).T
    assert torch.equal(run(x, x_scale, w, w_scale, residual=residual), want + residual)


def test_no_rows_give_no_rows(kernels) -> None:
    kernels("sm_80")
    _, x_scale, w, w_scale = draw()
    empty = torch.empty(2, 0, 64, dtype=torch.int8)
    assert run(empty, x_scale, w, w_scale).shape == (2, 0, 16)
    assert run(empty, torch.empty(2, 0, 1), w, w_scale, out_scale=x_scale).dtype == torch.int8


WRONG = {
    "w has to be torch.int8, got torch.float32": {"w": torch.ones(16, 64)},
    r"w has to be \[16, 64\], got \[16, 32\]": {"w": torch.ones(16, 32, dtype=torch.int8)},
    r"w \[16, 64\] is not contiguous \(strides \(1, 16\)\)": {"w": torch.ones(64, 16, dtype=torch.int8).T},
    "w does not start at a multiple of 16 bytes; pass a clone": {
        "w": torch.ones(16 * 64 + 1, dtype=torch.int8)[1:].view(16, 64)
    },
    "takes K a multiple of 32 and O a multiple of 8, got K=64 and O=12": {"w": torch.ones(12, 64, dtype=torch.int8)},
    "x has to be torch.int8, got torch.float32": {"x": torch.ones(3, 64)},
    r"x_scale has to be torch.float32 \[1\] or \[3, 1\] on cpu, got torch.float32 \[2\]": {"x_scale": torch.ones(2)},
    "x_scale has to be .*, got torch.float16": {"x_scale": torch.ones(1).half()},
    "w_scale lies on meta, and x on cpu": {"w_scale": torch.ones(16, device="meta")},
    "bias has to be torch.float32 or torch.float16 or torch.bfloat16, got": {"bias": torch.ones(16).double()},
    r"residual has to be \[3, 16\], got \[16\]": {"residual": torch.ones(16)},
    r"out_scale has to be \[16\], got \[3\]": {"out_scale": torch.ones(3)},
    "out_dtype has to be one of .*, got torch.int8; out_scale gives an int8 result": {"out_dtype": torch.int8},
}


@pytest.mark.parametrize("sentence", WRONG)
def test_what_a_kernel_would_misread_is_refused(kernels, sentence: str) -> None:
    kernels("sm_80")
    arguments = dict(zip(("x", "x_scale", "w", "w_scale"), draw(), strict=True)) | WRONG[sentence]
    with pytest.raises((TypeError, ValueError), match=sentence):
        run(**arguments)


def test_group_sizes_are_checked() -> None:
    assert "got K=0 and O=8" in str(linear.shape_why_not(0, 8, 0)) and "got S=0" in str(linear.shape_why_not(32, 8, 0))
    x, packed, scale = torch.ones(1, 192).bfloat16(), torch.zeros(8, 24, dtype=torch.int32), torch.ones(8, 4).half()
    with pytest.raises(ValueError, match="groups of a multiple of 32 that divide K=192, got S=48"):
        linear.linear_w4a16(x, packed, scale, None, None, None, torch.float32)
    with pytest.raises(ValueError, match="the scales of 5 groups do not divide K=192"):
        linear.linear_w4a16(x, packed, torch.ones(8, 5).half(), None, None, None, torch.float32)


def test_a_status_is_a_sentence(kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels("sm_80")
    monkeypatch.setattr(linear, "W8A8_SKINNY_ROWS", 0)
    problem = "M=3 O={} K=64 S=64, x int8, y float32"
    with pytest.raises(RuntimeError, match=f"w8a8_gemm on sm_80 does not serve {problem.format(456)}"):
        run(*draw(outputs=456))
    with pytest.raises(RuntimeError, match=f"failed with {problem.format(24)}: CUDA error 700, an illegal address"):
        run(*draw(outputs=24))


def test_an_object_that_does_not_fit_is_refused(kernels, fake_nvcc, monkeypatch: pytest.MonkeyPatch) -> None:
    path = kernels("sm_80").path
    assert Library(path, "sm_86").arch == "sm_80"
    with pytest.raises(CannotBuild, match=r"for sm_80, which does not run on this device \(sm_87\); make it"):
        Library(path, "sm_87")
    monkeypatch.setattr(loading, "expected", lambda arch: ("quamba_scan",))
    with pytest.raises(CannotBuild, match="lacks quamba_scan; make it again with `quamba build --arch sm_80`"):
        Library(path, "sm_80")
    monkeypatch.setattr(loading, "identity", building.identity)
    with pytest.raises(CannotBuild, match=r"of other sources \(sm_80_[0-9a-f]{16}\) than those here \(sm_80_"):
        Library(path, "sm_80")
    (fake_nvcc / "text.so").write_text("no object")
    with pytest.raises(CannotBuild, match="text.so cannot be loaded"):
        Library(fake_nvcc / "text.so", "sm_80")


def arguments(name: str, device: str) -> tuple:
    x = torch.ones(2, 3, 64, device=device)
    packed = torch.ones(16, 8, dtype=torch.int32, device=device)
    scale, multiplier = torch.ones(16, device=device), torch.ones(16, 2, dtype=torch.int8, device=device)
    w = torch.ones(16, 64, dtype=torch.int8, device=device)
    return {
        "linear_w8a8": (x.to(torch.int8), scale[:1], (w, scale)),
        "linear_w4a8": (x.to(torch.int8), scale[:1], (packed, multiplier, scale)),
        "linear_w4a16": (x.bfloat16(), (packed, multiplier.half())),
    }[name]


@pytest.mark.parametrize("name", NAMES)
def test_ops_are_traced_whole(name: str) -> None:
    backend = next(b for b in OPS[name].backends if b.name == "cuda")
    graphs = []
    torch.compiler.reset()

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    given = arguments(name, "meta")
    compiled = torch.compile(lambda *a, **k: backend.fn(*a, **k), backend=keep, fullgraph=True)
    for options in ({}, {"out_dtype": torch.bfloat16}, {"out_scale": torch.ones(1, device="meta")}):
        y, want = compiled(*given, **options), OPS[name].reference(*given, **options)
        assert (y.shape, y.dtype, y.stride()) == (want.shape, want.dtype, want.stride())
    targets = {node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"}
    assert targets == {getattr(torch.ops.quamba, name).default}


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_on_the_cpu_is_no_crash(name: str) -> None:
    backend = next(b for b in OPS[name].backends if b.name == "cuda")
    with pytest.raises(NotImplementedError, match=f"quamba::{name}"):
        backend(*arguments(name, "cpu"))
    assert backend.prepack(arguments(name, "cpu")[-1]) is not None


def test_int4_is_multiplied_directly_where_that_is_faster() -> None:
    """Rows, out features, in features and group size as measured on an H100 of 132 multiprocessors."""
    direct = [(96, 10576, 2560, 32), (512, 10576, 2560, 128), (1536, 2560, 5120, 128), (2048, 10240, 2560, 128)]
    expanded = [(512, 10576, 2560, 64), (1024, 192, 5120, 128), (4096, 10240, 2560, 128), (512, 4096, 16384, 128)]
    assert all(linear.multiplies_int4(*case) for case in direct)
    assert not any(linear.multiplies_int4(*case) for case in expanded)
    assert linear.tiles_fill(2048, 10240, 132) and linear.tiles_fill(2048, 4096, 132)
    assert linear.tiles_fill(2048, 10576, 132)  # 656 tiles, four of 64 out features, 16 beside them
    assert not linear.tiles_fill(2048, 8512, 132) and not linear.tiles_fill(2048, 2560, 132)
    assert linear.tiles_fill(2048, 10496 + 48, 132) and not linear.tiles_fill(2048, 10496 + 56, 132)  # too many pieces


def test_a_norm_holds_back_the_gemm_over_int4_and_int8(kernels) -> None:
    kernels("sm_90a")
    w = torch.empty(10576, 320, dtype=torch.int32)
    multiplier = torch.empty(10576, 20, dtype=torch.int8)
    assert linear.waits_for_all(1024, w, multiplier)
    assert not linear.waits_for_all(256, w, multiplier)  # K is split, and weights come before
    assert not linear.waits_for_all(4096, w, multiplier)  # their expansion comes next
    assert not linear.waits_for_all(1024, w, None)


def test_a_weight_is_announced_where_it_is_going_to_be_expanded(kernels) -> None:
    kernels("sm_90a")
    weights = torch.ones(64, 8, dtype=torch.int32), torch.ones(64, 2, dtype=torch.int8), torch.ones(64)
    with linear.ahead_w4a8(weights, 4096):
        assert expansion.waiting(torch.device("cpu")).O == 64
    with linear.ahead_w4a8(weights, 16):  # unpacked as they are multiplied
        assert expansion.waiting(torch.device("cpu")).O == 0
