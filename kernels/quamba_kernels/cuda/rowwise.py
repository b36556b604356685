"""The token-wise ops as custom ops quamba::rms_norm, quamba::quantize and others, of csrc/rowwise.h.

Each returns the data and the scales of its rows, which are empty where there are none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quamba_kernels.cuda.arguments import (
    CODES,
    FLOATS,
    Arguments,
    constant,
    fields,
    launch,
    out_type,
    stream,
)
from quamba_kernels.cuda.library import DTYPES
from quamba_kernels.hadamard import factor

BASES = (1, 12, 20, 28, 36)
"""Orders of the Hadamard matrices that are no power of two times another: csrc/hadamard.cuh."""
LONGEST = 48 * 1024
"""Channels of a row that fit into the shared memory of a multiprocessor, fp32."""


class QuambaRows(Arguments):
    """The struct of csrc/rowwise.h for rms_norm and quantize."""

    _fields_ = fields(
        "x weight out_scale y_scale y", "rows x_stride", "D out_scale_count x_dtype weight_dtype y_dtype holds_next",
        "eps",
    )


class QuambaGate(Arguments):
    """The struct of csrc/rowwise.h for gate_output."""

    _fields_ = fields(
        "y z z_scale weight out_scale u_scale u", "rows y_stride z_stride",
        "I z_scale_count norm_groups block y_dtype z_dtype weight_dtype u_dtype", "eps",
    )  # fmt: skip


def gate_why_not(I: int, block: int) -> str | None:
    """Why the gate and the rotation do not take rows of I channels with Hadamard blocks of this size, in a sentence."""
    if I > LONGEST:
        return f"holds a row in shared memory: up to {LONGEST} channels, got {I}"
    if block > 1 and I % block:
        return f"takes Hadamard blocks that divide the {I} channels, got {block}"
    parts = factor(block) if block > 1 else (1, 1)
    if parts is None or parts[0] not in BASES:
        return f"knows the Hadamard matrices of orders 2^k times {', '.join(map(str, BASES))}, got blocks of {block}"
    return None


def _rows(x: Tensor) -> Tensor:
    """x [..., D] as [rows, D]: a view where one stride leads from row to row, else a copy."""
    return x.reshape(-1, x.shape[-1])


def _outputs(x: Tensor, codes: bool, per_token: bool, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if not codes:
        out_type(out_dtype)
    scale = (*x.shape[:-1], 1) if per_token else (0,)
    y = torch.empty(x.shape, dtype=torch.int8 if codes else out_dtype, device=x.device)
    return y, torch.empty(scale, dtype=torch.float32, device=x.device)


def _run_rows(
    kernel: str, x: Tensor, weight: Tensor | None, eps: float, out_scale: Tensor | None, shapes: tuple[int, ...],
    per_token: bool, out_dtype: torch.dtype, holds_next: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x = stream("x", x, x, FLOATS)
    D = x.shape[-1]
    if per_token:
        out_scale = None
    y, y_scale = _outputs(x, per_token or out_scale is not None, per_token, out_dtype)
    rows = _rows(x)
    a = QuambaRows(rows=len(rows), x_stride=rows.stride(0), D=D, eps=eps, x=rows.data_ptr(), y=y.data_ptr())
    a.x_dtype, a.y_dtype = DTYPES[x.dtype], DTYPES[y.dtype]
    a.weight = constant("weight", weight, x, FLOATS, (D,))
    a.weight_dtype = 0 if weight is None else DTYPES[weight.dtype]
    a.out_scale = constant("out_scale", out_scale, x, (torch.float32,), *((n,) for n in shapes))
    a.out_scale_count = 0 if out_scale is None else out_scale.numel()
    a.y_scale, a.holds_next = y_scale.data_ptr() if per_token else None, holds_next
    if len(rows):
        launch(kernel, a, x.device)
    return y, y_scale


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, out_scale: Tensor | None, per_token: bool, out_dtype: torch.dtype,
    holds_next: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """holds_next: many rows let the kernel launched next start with their end, where it has nothing to do before."""
    return _run_rows("quamba_rms_norm", x, weight, eps, out_scale, (1,), per_token, out_dtype, holds_next)


def quantize(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return _run_rows("quamba_quantize", x, None, 0.0, scale, (1, x.shape[-1]), scale is None, x.dtype)


def _run_gate(
    op: str, a: QuambaGate, y: Tensor, block: int, out_scale: Tensor | None, per_token: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The kernel of gate_output over y, where ``a`` says all that concerns a gate and a norm."""
    I, rows = y.shape[-1], _rows(y)
    if reason := gate_why_not(I, block):
        raise ValueError(f"the CUDA {op} {reason}")
    if per_token:
        out_scale = None
    u, u_scale = _outputs(y, per_token or out_scale is not None, per_token, out_dtype)
    a.rows, a.y_stride, a.I, a.block = len(rows), rows.stride(0), I, block
    a.y, a.u, a.y_dtype, a.u_dtype = rows.data_ptr(), u.data_ptr(), DTYPES[y.dtype], DTYPES[u.dtype]
    a.out_scale = constant("out_scale", out_scale, y, (torch.float32,), (1,))
    a.u_scale = u_scale.data_ptr() if per_token else None
    if len(rows):
        launch("quamba_gate_output", a, y.device)
    return u, u_scale


