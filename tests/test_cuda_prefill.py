"""The cuda backend between the linears without a GPU: structs as in C, what a kernel is given, what is refused."""

import contextlib
import ctypes
import shutil
import subprocess

import pytest
import torch

from quamba_kernels import OPS, Setting
from quamba_kernels.cuda import arguments, conv, expansion, rowwise, scan, ssd, stack
from quamba_kernels.cuda.build import CSRC

BF16 = torch.bfloat16
X, ONES = torch.randn(2, 3, 16), torch.ones(16)

STRUCTS = [
    rowwise.QuambaRows, rowwise.QuambaGate, conv.QuambaConv, scan.QuambaScan, scan.QuambaScanCodes,
    scan.QuambaScanRates, ssd.QuambaSsdScan, ssd.QuambaSsdPrefill, expansion.QuambaExpansion,
    stack.QuambaStackLinear, stack.QuambaStackLayer, stack.QuambaStack,
]  # fmt: skip


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_structs_are_laid_out_as_in_c(tmp_path) -> None:
    lines = []
    for struct in STRUCTS:
        lines.append(f'printf("{struct.__name__} %zu\\n", sizeof({struct.__name__}));')
        for name, *_ in struct._fields_:
            lines.append(f'printf("{name} %zu\\n", offsetof({struct.__name__}, {name}));')
    headers = "".join(f'#include "{name}.h"\n' for name in ("rowwise", "conv", "scan", "stack"))
    source = tmp_path / "layout.c"
    source.write_text(f"#include <stdio.h>\n#include <stddef.h>\n{headers}int main(void) {{ {' '.join(lines)} }}\n")
    subprocess.run(["cc", f"-I{CSRC}", str(source), "-o", str(tmp_path / "layout")], check=True)
    said = subprocess.run([str(tmp_path / "layout")], capture_output=True, text=True, check=True).stdout.split("\n")
    want = []
    for struct in STRUCTS:
        want.append(f"{struct.__name__} {ctypes.sizeof(struct)}")
        want += [f"{name} {getattr(struct, name).offset}" for name, *_ in struct._fields_]
    assert said[:-1] == want


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch):
    """(kernel, its arguments) of every call; no kernel runs."""
    seen = []

    class Recorder:
        def call(self, name, given, device):
            seen.append((name, type(given).from_buffer_copy(given)))

    monkeypatch.setattr(arguments, "library", lambda index: Recorder())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return seen


def test_rows_of_a_wider_tensor_are_read_where_they_lie(calls) -> None:
    wide = torch.randn(2, 5, 24).half()
    part = wide[..., 8:16]
    rowwise.quantize(part, torch.ones(8))
    rowwise.rms_norm(part, None, 1e-5, None, True, torch.float32)
    rowwise.rms_norm(part.transpose(0, 1), torch.ones(8), 1e-5, None, False, torch.bfloat16, True)
    (name, a), (_, b), (_, c) = calls
    assert (a.holds_next, b.holds_next, c.holds_next) == (0, 0, 1)
    assert name == "quamba_quantize" and a.x == part.data_ptr() and (a.rows, a.x_stride, a.D) == (10, 24, 8)
    assert a.out_scale_count == 8 and a.x_dtype == 1 and a.y_dtype == 3 and not a.y_scale and not a.weight
    assert b.y_scale and not b.out_scale and b.y_dtype == 3
    assert c.x != part.data_ptr() and c.x_stride == 8 and c.y_dtype == 2 and c.weight_dtype == 0


def test_a_convolution_gets_strides_and_scales(calls) -> None:
    wide, state = torch.randn(3, 7, 48).half(), torch.zeros(3, 3, 16, dtype=torch.int8)
    x, weight = wide[..., 16:32], torch.ones(16, 4, dtype=torch.int8)
    y = conv.causal_conv1d(
        x, weight, None, state, torch.ones(16), None, torch.ones(16), torch.ones(1), torch.float32, None
    )
    (name, a), = calls  # fmt: skip
    assert name == "quamba_causal_conv1d" and y.dtype == torch.int8
    assert (a.B, a.T, a.C, a.W, a.sequences, a.batch_stride, a.token_stride) == (3, 7, 16, 4, 3, 7 * 48, 48)
    assert a.x == x.data_ptr() and a.state == state.data_ptr() and a.in_scale_count == 16 and a.out_scale_count == 1
    conv.causal_conv1d(x[:0], weight, None, state[:0], torch.ones(1), None, None, None, torch.float32, None)
    assert len(calls) == 1


