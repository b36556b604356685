"""The decode steps as custom ops quamba::*: checked, then one or two kernels; safe in CUDA graphs.

States and constants that are not contiguous or not aligned are refused: a copy would not be the state, and one of a
constant would be made at every call and might not be finished, for the kernels read constants before they wait for
those before them. Activations need unit stride along their last axis alone, so slices of a projection are read as they
lie.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from quamba_kernels.cuda.library import DTYPES, library
from quamba_kernels.cuda.linear import ALIGNMENT, FLOATS
from quamba_kernels.hadamard import factor

STATES = (torch.float32, torch.float16, torch.int8)
WIDTH, RUN, MAX_CHANNELS = 4, 32, 16384
SSD_STATES, SELECTIVE_STATES = (16, 32, 64, 128, 256), (16,)
BASES = (1, 12, 20, 28, 36)
"""Orders of the base matrices that csrc/hadamard.cuh knows."""

_POINTERS = (
    "z", "x", "B", "C", "dt", "conv_state", "conv_weight", "conv_weight_scale", "conv_bias", "conv_in_scale",
    "conv_out_scale", "state", "state_scale", "rng", "A", "D", "dt_bias", "x_scale", "B_scale", "C_scale", "z_scale",
    "norm_weight", "out_scale", "token_scale", "out", "workspace",
)  # fmt: skip
_LONGS = ("workspace_bytes", "z_stride", "x_stride", "bc_stride", "dt_stride")
_INTEGERS = (
    "batch", "H", "P", "G", "N", "channels", "in_", "x_in", "conv_state_type", "conv_weight_type", "conv_bias_type",
    "state_type", "norm_weight_type", "out_type", "conv_in_count", "x_count", "B_count", "C_count", "z_count",
    "norm_groups", "block",
)  # fmt: skip


class QuambaDecode(ctypes.Structure):
    """The struct of csrc/decode.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_longlong) for name in _LONGS),
        *((name, ctypes.c_int) for name in _INTEGERS),
        *((name, ctypes.c_float) for name in ("eps", "dt_min", "dt_max")),
    ]

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={getattr(self, name)}" for name in ("batch", "H", "P", "G", "N", "channels"))
        return f"{sizes} norm_groups={self.norm_groups} block={self.block}"


def shape_why_not(shape: dict[str, int]) -> str | None:
    """Why the kernels do not take a mixer of these sizes, in a sentence; sizes that are not given are not judged."""
    if shape.get("W", WIDTH) != WIDTH:
        return f"takes convolutions over {WIDTH} tokens, got {shape['W']}"
    known = SSD_STATES if "P" in shape else SELECTIVE_STATES
    if shape.get("N", known[0]) not in known:
        return f"takes d_state {' or '.join(map(str, known))}, got {shape['N']}"
    inner = shape.get("I", shape.get("H", RUN) * shape.get("P", 1))
    if inner % RUN or inner > MAX_CHANNELS:
        return f"takes d_inner a multiple of {RUN} up to {MAX_CHANNELS}, got {inner}"
    groups = shape.get("norm_groups", 0)
    if groups and inner % (groups * RUN):
        return f"takes norm groups of a multiple of {RUN} channels, got {groups} of {inner}"
    block = shape.get("block", 0)
    parts = factor(block) if block > 1 else (1, 1)
    if parts is None or parts[0] not in BASES or (block > 1 and inner % block):
        return f"knows Hadamard matrices of 2^k times {', '.join(map(str, BASES))} that divide {inner}, got {block}"
    return None


