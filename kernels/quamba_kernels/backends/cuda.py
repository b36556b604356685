"""NVIDIA GPUs from sm_80 on: the kernels in csrc, compiled for the device on first use (see quamba_kernels.cuda)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from quamba_kernels import ops
from quamba_kernels.cuda import conv, decode, int4_order, linear, objects, rowwise, scan, ssd, stack
from quamba_kernels.cuda import selective_stack as selective
from quamba_kernels.cuda.library import library
from quamba_kernels.cuda.toolchain import CannotBuild, of_device
from quamba_kernels.ops import Activation
from quamba_kernels.ops.ssd import NO_LIMIT
from quamba_kernels.registry import Setting

RANK = 10


def _why_not(setting: Setting) -> str | None:
    if setting.device != "cuda":
        return f"serves tensors on an NVIDIA GPU, these are on {setting.device}"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU here"
    shape = setting.shape
    if "K" in shape and "O" in shape:
        reason = linear.shape_why_not(shape["K"], shape["O"], shape.get("S", shape["K"]))
        if reason is not None:
            return reason
    try:
        arch = of_device(torch.cuda.get_device_capability())
    except CannotBuild as error:
        return str(error)
    return objects.why_not(arch)


def _why_not_w4a16(setting: Setting) -> str | None:
    if setting.device == "cuda" and setting.dtype not in linear.HALVES:
        return f"takes activations of float16 or bfloat16, got {str(setting.dtype).removeprefix('torch.')}"
    return _why_not(setting)


def _why_not_gate_output(setting: Setting) -> str | None:
    shape = setting.shape
    reason = rowwise.gate_why_not(shape["I"], shape.get("block", 0)) if "I" in shape else None
    return _why_not(setting) if setting.device != "cuda" else reason or _why_not(setting)


def _why_not_conv(setting: Setting) -> str | None:
    reason = conv.why_not(setting.shape["W"]) if "W" in setting.shape else None
    return _why_not(setting) if setting.device != "cuda" else reason or _why_not(setting)


def _why_not_scan(setting: Setting) -> str | None:
    reason = scan.why_not(setting.shape["N"]) if "N" in setting.shape else None
    return _why_not(setting) if setting.device != "cuda" else reason or _why_not(setting)


def _why_not_prefill(setting: Setting) -> str | None:
    reason = scan.prefill_why_not(setting.shape, setting.dtype)
    return _why_not(setting) if setting.device != "cuda" else reason or _why_not(setting)


def _why_not_ssd(setting: Setting) -> str | None:
    reason = ssd.why_not(setting.shape.get("P"), setting.shape.get("N"), setting.dtype)
    return _why_not(setting) if setting.device != "cuda" else reason or _why_not(setting)


def load(weights: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The weights as they are. Loads the kernels (and compiles them if need be), so that no call has to."""
    if weights[0].is_cuda:
        library(weights[0].device.index)
    return weights


