"""A stack of Mamba1 blocks as the custom op quamba::selective_stack, as stack.py's."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quamba_kernels.cuda.decode import WIDTH, Call, QuambaDecode
from quamba_kernels.cuda.library import DTYPES, library
from quamba_kernels.cuda.linear import tidy
from quamba_kernels.cuda.stack import (
    STATES,
    Layer,
    QuambaStackLinear,
    constant,
    fill_linear,
    launch,
    linear_of,
    received,
    refused,
)  # fmt: skip
from quamba_kernels.ops.selective_stack import SelectiveBlock
from quamba_kernels.ops.stack import BlockMemory

D_STATE = 16
LINEARS = ("in", "x", "dt", "out")
_MIXER = (
    "conv_state", "conv_weight", "conv_weight_scale", "conv_bias", "conv_in_scale", "conv_out_scale", "state",
    "state_scale", "rng", "A", "D", "x_scale", "B_scale", "C_scale", "z_scale",
)  # fmt: skip
_REST = ("norm_weight", "in_scale", *_MIXER, "out_scale")


class QuambaSelectiveStackLayer(ctypes.Structure):
    """The struct of a layer in csrc/selective_stack.h, field by field."""

    _fields_ = [
        *((name, QuambaStackLinear) for name in LINEARS),
        *((name, ctypes.c_void_p) for name in _REST),
    ]


class QuambaSelectiveStack(ctypes.Structure):
    """The struct of csrc/selective_stack.h, field by field."""

    _fields_ = [
        ("mixer", QuambaDecode),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_longlong),
        *((name, ctypes.c_void_p) for name in ("layers", "x", "y")),
        *((name, ctypes.c_int) for name in ("count", "D", "R", "S")),
        ("eps", ctypes.c_float),
    ]

    def __str__(self) -> str:
        return f"{self.count} layers of D={self.D} R={self.R} S={self.S}, {self.mixer}"


def why_not(shape: dict[str, int], dtype: torch.dtype) -> str | None:
    """Why the kernel does not take a stack of these sizes, in a sentence.

    Beside the axes D, I, N, R (rank of dt) and W: block, of the rotation; S, group size of int4 weights or 0; coded,
    whether the linears' inputs are codes; codes, whether the scan's inputs and the convolution are (-1: some);
    state_bits and residual_bits.
    """
    if (reason := refused(shape, D_STATE)) is not None:
        return reason
    kept = DTYPES[torch.int8 if shape["codes"] else dtype]
    mixer = QuambaDecode(
        batch=1, H=shape["I"], P=1, G=1, N=D_STATE, channels=shape["I"], block=shape["block"], in_=DTYPES[dtype],
        conv_state_type=kept, conv_weight_type=kept, conv_bias_type=DTYPES[dtype],
        state_type=DTYPES[STATES[shape["state_bits"]]],
    )  # fmt: skip
    linear = linear_of(shape)
    problem = QuambaSelectiveStack(mixer=mixer, count=1, D=shape["D"], R=shape["R"], S=shape["S"])
    if library(torch.cuda.current_device()).serves(f"quamba_selective_stack_{linear}_serves", problem):
        return None
    where = "csrc/selective_stack_launch.cuh says what it needs"
    return f"takes no stack of {problem} and {linear} on this device ({where})"


class _Layer(Layer):
    KINDS = "conv_state_type", "conv_weight_type", "conv_bias_type", "state_type", "conv_in_count", "z_count"

    def __init__(
        self, call: Call, b: SelectiveBlock, memory: BlockMemory, linear: str, D: int, R: int, dtype: torch.dtype
    ) -> None:  # fmt: skip
        self.call, self.layer, self.S = call, QuambaSelectiveStackLayer(), 0
        inner, N, device = call.problem.H, call.problem.N, call.device
        layer = self.layer
        for name, weights, bias, O, K in (
            ("in", b.in_weights, b.in_bias, 2 * inner, D), ("x", b.x_weights, None, R + 2 * N, inner),
            ("out", b.out_weights, b.out_bias, D, inner),
        ):  # fmt: skip
            to = getattr(layer, name)
            self.S = fill_linear(to, name, linear, weights, O, K, self.S, device)
            to.bias = constant(f"{name}_bias", bias, device, (dtype,), (O,))
        fill_linear(layer.dt, "dt", "linear_w8a8", b.dt_weights, inner, R, 0, device)
        layer.dt.bias = constant("dt_bias", b.dt_bias, device, (dtype,), (inner,))
        call.convolution(
            memory.conv_state, b.conv_weight, b.conv_bias, b.conv_in_scale, b.conv_weight_scale, b.conv_out_scale, dtype
        )
        call.recurrence(memory.state, memory.state_scale, memory.rng, b.A, b.D, None)
        for name in ("x_scale", "B_scale", "C_scale", "out_scale"):
            call.scale(name, getattr(b, name), (1,))
        call.scale("z_scale", b.z_scale, (1,), (inner,), count="z_count")
        for name in (*_MIXER, "out_scale"):
            setattr(layer, name, getattr(call.problem, name))
        layer.norm_weight = constant("norm_weight", b.norm_weight, device, (dtype,), (D,))
        layer.in_scale = constant("in_scale", b.in_scale, device, (torch.float32,), (1,))


def selective_stack(
    x: Tensor, constants: Sequence[Tensor | None], conv_states: Sequence[Tensor], states: Sequence[Tensor],
    state_scales: Sequence[Tensor], rngs: Sequence[Tensor], linear: str, eps: float, block: int, in_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    given = received(SelectiveBlock, x, in_dtype, constants, conv_states, states, state_scales, rngs)
    x, device = tidy(x), x.device
    _, inner, N = states[0].shape
    R = given[0][0].dt_weights[0].shape[-1]
    made = []
    for i, (b, memory) in enumerate(given):
        call = Call(
            device, batch=1, H=inner, P=1, G=1, N=N, channels=inner, in_=DTYPES[in_dtype], block=block
        )  # fmt: skip
        if memory.state.shape != states[0].shape or b.conv_weight.shape != (inner, WIDTH):
            sizes = [*memory.state.shape], [*b.conv_weight.shape]
            raise ValueError(f"all layers of a stack have the same sizes; layer {i} has a state and taps {sizes}")
        made.append(_Layer(call, b, memory, linear, x.shape[1], R, in_dtype))
    kernel = f"quamba_selective_stack_{linear.removeprefix('linear_')}"
    return launch(kernel, QuambaSelectiveStack, made, x, R=R, eps=eps)


_LIBRARY = torch.library.Library("quamba", "FRAGMENT")
_LIBRARY.define(
    "selective_stack(Tensor x, Tensor?[] constants, Tensor(a!)[] conv_states, Tensor(b!)[] states, "
    "Tensor(c!)[] state_scales, Tensor(d!)[] rngs, str linear, float eps, int block, ScalarType in_dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("selective_stack", selective_stack, "CUDA")


@torch.library.register_fake("quamba::selective_stack", lib=_LIBRARY)
def _fake(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