class Call:
    """The struct of a call, filled from tensors that are checked and kept alive until it is made."""

    def __init__(self, device: torch.device, **fields: int | float) -> None:
        self.device, self.problem = device, QuambaDecode(**fields)
        self.kept: list[Tensor] = []

    def _set(self, field: str, tensor: Tensor) -> None:
        self.kept.append(tensor)
        setattr(self.problem, field, tensor.data_ptr())

    def rows(self, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], stride: str) -> None:
        """An activation [B, C] whose rows may lie apart."""
        if tensor.device != self.device or tensor.dtype != dtype or tensor.shape != shape:
            raise ValueError(
                f"{name} has to be {dtype} {list(shape)} on {self.device}, "
                f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
        if shape[-1] > 1 and tensor.stride(-1) != 1:
            tensor = tensor.contiguous()
        self._set(name, tensor)
        setattr(self.problem, stride, tensor.stride(0))

    def whole(
        self, name: str, tensor: Tensor | None, dtypes: tuple[torch.dtype, ...], *shapes: tuple[int, ...],
        kind: str | None = None, count: str | None = None, aligned: bool = False,
    ) -> None:  # fmt: skip
        """A contiguous tensor of one of the shapes, or None; kind and count name the fields for its type and size.

        aligned: it has to start at a multiple of 16 bytes.
        """
        if tensor is None:
            return
        if tensor.device != self.device or tensor.dtype not in dtypes or tensor.shape not in shapes:
            raise ValueError(
                f"{name} has to be {' or '.join(map(str, dtypes))} {' or '.join(str(list(s)) for s in shapes)} "
                f"on {self.device}, got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
        if not tensor.is_contiguous() or (aligned and tensor.data_ptr() % ALIGNMENT):
            raise ValueError(f"{name} {list(tensor.shape)} has to be contiguous and aligned; pass a clone")
        self._set(name, tensor)
        if kind is not None:
            setattr(self.problem, kind, DTYPES[tensor.dtype])
        if count is not None:
            setattr(self.problem, count, tensor.numel())

    def scale(self, name: str, tensor: Tensor | None, *shapes: tuple[int, ...], count: str | None = None) -> None:
        """A scale or another fp32 constant."""
        self.whole(name, tensor, (torch.float32,), *shapes, count=count)

    def convolution(
        self, state: Tensor, weight: Tensor, bias: Tensor | None, in_scale: Tensor | None,
        weight_scale: Tensor | None, out_scale: Tensor | None, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """What one token of the convolution needs."""
        p, channels = self.problem, (weight.shape[0],)
        kept = torch.int8 if in_scale is not None else dtype
        self.whole("conv_state", state, (kept,), (p.batch, WIDTH - 1, *channels), kind="conv_state_type")
        taps = (torch.int8,) if weight_scale is not None else FLOATS
        self.whole("conv_weight", weight, taps, (*channels, WIDTH), kind="conv_weight_type", aligned=True)
        self.whole("conv_bias", bias, FLOATS, channels, kind="conv_bias_type")
        self.scale("conv_in_scale", in_scale, (1,), channels, count="conv_in_count")
        self.scale("conv_weight_scale", weight_scale, channels)
        self.scale("conv_out_scale", out_scale, channels)

    def recurrence(
        self, state: Tensor, state_scale: Tensor | None, rng: Tensor | None, A: Tensor, D: Tensor,
        dt_bias: Tensor | None,
    ) -> None:  # fmt: skip
        """The state and the rates of its heads (or channels)."""
        sizes = tuple(state.shape[1:])  # H P N, or I N, and A is of the heads or of every state
        self.whole("state", state, STATES, (self.problem.batch, *sizes), kind="state_type", aligned=True)
        if (state.dtype == torch.int8) != (state_scale is not None):
            raise ValueError(f"an int8 state comes with scales, others without; got {state.dtype}")
        self.scale("state_scale", state_scale, tuple(state.shape[:-1]))
        if state_scale is not None:
            self.whole("rng", rng, (torch.int64,), (2,))
        self.whole("A", A, (torch.float32,), sizes[:1] if len(sizes) == 3 else sizes, aligned=True)
        rates = (self.problem.H,)
        self.scale("D", D, rates)
        self.scale("dt_bias", dt_bias, rates)

    def finish(
        self, kernel: str, channels: int, norm_weight: Tensor | None, out_scale: Tensor | None, per_token: bool,
        out_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Launch; the output [B, I] and its scale per token [B, 1], or an empty one."""
        if out_dtype not in FLOATS:
            raise TypeError(f"out_dtype has to be one of {FLOATS}, got {out_dtype}")
        self.whole("norm_weight", norm_weight, FLOATS, (channels,), kind="norm_weight_type", aligned=True)
        batch = self.problem.batch
        dtype = torch.int8 if per_token or out_scale is not None else out_dtype
        out = torch.empty(batch, channels, dtype=dtype, device=self.device)
        scale = torch.empty(batch if per_token else 0, 1, device=self.device)
        self.problem.out, self.problem.out_type = out.data_ptr(), DTYPES[dtype]
        if per_token:
            self.problem.token_scale = scale.data_ptr()
        else:
            self.scale("out_scale", out_scale, (1,))
        self.launch(kernel)
        return out, scale

    def launch(self, kernel: str) -> None:
        """Run on the current stream of the device."""
        if self.problem.batch:
            with torch.cuda.device(self.device):
                library(self.device.index).call(kernel, self.problem, self.device)


def conv_decode(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, in_scale: Tensor | None,
    weight_scale: Tensor | None, out_scale: Tensor | None, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    if x.dtype not in FLOATS or weight.dim() != 2 or weight.shape[1] != WIDTH:
        raise ValueError(f"takes floats and {WIDTH} taps, got {x.dtype} and a weight {list(weight.shape)}")
    if out_scale is None and out_dtype != x.dtype:
        raise TypeError(f"out_dtype has to be that of x, {x.dtype}, got {out_dtype}; out_scale gives an int8 result")
    channels = weight.shape[0]
    call = Call(x.device, batch=x.shape[0], channels=channels, in_=DTYPES[x.dtype])
    call.rows("x", x, x.dtype, (x.shape[0], channels), "x_stride")
    call.convolution(state, weight, bias, in_scale, weight_scale, out_scale, x.dtype)
    y = torch.empty_like(x, dtype=_conv_type(out_scale, out_dtype), memory_format=torch.contiguous_format)
    call.problem.out, call.problem.out_type = y.data_ptr(), DTYPES[y.dtype]
    call.launch("quamba_conv_decode")
    return y


def ssd_decode(
    projected: Tensor, conv_state: Tensor, state: Tensor, state_scale: Tensor | None, rng: Tensor | None,
    conv_weight: Tensor, conv_bias: Tensor | None, A: Tensor, D: Tensor, dt_bias: Tensor | None,
    norm_weight: Tensor | None, eps: float, conv_in_scale: Tensor | None, conv_weight_scale: Tensor | None,
    conv_out_scale: Tensor | None, x_scale: Tensor | None, B_scale: Tensor | None, C_scale: Tensor | None,
    z_scale: Tensor | None, dt_min: float, dt_max: float, norm_groups: int, block: int, out_scale: Tensor | None,
    per_token: bool, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if projected.dtype not in FLOATS:
        raise TypeError(f"projected has to be one of {FLOATS}, got {projected.dtype}")
    coded = [scale is not None for scale in (conv_out_scale, x_scale, B_scale, C_scale)]
    if any(coded) != all(coded):
        raise ValueError("conv_out_scale, x_scale, B_scale and C_scale come together")
    batch, H, P, N = state.shape
    inner, channels = H * P, conv_weight.shape[0]
    G = (channels - inner) // (2 * N)
    if reason := shape_why_not({"H": H, "P": P, "N": N, "W": conv_weight.shape[1], "norm_groups": norm_groups,
                                "block": block}):  # fmt: skip
        raise ValueError(f"the CUDA decode step {reason}")
    call = Call(
        projected.device, batch=batch, H=H, P=P, G=G, N=N, channels=channels, in_=DTYPES[projected.dtype],
        norm_groups=norm_groups, block=block, eps=eps, dt_min=dt_min, dt_max=dt_max,
    )  # fmt: skip
    if projected.stride(-1) != 1:
        projected = projected.contiguous()
    parts = projected.split([inner, inner, G * N, G * N, H], -1)
    strides = ("z_stride", "x_stride", "bc_stride", "bc_stride", "dt_stride")
    for name, part, stride in zip(("z", "x", "B", "C", "dt"), parts, strides, strict=True):
        call.rows(name, part, projected.dtype, (batch, part.shape[1]), stride)
    call.convolution(
        conv_state, conv_weight, conv_bias, conv_in_scale, conv_weight_scale, conv_out_scale, projected.dtype
    )
    call.recurrence(state, state_scale, rng, A, D, dt_bias)
    call.scale("x_scale", x_scale, (H, P), count="x_count")
    call.scale("B_scale", B_scale, (1,), (G,), count="B_count")
    call.scale("C_scale", C_scale, (1,), (G,), count="C_count")
    call.scale("z_scale", z_scale, (1,), (inner,), count="z_count")
    return call.finish("quamba_ssd_decode", inner, norm_weight, out_scale, per_token, out_dtype)


def selective_decode(
    z: Tensor, state: Tensor, state_scale: Tensor | None, rng: Tensor | None, x: Tensor, dt: Tensor, A: Tensor,
    B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor | None, x_scale: Tensor | None, B_scale: Tensor | None,
    C_scale: Tensor | None, z_scale: Tensor | None, block: int, out_scale: Tensor | None, per_token: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if z.dtype not in FLOATS:
        raise TypeError(f"z has to be one of {FLOATS}, got {z.dtype}")
    batch, inner, N = state.shape
    if reason := shape_why_not({"I": inner, "N": N, "block": block}):
        raise ValueError(f"the CUDA decode step {reason}")
    int8 = x_scale is not None
    call = Call(
        z.device, batch=batch, H=inner, P=1, G=1, N=N, channels=inner, in_=DTYPES[z.dtype],
        x_in=DTYPES[torch.int8 if int8 else z.dtype], block=block,
    )  # fmt: skip
    call.rows("z", z, z.dtype, (batch, inner), "z_stride")
    call.rows("x", x, torch.int8 if int8 else z.dtype, (batch, inner), "x_stride")
    call.rows("dt", dt, z.dtype, (batch, inner), "dt_stride")
    if B.stride() != C.stride() or B.stride(-1) != 1:
        B, C = B.contiguous(), C.contiguous()
    call.rows("B", B, z.dtype, (batch, N), "bc_stride")
    call.rows("C", C, z.dtype, (batch, N), "bc_stride")
    call.recurrence(state, state_scale, rng, A, D, dt_bias)
    call.scale("x_scale", x_scale, (1,), (inner,), count="x_count")
    call.scale("B_scale", B_scale, (1,), count="B_count")
    call.scale("C_scale", C_scale, (1,), count="C_count")
    call.scale("z_scale", z_scale, (1,), (inner,), count="z_count")
    return call.finish("quamba_selective_decode", inner, None, out_scale, per_token, out_dtype)


def _conv_type(out_scale: Tensor | None, out_dtype: torch.dtype) -> torch.dtype:
    return out_dtype if out_scale is None else torch.int8


def _fake_conv(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x, dtype=_conv_type(*rest[-2:]), memory_format=torch.contiguous_format)


def _fake(like: Tensor, batch: int, inner: int, *rest: Any) -> tuple[Tensor, Tensor]:
    out_scale, per_token, out_dtype = rest[-3:]
    dtype = torch.int8 if per_token or out_scale is not None else out_dtype
    data = like.new_empty((batch, inner), dtype=dtype)
    return data, like.new_empty((batch if per_token else 0, 1), dtype=torch.float32)


def _fake_ssd(projected: Tensor, conv_state: Tensor, state: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake(projected, state.shape[0], state.shape[1] * state.shape[2], *rest)


def _fake_selective(z: Tensor, state: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake(z, state.shape[0], state.shape[1], *rest)


_STATE = "Tensor(a!) state, Tensor(b!)? state_scale, Tensor(c!)? rng"
_OUT = "int block, Tensor? out_scale, bool per_token, ScalarType out_dtype) -> (Tensor, Tensor)"
_LIBRARY = torch.library.Library("quamba", "FRAGMENT")
for _op, _without_data, _schema in (
    (
        conv_decode, _fake_conv,
        "Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, Tensor? in_scale, Tensor? weight_scale, "
        "Tensor? out_scale, ScalarType out_dtype) -> Tensor",
    ),
    (
        ssd_decode, _fake_ssd,
        f"Tensor projected, Tensor(d!) conv_state, {_STATE}, Tensor conv_weight, Tensor? conv_bias, Tensor A, "
        "Tensor D, Tensor? dt_bias, Tensor? norm_weight, float eps, Tensor? conv_in_scale, Tensor? conv_weight_scale, "
        "Tensor? conv_out_scale, Tensor? x_scale, Tensor? B_scale, Tensor? C_scale, Tensor? z_scale, float dt_min, "
        f"float dt_max, int norm_groups, {_OUT}",
    ),
    (
        selective_decode, _fake_selective,
        f"Tensor z, {_STATE}, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor? dt_bias, "
        f"Tensor? x_scale, Tensor? B_scale, Tensor? C_scale, Tensor? z_scale, {_OUT}",
    ),
):  # fmt: skip
    _LIBRARY.define(f"{_op.__name__}({_schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_op.__name__, _op, "CUDA")
    torch.library.register_fake(f"quamba::{_op.__name__}", _without_data, lib=_LIBRARY)