def load_w4a16(weights: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """As ``load``, and int4 weights for 16-bit activations in the order that this device's kernels take."""
    w, *_ = load(weights)
    return int4_order.ordered(weights) if w.is_cuda and linear.on_hopper(w.device) else weights


def of_blocks(change: Callable[[tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]) -> Callable[[Any], Any]:
    """The same for the weights of all linears of a stack's blocks."""

    def changed(block: Any) -> Any:
        return block._replace(**{n: change(getattr(block, n)) for n in block._fields if n.endswith("_weights")})

    return lambda blocks: tuple(map(changed, blocks))


def _activation(done: tuple[torch.Tensor, torch.Tensor], static: torch.Tensor | None, per_token: bool) -> Activation:
    data, row_scale = done
    return Activation(data, row_scale if per_token else static)


@ops.quantize.backend("cuda", why_not=_why_not, rank=RANK)
def quantize(x, scale=None):
    """A row a block, read once."""
    return _activation(torch.ops.quamba.quantize.default(x, scale), scale, scale is None)


@ops.rms_norm.backend("cuda", why_not=_why_not, rank=RANK)
def rms_norm(x, weight, eps, *, out_scale=None, per_token=False, out_dtype=torch.float32):
    """A row a block, read once: norm, gain and quantisation."""
    done = torch.ops.quamba.rms_norm.default(x, weight, eps, out_scale, per_token, out_dtype)
    return _activation(done, out_scale, per_token)


@ops.gate_output.backend("cuda", why_not=_why_not_gate_output, rank=RANK)
def gate_output(
    y, z, weight, eps, *, z_scale=None, norm_groups=0, block=0, out_scale=None, per_token=False,
    out_dtype=torch.float32,
):  # fmt: skip
    """A row a block, read once: gate, norm, gain, rotation and quantisation in shared memory."""
    done = torch.ops.quamba.gate_output.default(
        y, z, weight, eps, z_scale, norm_groups, block, out_scale, per_token, out_dtype
    )
    return _activation(done, out_scale, per_token)


@ops.rotate_input.backend("cuda", why_not=_why_not_gate_output, rank=RANK)
def rotate_input(x, block, *, out_scale=None, per_token=False, out_dtype=torch.float32):
    """The kernel of gate_output without a gate."""
    done = torch.ops.quamba.rotate_input.default(x, block, out_scale, per_token, out_dtype)
    return _activation(done, out_scale, per_token)


@ops.causal_conv1d.backend("cuda", why_not=_why_not_conv, rank=RANK)
def causal_conv1d(
    x, weight, bias=None, state=None, *, in_scale=None, x_scale=None, weight_scale=None, out_scale=None,
    out_dtype=torch.float32, cu_seqlens=None,
):  # fmt: skip
    """Runs of tokens, four channels a thread; rounds float inputs on their way in, so that they are read once."""
    return torch.ops.quamba.causal_conv1d.default(
        x, weight, bias, state, in_scale, x_scale, weight_scale, out_scale, out_dtype, cu_seqlens
    )


@ops.selective_scan.backend("cuda", why_not=_why_not_scan, rank=RANK)
def selective_scan(
    x, dt, A, B, C, D, dt_bias=None, state=None, *, x_scale=None, B_scale=None, C_scale=None,
    out_dtype=torch.float32, cu_seqlens=None,
):  # fmt: skip
    """The states of a channel lie in the lanes of a warp, which walks through the tokens."""
    return torch.ops.quamba.selective_scan.default(
        x, dt, A, B, C, D, dt_bias, state, x_scale, B_scale, C_scale, out_dtype, cu_seqlens
    )


@ops.selective_prefill.backend("cuda", why_not=_why_not_prefill, rank=RANK)
def selective_prefill(
    x, projected, weights, bias, A, D, z, state=None, *, x_scale=None, B_scale=None, C_scale=None, z_scale=None,
    out_dtype=torch.float32,
):  # fmt: skip
    """One kernel rounds, one makes dt, and the scan, which waits for exponentials, gates as it stores."""
    return torch.ops.quamba.selective_prefill.default(
        x, projected, *weights, bias, A, D, z, state, x_scale, B_scale, C_scale, z_scale, out_dtype
    )


@ops.ssd_scan.backend("cuda", why_not=_why_not_ssd, rank=RANK)
def ssd_scan(
    x, dt, A, B, C, D, dt_bias=None, state=None, *, x_scale=None, B_scale=None, C_scale=None, dt_limit=NO_LIMIT,
    out_dtype=torch.float32, cu_seqlens=None,
):  # fmt: skip
    """Chunks of tokens as products on tensor cores; a block keeps the state of its head in registers."""
    return torch.ops.quamba.ssd_scan.default(
        x, dt, A, B, C, D, dt_bias, state, x_scale, B_scale, C_scale, *dt_limit, out_dtype, cu_seqlens
    )


def _why_not_ssd_prefill(setting: Setting) -> str | None:
    shape = setting.shape
    reason = ssd.prefill_why_not(shape.get("P"), shape.get("N"), shape.get("W"), setting.dtype)
    return _why_not(setting) if setting.device != "cuda" else reason or _why_not_hopper(setting)


@ops.ssd_prefill.backend("cuda", why_not=_why_not_ssd_prefill, rank=RANK)
def ssd_prefill(
    mixed, dt, conv_weight, conv_bias, conv_state, A, D, dt_bias=None, state=None, *, groups, d_state,
    conv_in_scale=None, conv_weight_scale=None, conv_out_scale=None, x_scale=None, B_scale=None, C_scale=None,
    dt_limit=NO_LIMIT, out_dtype=torch.float32,
):  # fmt: skip
    """One kernel convolves, and makes what the heads of a group share; the other is that of ssd_scan."""
    return torch.ops.quamba.ssd_prefill.default(
        mixed, dt, conv_weight, conv_bias, conv_state, A, D, dt_bias, state, groups, d_state, conv_in_scale,
        conv_weight_scale, conv_out_scale, x_scale, B_scale, C_scale, *dt_limit, out_dtype,
    )  # fmt: skip


@ops.linear_w8a8.backend("cuda", why_not=_why_not, rank=RANK, prepack=load)
def linear_w8a8(
    x, x_scale, weights: tuple[torch.Tensor, torch.Tensor], bias=None, residual=None, *,
    out_scale=None, out_dtype=torch.float32,
):  # fmt: skip
    """int8 tensor cores; few rows in a kernel that streams the weights, many in CUTLASS."""
    return torch.ops.quamba.linear_w8a8.default(x, x_scale, *weights, bias, residual, out_scale, out_dtype)


@ops.linear_w4a8.backend("cuda", why_not=_why_not, rank=RANK, prepack=load, ahead=linear.ahead_w4a8)
def linear_w4a8(x, x_scale, weights, bias=None, residual=None, *, out_scale=None, out_dtype=torch.float32):
    """int8 tensor cores; few rows expand the weights in registers, many in scratch memory."""
    return torch.ops.quamba.linear_w4a8.default(x, x_scale, *weights, bias, residual, out_scale, out_dtype)


@ops.linear_w4a16.backend("cuda", why_not=_why_not_w4a16, rank=RANK, prepack=load_w4a16, unpack=int4_order.restored)
def linear_w4a16(x, weights, bias=None, residual=None, *, out_scale=None, out_dtype=torch.float32):
    """16-bit tensor cores; few rows expand the weights in registers, many in registers or scratch memory."""
    return torch.ops.quamba.linear_w4a16.default(x, *weights, bias, residual, out_scale, out_dtype)


@ops.norm_linear.backend("cuda", why_not=_why_not, rank=RANK, prepack=load_w4a16, unpack=int4_order.restored)
def norm_linear(
    x, norm_weight, eps, weights, bias=None, residual=None, *, linear, in_scale=None, per_token=False,
    in_dtype=torch.float32, out_dtype=torch.float32,
):  # fmt: skip
    """Two kernels, the second of which starts while the first runs, but for the int8 GEMM of many rows."""
    w, multiplier, scale = weights if len(weights) == 3 else (weights[0], None, weights[1])
    return torch.ops.quamba.norm_linear.default(
        x, norm_weight, eps, w, multiplier, scale, bias, residual, in_scale, per_token, in_dtype, out_dtype
    )


def _why_not_decode(setting: Setting) -> str | None:
    return (decode.shape_why_not(setting.shape) if setting.device == "cuda" else None) or _why_not(setting)


def _why_not_conv_decode(setting: Setting) -> str | None:
    width = {k: v for k, v in setting.shape.items() if k == "W"}
    return _why_not_decode(Setting(setting.device, setting.dtype, width))


def _decoded(data: torch.Tensor, token_scale: torch.Tensor, out_scale: torch.Tensor | None) -> Activation:
    return Activation(data, token_scale if token_scale.numel() else out_scale)


@ops.conv_decode.backend("cuda", why_not=_why_not_conv_decode, rank=RANK)
def conv_decode(
    x, state, weight, bias=None, *, in_scale=None, weight_scale=None, out_scale=None, out_dtype=torch.float32
):  # fmt: skip
    """One kernel, a thread a channel."""
    return torch.ops.quamba.conv_decode.default(
        x, state, weight, bias, in_scale, weight_scale, out_scale, out_dtype
    )  # fmt: skip


@ops.ssd_decode.backend("cuda", why_not=_why_not_decode, rank=RANK)
def ssd_decode(
    projected, conv_state, state, state_scale, rng, conv_weight, conv_bias, A, D, dt_bias, norm_weight, eps, *,
    conv_in_scale=None, conv_weight_scale=None, conv_out_scale=None, x_scale=None, B_scale=None, C_scale=None,
    z_scale=None, dt_limit=NO_LIMIT, norm_groups=0, block=0, out_scale=None, per_token=False, out_dtype=torch.float32,
):  # fmt: skip
    """Two kernels: up to the gated output, and from there on what needs a whole token."""
    data, scale = torch.ops.quamba.ssd_decode.default(
        projected, conv_state, state, state_scale, rng, conv_weight, conv_bias, A, D, dt_bias, norm_weight, eps,
        conv_in_scale, conv_weight_scale, conv_out_scale, x_scale, B_scale, C_scale, z_scale, *dt_limit, norm_groups,
        block, out_scale, per_token, out_dtype,
    )  # fmt: skip
    return _decoded(data, scale, out_scale)


@ops.selective_decode.backend("cuda", why_not=_why_not_decode, rank=RANK)
def selective_decode(
    z, state, state_scale, rng, x, dt, A, B, C, D, dt_bias=None, *, x_scale=None, B_scale=None, C_scale=None,
    z_scale=None, block=0, out_scale=None, per_token=False, out_dtype=torch.float32,
):  # fmt: skip
    """Two kernels, as ssd_decode."""
    data, scale = torch.ops.quamba.selective_decode.default(
        z, state, state_scale, rng, x, dt, A, B, C, D, dt_bias, x_scale, B_scale, C_scale, z_scale, block, out_scale,
        per_token, out_dtype,
    )  # fmt: skip
    return _decoded(data, scale, out_scale)


def _why_not_hopper(setting: Setting) -> str | None:
    reason = _why_not_w4a16(setting)
    if reason is None and of_device(torch.cuda.get_device_capability()) != "sm_90a":
        reason = "is written for Hopper (sm_90a)"
    return reason


def _why_not_stack(setting: Setting) -> str | None:
    return _why_not_hopper(setting) or (stack.why_not(setting.shape, setting.dtype) if setting.shape else None)


def _why_not_selective_stack(setting: Setting) -> str | None:
    return _why_not_hopper(setting) or (selective.why_not(setting.shape, setting.dtype) if setting.shape else None)


@ops.ssd_stack.backend(
    "cuda", why_not=_why_not_stack, rank=RANK, prepack=of_blocks(load_w4a16), unpack=of_blocks(int4_order.restored)
)
def ssd_stack(
    x, blocks, memories, *, linear, eps, gate_eps, dt_limit=NO_LIMIT, norm_groups=0, block=0, in_dtype=torch.float32
):  # fmt: skip
    """One launch for all blocks, for one sequence: weights stream through shared memory without a pause."""
    kept = [[tensor for tensor in tensors if tensor is not None] for tensors in zip(*memories, strict=True)]
    return torch.ops.quamba.ssd_stack.default(
        x, stack.flatten(blocks), *kept, linear, eps, gate_eps, *dt_limit, norm_groups, block, in_dtype
    )


@ops.selective_stack.backend(
    "cuda", why_not=_why_not_selective_stack, rank=RANK, prepack=of_blocks(load_w4a16),
    unpack=of_blocks(int4_order.restored),
)  # fmt: skip
def selective_stack(x, blocks, memories, *, linear, eps, block=0, in_dtype=torch.float32):
    """As ssd_stack; what x_proj makes is added up by all blocks."""
    kept = [[tensor for tensor in tensors if tensor is not None] for tensors in zip(*memories, strict=True)]
    return torch.ops.quamba.selective_stack.default(x, stack.flatten(blocks), *kept, linear, eps, block, in_dtype)