def test_a_scan_without_tokens_still_returns_states(calls) -> None:
    x, A = torch.randn(1, 0, 8), torch.ones(8, 16)
    bounds = torch.zeros(3, dtype=torch.int32)
    y, last = scan.selective_scan(
        x, x, A, x.new_empty(1, 0, 16), x.new_empty(1, 0, 16), torch.ones(8), None, None, None, None, None,
        torch.float16, bounds,
    )  # fmt: skip
    (name, a), = calls  # fmt: skip
    assert name == "quamba_selective_scan" and (a.T, a.sequences, a.N, a.I) == (0, 2, 16, 8) and not a.z
    assert y.shape == (1, 0, 8) and last.shape == (2, 8, 16) and a.last == last.data_ptr() and not a.state


def prefill(
    x=None, projected=None, w=None, w_scale=None, bias=None, z=None, B_scale=None, C_scale=None, z_scale=None,
    out_dtype=BF16, N=16,
):  # fmt: skip
    """A call of the prefill with 16 channels, 32 rates and codes of B and C where these have scales."""
    x = torch.ones(2, 19, 16, dtype=torch.int8) if x is None else x
    projected = torch.ones(*x.shape[:2], 32 + 2 * N, dtype=BF16) if projected is None else projected
    w = torch.ones(x.shape[2], 32, dtype=torch.int8) if w is None else w
    w_scale, A = ONES if w_scale is None else w_scale, torch.ones(x.shape[2], N)
    z = torch.ones(x.shape, dtype=BF16) if z is None else z
    given = x, projected, w, w_scale, bias, A, torch.ones(x.shape[2]), z, None, torch.ones(1)
    return scan.selective_prefill(*given, B_scale, C_scale, z_scale, out_dtype)


def test_a_prefill_is_three_kernels_that_hand_on(calls) -> None:
    wide, one = torch.ones(2, 19, 80, dtype=BF16), torch.ones(1)
    scale = ONES.clone()
    y, last = prefill(
        projected=wide[..., 8:72], bias=ONES, z=wide[..., 24:40], B_scale=one, C_scale=one.clone(), z_scale=scale
    )
    (first, codes), (second, rates), (third, a) = calls
    assert (first, second, third) == ("quamba_scan_codes", "quamba_scan_rates", "quamba_selective_scan")
    assert y.shape == (2, 19, 16) and y.dtype == BF16 and last.shape == (2, 16, 16)
    assert (codes.T, codes.B, codes.rank, codes.N, codes.x_dtype) == (19, 2, 32, 16, 2)
    assert codes.x != wide[..., 8:].data_ptr() and codes.columns and codes.b_scale == one.data_ptr() != codes.c_scale
    assert (rates.T, rates.B, rates.I, rates.rank, rates.dt_dtype) == (19, 2, 16, 32, 2)
    assert (rates.rank_codes, rates.rank_scale) == (codes.rank_codes, codes.rank_scale)
    assert rates.bias == ONES.data_ptr()
    assert a.dt == rates.dt and (a.b, a.c) == (codes.columns, codes.columns + 16) and (a.b_token, a.b_dtype) == (32, 3)
    assert (a.z, a.z_batch, a.z_token, a.z_dtype) == (wide[..., 24:].data_ptr(), 19 * 80, 80, 2)
    assert (a.z_scale, a.z_scale_count) == (scale.data_ptr(), 16)


def test_a_prefill_without_codes_of_columns_scans_them_where_they_lie(calls) -> None:
    projected = torch.ones(2, 19, 64, dtype=BF16)
    prefill(projected=projected)
    (_, codes), (_, rates), (_, a) = calls
    assert not codes.columns and not codes.b_scale and codes.x == projected.data_ptr() and not rates.bias
    assert (a.b, a.c, a.b_token, a.b_dtype) == (projected.data_ptr() + 64, projected.data_ptr() + 96, 64, 2)
    prefill(x=torch.ones(2, 0, 16, dtype=torch.int8))
    assert [name for name, _ in calls[3:]] == ["quamba_selective_scan"]


