"""A stack of Mamba2 blocks as the custom op quamba::ssd_stack: one token of one sequence, one launch on Hopper."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quamba_kernels.cuda import int4_order
from quamba_kernels.cuda.decode import WIDTH, Call, QuambaDecode
from quamba_kernels.cuda.library import DTYPES, library
from quamba_kernels.cuda.linear import HALVES, check, tidy
from quamba_kernels.ops.linear import NIBBLES
from quamba_kernels.ops.stack import BlockMemory, SsdBlock

D_STATE = 128
WEIGHTS = 3
"""Tensors of a linear's weights, at most."""

_MIXER = (
    "conv_state", "conv_weight", "conv_weight_scale", "conv_bias", "conv_in_scale", "conv_out_scale", "state",
    "state_scale", "rng", "A", "D", "dt_bias", "x_scale", "B_scale", "C_scale", "z_scale",
)  # fmt: skip


class QuambaStackLinear(ctypes.Structure):
    """The struct of a linear in csrc/stack.h, field by field."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("w", "w_scale", "w_multiplier", "bias")]


class QuambaStackLayer(ctypes.Structure):
    """The struct of a layer in csrc/stack.h, field by field."""

    _fields_ = [
        ("in", QuambaStackLinear),
        ("out", QuambaStackLinear),
        *((name, ctypes.c_void_p) for name in ("norm_weight", "in_scale", *_MIXER, "gate_weight", "out_scale")),
    ]


class QuambaStack(ctypes.Structure):
    """The struct of csrc/stack.h, field by field."""

    _fields_ = [
        ("mixer", QuambaDecode),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_longlong),
        *((name, ctypes.c_void_p) for name in ("layers", "x", "y")),
        *((name, ctypes.c_int) for name in ("count", "D", "S")),
        ("eps", ctypes.c_float),
    ]

    def __str__(self) -> str:
        return f"{self.count} layers of D={self.D} S={self.S}, {self.mixer}"


STATES = {8: torch.int8, 16: torch.float16}
"""Types of the state by their bits."""


def refused(shape: dict[str, int], d_state: int) -> str | None:
    """What no kernel over a stack takes, in a sentence; d_state: of those that it serves."""
    if shape["residual_bits"] != 32:
        return f"takes a residual stream of 32 bits, got {shape['residual_bits']}"
    if shape["state_bits"] not in STATES:
        return f"takes states of 8 or 16 bits, got {shape['state_bits']}"
    if shape["codes"] != shape["coded"]:
        return "takes the scan's inputs and the convolution as codes where the linears' inputs are, else as floats"
    if shape["N"] != d_state or shape["W"] != WIDTH:
        return f"takes d_state {d_state} and {WIDTH} taps, got {shape['N']} and {shape['W']}"
    return None


def linear_of(shape: dict[str, int]) -> str:
    """The format of the linears, as entry points are called after it."""
    return "w8a8" if not shape["S"] else "w4a8" if shape["coded"] else "w4a16"


def why_not(shape: dict[str, int], dtype: torch.dtype) -> str | None:
    """Why the kernel does not take a stack of these sizes, in a sentence.

    Beside the axes: S, group size of int4 weights or 0; coded, whether the linears' inputs are codes; codes, whether
    the scan's inputs and the convolution are (-1: some); state_bits and residual_bits.
    """
    if (reason := refused(shape, D_STATE)) is not None:
        return reason
    H, P, G = shape["H"], shape["P"], shape["G"]
    mixer = QuambaDecode(
        batch=1, H=H, P=P, G=G, N=D_STATE, channels=H * P + 2 * G * D_STATE, norm_groups=shape["norm_groups"],
        block=shape["block"], in_=DTYPES[dtype], conv_state_type=DTYPES[torch.int8 if shape["codes"] else dtype],
        conv_weight_type=DTYPES[torch.int8 if shape["codes"] else dtype], conv_bias_type=DTYPES[dtype],
        state_type=DTYPES[STATES[shape["state_bits"]]],
    )  # fmt: skip
    linear = linear_of(shape)
    problem = QuambaStack(mixer=mixer, count=1, D=shape["D"], S=shape["S"])
    if library(torch.cuda.current_device()).serves(f"quamba_ssd_stack_{linear}_serves", problem):
        return None
    return f"takes no stack of {problem} and {linear} on this device (csrc/stack_launch.cuh says what it needs)"


def flatten(blocks: Sequence[tuple[Any, ...]]) -> list[Tensor | None]:
    """The constants of all blocks, as many tensors for each."""
    flat: list[Tensor | None] = []
    for b in blocks:
        for value in b:
            flat += [*value, *[None] * (WEIGHTS - len(value))] if isinstance(value, tuple) else [value]
    return flat


def fields(kind: type[Any]) -> int:
    """How many tensors a block of that kind becomes."""
    names: tuple[str, ...] = kind._fields
    return len(names) + (WEIGHTS - 1) * sum(name.endswith("_weights") for name in names)


def unflatten(kind: type[Any], flat: Sequence[Tensor | None]) -> Any:
    """The block that ``flatten`` took apart."""
    values, made = iter(flat), dict[str, Any]()
    for name in kind._fields:
        if name.endswith("_weights"):
            made[name] = tuple(w for w in (next(values) for _ in range(WEIGHTS)) if w is not None)
        else:
            made[name] = next(values)
    return kind(**made)


def constant(
    name: str, tensor: Tensor | None, device: torch.device, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]
) -> int | None:
    """The address of a tensor that is checked, or None."""
    return None if tensor is None else check(name, tensor, device, dtypes, shape)


def fill_linear(
    to: QuambaStackLinear, name: str, linear: str, weights: tuple[Tensor, ...], O: int, K: int, S: int,
    device: torch.device,
) -> int:  # fmt: skip
    """The addresses of a linear's weights in its struct. S: group size of the stack's linears so far, 0 before the
    first; returns it."""
    fp32, int8 = (torch.float32,), (torch.int8,)
    wanted: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {
        "w": (int8, (O, K)) if linear == "linear_w8a8" else ((torch.int32,), (O, K // NIBBLES)),
        "w_scale": (fp32, (O,)),
    }
    if linear != "linear_w8a8":
        groups = weights[1].shape[-1]
        size = K // max(groups, 1)
        if S and size != S:
            raise ValueError(f"both linears have groups of one size, got {S} and {size}")
        S = size
        if linear == "linear_w4a8":
            wanted = {"w": wanted["w"], "w_multiplier": (int8, (O, groups)), "w_scale": (fp32, (O,))}
        else:
            wanted = {"w": ((torch.int32,), int4_order.shape(O, K)), "w_scale": ((torch.float16,), (O, groups))}
    if len(weights) != len(wanted):
        raise ValueError(f"{linear} has {len(wanted)} tensors of weights, got {len(weights)}")
    for tensor, (field, (dtypes, shape)) in zip(weights, wanted.items(), strict=True):
        setattr(to, field, constant(f"{name}_{field}", tensor, device, dtypes, shape))
    return S


def received(
    kind: type[Any], x: Tensor, in_dtype: torch.dtype, constants: Sequence[Tensor | None],
    conv_states: Sequence[Tensor], states: Sequence[Tensor], state_scales: Sequence[Tensor], rngs: Sequence[Tensor],
) -> list[tuple[Any, BlockMemory]]:  # fmt: skip
    """The blocks of that kind and what they remember, of which the custom op was given the tensors.

    Raises ValueError for what is not one token of float32, and where tensors are missing.
    """
    count, size = len(states), fields(kind)
    if x.dim() != 2 or x.shape[0] != 1 or x.dtype != torch.float32 or in_dtype not in HALVES:
        raise ValueError(
            f"the CUDA stack takes one token of float32 and activations of {HALVES}, "
            f"got {x.dtype} {list(x.shape)} and {in_dtype}"
        )
    given = len(constants), len(conv_states), len(state_scales), len(rngs)
    if not count or given[:2] != (count * size, count) or any(n not in (0, count) for n in given[2:]):
        raise ValueError(
            f"{count} states come with {count * size} constants, {count} states of the convolution, and as many "
            f"scales and generators or none; got {given}"
        )
    blocks = [unflatten(kind, constants[i * size : (i + 1) * size]) for i in range(count)]
    memories = [
        BlockMemory(conv_states[i], states[i], state_scales[i] if state_scales else None, rngs[i] if rngs else None)
        for i in range(count)
    ]
    return list(zip(blocks, memories, strict=True))


class Layer:
    """The pointers of one layer, from tensors that are checked. layer: its struct; S: group size of its linears."""

    KINDS: tuple[str, ...]
    """Fields of the mixer that say of which types and how many its tensors are."""
    call: Call
    layer: Any
    S: int

    @property
    def alike(self) -> tuple[Any, ...]:
        """What the layers of a stack have in common: groups, types, and which tensors there are."""
        present = []
        for name, kind in self.layer._fields_:
            value = getattr(self.layer, name)
            present.append((value.bias if kind is QuambaStackLinear else value) is not None)
        return self.S, present, [getattr(self.call.problem, name) for name in self.KINDS]


def launch(kernel: str, kind: type[ctypes.Structure], made: Sequence[Layer], x: Tensor, **sizes: Any) -> Tensor:
    """One launch over layers that are alike: y [1, D]. kind: the struct of the stack; sizes: its fields beside those
    that every stack has. Raises ValueError for layers that differ."""
    first = made[0]
    for i, other in enumerate(made):
        if other.alike != first.alike:
            raise ValueError(f"all layers of a stack are of the same types and groups; layer {i} is not")
    layers = (type(first.layer) * len(made))(*(m.layer for m in made))
    y = torch.empty_like(x)
    whole = kind(
        mixer=first.call.problem, layers=ctypes.addressof(layers), x=x.data_ptr(), y=y.data_ptr(), count=len(made),
        D=x.shape[1], S=first.S, **sizes,
    )  # fmt: skip
    with torch.cuda.device(x.device):
        library(x.device.index).call(kernel, whole, x.device)
    return y


class _Layer(Layer):
    KINDS = (
        "conv_state_type", "conv_weight_type", "conv_bias_type", "state_type", "norm_weight_type", "conv_in_count",
        "x_count", "B_count", "C_count", "z_count",
    )  # fmt: skip

    def __init__(
        self, call: Call, b: SsdBlock, memory: BlockMemory, linear: str, D: int, dtype: torch.dtype
    ) -> None:  # fmt: skip
        self.call = call
        p = call.problem
        H, P, N, G, inner = p.H, p.P, p.N, p.G, p.H * p.P
        self.layer = layer = QuambaStackLayer()
        self.S = 0
        for name, weights, bias, O, K in (
            ("in", b.in_weights, b.in_bias, 2 * inner + 2 * G * N + H, D), ("out", b.out_weights, b.out_bias, D, inner),
        ):  # fmt: skip
            to = getattr(layer, name)
            self.S = fill_linear(to, name, linear, weights, O, K, self.S, call.device)
            to.bias = constant(f"{name}_bias", bias, call.device, (dtype,), (O,))
        call.convolution(
            memory.conv_state, b.conv_weight, b.conv_bias, b.conv_in_scale, b.conv_weight_scale, b.conv_out_scale, dtype
        )
        call.recurrence(memory.state, memory.state_scale, memory.rng, b.A, b.D, b.dt_bias)
        call.scale("x_scale", b.x_scale, (H, P), count="x_count")
        call.scale("B_scale", b.B_scale, (1,), (G,), count="B_count")
        call.scale("C_scale", b.C_scale, (1,), (G,), count="C_count")
        call.scale("z_scale", b.z_scale, (1,), (inner,), count="z_count")
        call.scale("out_scale", b.out_scale, (1,))
        if b.gate_weight is not None and not p.norm_groups:
            raise ValueError("a stack has a gate_weight where its mixers have a norm; got no norm_groups")
        call.whole("norm_weight", b.gate_weight, (dtype,), (inner,), kind="norm_weight_type", aligned=True)
        for name in _MIXER:
            setattr(layer, name, getattr(p, name))
        layer.gate_weight, layer.out_scale = p.norm_weight, p.out_scale
        layer.norm_weight = constant("norm_weight", b.norm_weight, call.device, (dtype,), (D,))
        layer.in_scale = constant("in_scale", b.in_scale, call.device, (torch.float32,), (1,))


def ssd_stack(
    x: Tensor, constants: Sequence[Tensor | None], conv_states: Sequence[Tensor], states: Sequence[Tensor],
    state_scales: Sequence[Tensor], rngs: Sequence[Tensor], linear: str, eps: float, gate_eps: float, dt_min: float,
    dt_max: float, norm_groups: int, block: int, in_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    given = received(SsdBlock, x, in_dtype, constants, conv_states, states, state_scales, rngs)
    x, device = tidy(x), x.device
    _, H, P, N = states[0].shape
    channels = given[0][0].conv_weight.shape[0]
    G = (channels - H * P) // (2 * N)
    made = []
    for i, (b, memory) in enumerate(given):
        call = Call(
            device, batch=1, H=H, P=P, G=G, N=N, channels=channels, in_=DTYPES[in_dtype], norm_groups=norm_groups,
            block=block, eps=gate_eps, dt_min=dt_min, dt_max=dt_max,
        )  # fmt: skip
        if memory.state.shape != states[0].shape or b.conv_weight.shape != given[0][0].conv_weight.shape:
            sizes = [*memory.state.shape]
            raise ValueError(f"all layers of a stack have the same sizes; layer {i} has a state {sizes}")
        made.append(_Layer(call, b, memory, linear, x.shape[1], in_dtype))
    return launch(f"quamba_ssd_stack_{linear.removeprefix('linear_')}", QuambaStack, made, x, eps=eps)


_LIBRARY = torch.library.Library("quamba", "FRAGMENT")
_LIBRARY.define(
    "ssd_stack(Tensor x, Tensor?[] constants, Tensor(a!)[] conv_states, Tensor(b!)[] states, "
    "Tensor(c!)[] state_scales, Tensor(d!)[] rngs, str linear, float eps, float gate_eps, float dt_min, float dt_max, "
    "int norm_groups, int block, ScalarType in_dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("ssd_stack", ssd_stack, "CUDA")


@torch.library.register_fake("quamba::ssd_stack", lib=_LIBRARY)
def _fake(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