def gate_output(
    y: Tensor, z: Tensor, weight: Tensor | None, eps: float, z_scale: Tensor | None, norm_groups: int, block: int,
    out_scale: Tensor | None, per_token: bool, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = stream("y", y, y, FLOATS)
    z = stream("z", z, y, (*FLOATS, *CODES), tuple(y.shape))
    I, z_rows = y.shape[-1], _rows(z)
    if norm_groups and I % norm_groups:
        raise ValueError(f"norm_groups has to divide the {I} channels, got {norm_groups}")
    a = QuambaGate(z=z_rows.data_ptr(), z_stride=z_rows.stride(0), z_dtype=DTYPES[z.dtype])
    a.norm_groups, a.eps = norm_groups, eps
    a.z_scale = constant("z_scale", z_scale, y, (torch.float32,), (1,), (I,))
    a.z_scale_count = 0 if z_scale is None else z_scale.numel()
    a.weight = constant("weight", weight, y, FLOATS, (I,))
    a.weight_dtype = 0 if weight is None else DTYPES[weight.dtype]
    return _run_gate("gate_output", a, y, block, out_scale, per_token, out_dtype)


def rotate_input(
    x: Tensor, block: int, out_scale: Tensor | None, per_token: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _run_gate("rotate_input", QuambaGate(), stream("x", x, x, FLOATS), block, out_scale, per_token, out_dtype)


def _fake(x: Tensor, codes: bool, per_token: bool, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale = (*x.shape[:-1], 1) if per_token else (0,)
    y = x.new_empty(x.shape, dtype=torch.int8 if codes else out_dtype)
    return y, x.new_empty(scale, dtype=torch.float32)


def _fake_rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, out_scale: Tensor | None, per_token: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _fake(x, per_token or out_scale is not None, per_token, out_dtype)


def _fake_quantize(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return _fake(x, True, scale is None, x.dtype)


def _fake_gate_output(
    y: Tensor, z: Tensor, weight: Tensor | None, eps: float, z_scale: Tensor | None, norm_groups: int, block: int,
    out_scale: Tensor | None, per_token: bool, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _fake(y, per_token or out_scale is not None, per_token, out_dtype)


def _fake_rotate_input(
    x: Tensor, block: int, out_scale: Tensor | None, per_token: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _fake(x, per_token or out_scale is not None, per_token, out_dtype)


_OUT = "Tensor? out_scale, bool per_token, ScalarType out_dtype) -> (Tensor, Tensor)"
_LIBRARY = torch.library.Library("quamba", "FRAGMENT")
for _op, _without_data, _schema in (
    (rms_norm, _fake_rms_norm, f"(Tensor x, Tensor? weight, float eps, {_OUT}"),
    (quantize, _fake_quantize, "(Tensor x, Tensor? scale) -> (Tensor, Tensor)"),
    (gate_output, _fake_gate_output, "(Tensor y, Tensor z, Tensor? weight, float eps, Tensor? z_scale, "
                                     f"int norm_groups, int block, {_OUT}"),
    (rotate_input, _fake_rotate_input, f"(Tensor x, int block, {_OUT}"),
):  # fmt: skip
    _LIBRARY.define(f"{_op.__name__}{_schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_op.__name__, _op, "CUDA")
    torch.library.register_fake(f"quamba::{_op.__name__}", _without_data, lib=_LIBRARY)