def ssd_scan(x=None, B=None, C=None, state=None, limit=(0.0, float("inf")), out_dtype=torch.bfloat16, **given):
    """A call of the SSD scan with 4 heads of 16 channels, 2 groups of 16 states."""
    x = torch.ones(2, 3, 4, 16, dtype=torch.int8) if x is None else x
    B = torch.ones(*x.shape[:2], 2, 16, dtype=torch.int8) if B is None else B
    H, P = x.shape[2:]
    scales = {"x_scale": torch.ones(H, P), "B_scale": torch.ones(B.shape[2]), "C_scale": torch.ones(B.shape[2])} | given
    dt, A = torch.ones(*x.shape[:2], H).half(), -torch.ones(H)
    return ssd.ssd_scan(x, dt, A, B, B if C is None else C, A, None, state, *scales.values(), *limit, out_dtype, None)


def test_an_ssd_scan_gets_strides_of_columns(calls) -> None:
    wide = torch.ones(2, 3, 4 * 16 + 2 * 2 * 16, dtype=torch.int8)
    x, B, C = wide.split([64, 32, 32], -1)
    y, last = ssd_scan(x.unflatten(-1, (4, 16)), B.unflatten(-1, (2, 16)), C.unflatten(-1, (2, 16)))
    (name, a), = calls  # fmt: skip
    assert name == "quamba_ssd_scan" and y.dtype == torch.bfloat16 and last.shape == (2, 4, 16, 16)
    assert (a.T, a.H, a.P, a.G, a.N, a.sequences, a.cuts) == (3, 4, 16, 2, 16, 2, 0)
    assert (a.x, a.b, a.c) == (x.data_ptr(), B.data_ptr(), C.data_ptr())
    assert (a.x_batch, a.x_token, a.x_head, a.b_token, a.b_group, a.c_group) == (384, 128, 16, 128, 16, 16)
    assert (a.dt_batch, a.dt_token, a.y_dtype, a.lowest, a.highest) == (12, 4, 2, 0.0, float("inf"))


def test_scans_and_convolutions_take_along_the_weight_that_is_announced(calls) -> None:
    w, multiplier = torch.ones(40, 16, dtype=torch.int32), torch.ones(40, 4, dtype=torch.int8)
    x, dt, A, B = torch.ones(1, 3, 8), torch.ones(1, 3, 8), -torch.ones(8, 16), torch.ones(1, 3, 16)
    with expansion.ahead(w, multiplier):
        ssd_scan()
        codes = expansion.expanded(w)
        ssd_scan()
    with expansion.ahead(w, multiplier):
        scan.selective_scan(x, dt, A, B, B, torch.ones(8), None, None, None, None, None, BF16, None)
    with expansion.ahead(w, multiplier):
        conv.causal_conv1d(X, torch.ones(16, 4), None, None, None, None, None, None, BF16, None)
    ssd_scan()
    (_, first), (_, second), (_, third), (_, fourth), (_, last) = calls
    a = first.expansion
    assert codes is not None and codes.shape == (40, 128) and codes.dtype == torch.int8
    assert (a.w, a.multiplier, a.y) == (w.data_ptr(), multiplier.data_ptr(), codes.data_ptr())
    assert (a.O, a.K, a.S) == (40, 128, 32)
    assert third.expansion.y and fourth.expansion.y and not second.expansion.y and not last.expansion.y


def ssd_prefill(mixed, dt=None, kept=None, state=None):
    """A call of the prefill with two heads of 64 channels, one group and 128 states, all in codes."""
    dt = torch.ones(*mixed.shape[:2], 2, dtype=BF16) if dt is None else dt
    each, ones, one = torch.ones(384), torch.ones(2), torch.ones(1)
    weight = torch.ones(384, 4, dtype=torch.int8)
    given = mixed, dt, weight, None, kept, -ones, ones, None, state, 1, 128, each, each, each
    return ssd.ssd_prefill(*given, torch.ones(2, 64), one, one, 0.0, float("inf"), BF16)


def test_a_prompt_is_convolved_and_scanned_in_one_call(calls) -> None:
    wide = torch.ones(2, 5, 2 * 128 + 256 + 2, dtype=BF16)
    mixed, dt = wide[..., 128:512], wide[..., 512:]
    kept = torch.zeros(2, 384, 3, dtype=torch.int8).transpose(1, 2)
    y, last = ssd_prefill(mixed, dt, kept)
    (name, a), = calls  # fmt: skip
    assert name == "quamba_ssd_prefill" and y.shape == (2, 5, 2, 64) and last.shape == (2, 2, 64, 128)
    assert (a.conv.x, a.conv.token_stride, a.conv.C, a.conv.W, a.conv.y_dtype) == (mixed.data_ptr(), 514, 384, 4, 3)
    assert a.conv.state and a.conv.state != kept.data_ptr() and not a.conv.expansion.y
    assert (a.scan.x, a.scan.b, a.scan.c) == (a.conv.y, a.conv.y + 128, a.conv.y + 256)
    assert (a.scan.H, a.scan.P, a.scan.G, a.scan.N) == (2, 64, 1, 128)
    assert (a.scan.T, a.scan.x_token, a.scan.x_dtype) == (5, 384, 3)
    assert (a.scan.dt, a.scan.dt_token, a.scan.y, a.scan.last) == (dt.data_ptr(), 514, y.data_ptr(), last.data_ptr())


def test_a_prompt_without_tokens_leaves_the_state(calls) -> None:
    state = torch.randn(2, 2, 64, 128)
    y, last = ssd_prefill(torch.ones(2, 0, 384, dtype=BF16), state=state)
    assert not calls and y.shape == (2, 0, 2, 64) and torch.equal(last, state)
    assert not ssd_prefill(torch.ones(2, 0, 384, dtype=BF16))[1].any()


def test_rows_that_an_ssd_scan_cannot_copy_by_16_bytes_are_copied(calls) -> None:
    wide = torch.ones(2, 3, 4, 24, dtype=torch.int8)
    ssd_scan(wide[..., 8:])
    ssd_scan(wide[..., 16:].repeat(1, 1, 1, 2)[:, 1:])
    (_, a), (_, b) = calls
    assert a.x != wide[..., 8:].data_ptr() and (a.x_batch, a.x_token, a.x_head) == (192, 64, 16)
    assert (b.x_batch, b.x_token, b.x_head) == (192, 64, 16) and b.T == 2


REFUSED = {
    r"weight has to be \[16\], got \[8\]": lambda: rowwise.rms_norm(X, torch.ones(8), 1e-5, None, False, X.dtype),
    "x has to be torch.float32 or torch.float16 or torch.bfloat16, got torch.int8": lambda: rowwise.quantize(
        X.to(torch.int8), None
    ),
    "out_dtype has to be one of": lambda: rowwise.rms_norm(X, None, 1e-5, None, False, torch.int8),
    "weight .* is not contiguous": lambda: rowwise.rms_norm(X, torch.ones(32)[::2], 1e-5, None, False, X.dtype),
    "z lies on meta, and x on cpu": lambda: rowwise.gate_output(
        X, X.to("meta"), None, 1e-5, None, 0, 0, None, False, X.dtype
    ),
    "norm_groups has to divide the 16 channels, got 3": lambda: rowwise.gate_output(
        X, X, None, 1e-5, None, 3, 0, None, False, X.dtype
    ),
    "Hadamard blocks that divide the 16 channels, got 12": lambda: rowwise.gate_output(
        X, X, None, 1e-5, None, 0, 12, None, False, X.dtype
    ),
    "convolutions of width 2 to 4, got 5": lambda: conv.causal_conv1d(
        X, torch.ones(16, 5), None, None, None, None, None, None, X.dtype, None
    ),
    r"state has to be \[2, 3, 16\], got \[1, 3, 16\]": lambda: conv.causal_conv1d(
        X, torch.ones(16, 4), None, X[:1], None, None, None, None, X.dtype, None
    ),
    "takes 8, 16, 32 states a channel, got 4": lambda: scan.selective_scan(
        X, X, torch.ones(16, 4), X, X, ONES, None, None, None, None, None, X.dtype, None
    ),
    "takes heads of 16, 32, 64, 128 channels, got 24": lambda: ssd_scan(torch.ones(2, 3, 4, 24, dtype=torch.int8)),
    "takes 16, 32, 64, 128, 256 states a channel, got 8": lambda: ssd_scan(B=torch.ones(2, 3, 2, 8)),
    "computes outputs of 16 bits, got float32": lambda: ssd_scan(out_dtype=torch.float32),
    r"with 2 heads, 1 groups and 128 states, got \[2, 3, 256\]": lambda: ssd_prefill(torch.ones(2, 3, 256).half()),
    "the 3 state groups have to divide the 4 heads": lambda: ssd_scan(B=torch.ones(2, 3, 3, 16).half()),
    "dt_limit has to rise from 0 or more": lambda: ssd_scan(limit=(-1.0, 2.0)),
    "x has to be torch.float16 or torch.bfloat16 or torch.int8, got torch.float32": lambda: ssd_scan(
        torch.ones(2, 3, 4, 16)
    ),
    r"state has to be \[2, 4, 16, 16\], got \[1, 4, 16, 16\]": lambda: ssd_scan(state=torch.ones(1, 4, 16, 16)),
    r"x_scale has to be \[4, 16\], got \[4\]": lambda: ssd_scan(x_scale=torch.ones(4)),
    r"B has to be \[2, 3, 8\], got \[2, 3, 16\]": lambda: scan.selective_scan(
        X, X, torch.ones(16, 8), X, X, ONES, None, None, None, None, None, X.dtype, None
    ),
    r"projected has to be \[2, 19, 64\], got \[2, 19, 72\]": lambda: prefill(projected=torch.ones(2, 19, 72)),
    "takes activations of float16 or bfloat16, got float32": lambda: prefill(out_dtype=torch.float32),
    "takes a multiple of 32 rates a token, up to 160, got 48": lambda: prefill(w=torch.ones(16, 48).char()),
    "takes a multiple of 8 channels, got 12": lambda: prefill(x=torch.ones(2, 19, 12).char()),
    "B_scale and C_scale come together": lambda: prefill(B_scale=torch.ones(1)),
    r"z has to be \[2, 19, 16\], got \[2, 19, 8\]": lambda: prefill(z=torch.ones(2, 19, 8)),
    "the CUDA rotate_input takes Hadamard blocks that divide the 16 channels, got 12": lambda: rowwise.rotate_input(
        X, 12, None, False, X.dtype
    ),
    r"w_scale has to be \[16\], got \[8\]": lambda: prefill(w_scale=torch.ones(8)),
    "bias does not start at a multiple of 16 bytes": lambda: prefill(bias=torch.ones(17)[1:]),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_a_kernel_would_misread_is_refused(calls, sentence: str) -> None:
    with pytest.raises((TypeError, ValueError), match=sentence):
        REFUSED[sentence]()
    assert not calls


def test_shapes_that_no_kernel_serves_are_passed_over_in_a_sentence() -> None:
    for name, shape, sentence in (
        ("gate_output", {"I": 88, "block": 88}, "orders 2^k times 1, 12, 20, 28, 36, got blocks of 88"),
        ("gate_output", {"I": 10**6}, "holds a row in shared memory"),
        ("rotate_input", {"I": 88, "block": 88}, "orders 2^k times 1, 12, 20, 28, 36, got blocks of 88"),
        ("causal_conv1d", {"W": 8}, "width 2 to 4, got 8"),
        ("selective_scan", {"N": 64}, "8, 16, 32 states a channel, got 64"),
        ("selective_prefill", {"N": 16, "R": 48, "I": 1536}, "multiple of 32 rates a token, up to 160, got 48"),
        ("ssd_scan", {"P": 24, "N": 64}, "heads of 16, 32, 64, 128 channels, got 24"),
        ("ssd_scan", {"P": 64, "N": 48}, "16, 32, 64, 128, 256 states a channel, got 48"),
        ("ssd_prefill", {"P": 128, "N": 128, "W": 4}, "written for 64 channels a head, got 128"),
        ("ssd_prefill", {"P": 64, "N": 64, "W": 4}, "written for 128 states a channel, got 64"),
        ("ssd_prefill", {"P": 64, "N": 128, "W": 3}, "written for 4 taps, got 3"),
    ):
        reason = OPS[name].explain(Setting("cuda", torch.float16, shape))["cuda"]
        assert sentence in reason
        assert "GPU" in OPS[name].explain(Setting("cpu", torch.float16, shape))["cuda"]
