"""Any x86 or Arm CPU: exact integer products through fp32 GEMM, PyTorch's packed int4 product for few rows.

Products of int8 codes are integers, and fp32 adds integers exactly below 2^24: 1024 products of 127 * 127 stay below,
so K is cut into blocks of 1024 whose sums are added in int32.
"""

from __future__ import annotations

from functools import cache

import torch

from quamba_kernels import ops
from quamba_kernels.ops import selective, ssd
from quamba_kernels.ops.linear import dequantize_int4, expand_two_level, finish, unpack_int4
from quamba_kernels.ops.rowwise import QMAX, dequantize
from quamba_kernels.registry import Setting

EXACT_K = 1024
FEW_ROWS = 8
BF16_GEMM = torch.cpu._is_avx512_bf16_supported()


def needs_cpu(setting: Setting) -> str | None:
    return None if setting.device == "cpu" else f"serves tensors on the CPU, these are on {setting.device}"


def exact_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Accumulators of int8 [M, K] times int8 [O, K]^T as fp32 [M, O], rounded once from the exact integer."""
    parts = [
        x[:, k : k + EXACT_K].float() @ weight[:, k : k + EXACT_K].float().T for k in range(0, x.shape[1], EXACT_K)
    ]
    return parts[0] if len(parts) == 1 else torch.stack([p.to(torch.int32) for p in parts]).sum(0).float()


def int8_linear(x, x_scale, weight, scale, bias, residual, out_scale, out_dtype):
    acc = exact_product(x.flatten(0, -2), weight)
    return finish(acc.view(*x.shape[:-1], -1) * x_scale * scale, bias, residual, out_scale, out_dtype)


@ops.linear_w8a8.backend("cpu", why_not=needs_cpu)
def linear_w8a8(
    x, x_scale, weights: tuple[torch.Tensor, torch.Tensor], bias=None, residual=None, *,
    out_scale=None, out_dtype=torch.float32,
):  # fmt: skip
    """Exact in fp32."""
    return int8_linear(x, x_scale, *weights, bias, residual, out_scale, out_dtype)


def expand(weights: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """(q4 packed, m, scale) -> (int8 codes, m, scale): twice the bytes for a product without unpacking."""
    packed, multiplier, scale = weights
    return expand_two_level(packed, multiplier), multiplier, scale


def contract(weights: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The inverse of expand: q4 = code / m exactly."""
    codes, multiplier, scale = weights
    q4 = codes.unflatten(-1, (multiplier.shape[-1], -1)) // multiplier.unsqueeze(-1)
    nibbles = (q4.flatten(-2).to(torch.int32) + 8).unflatten(-1, (-1, 8))
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return (nibbles << shifts).sum(-1, dtype=torch.int32), multiplier, scale


@ops.linear_w4a8.backend("cpu", why_not=needs_cpu, prepack=expand, unpack=contract)
def linear_w4a8(x, x_scale, weights, bias=None, residual=None, *, out_scale=None, out_dtype=torch.float32):
    """The weights are expanded to int8 when bound; then as linear_w8a8."""
    codes, _, scale = weights
    return int8_linear(x, x_scale, codes, scale, bias, residual, out_scale, out_dtype)


def _int4_why_not(setting: Setting) -> str | None:
    group = setting.shape.get("S", 128)
    if group not in (32, 64, 128, 256):
        return f"torch's int4 product takes groups of 32, 64, 128 or 256, got {group}"
    if setting.shape.get("O", 64) % 16:
        return f"torch's int4 product takes a multiple of 16 out features, got {setting.shape['O']}"
    return needs_cpu(setting)


def add_int4_layout(weights: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """(q4 packed, scale) -> the same and torch's own int4 layout with its [K/S, O, 2] scales and zeros in bf16."""
    packed, scale = weights
    codes = unpack_int4(packed).to(torch.int32) + 8
    scale_and_zero = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).to(torch.bfloat16)
    return packed, scale, torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), scale_and_zero.contiguous()


def drop_int4_layout(weights: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The inverse of add_int4_layout."""
    return weights[:2]


@ops.linear_w4a16.backend("cpu", why_not=_int4_why_not, prepack=add_int4_layout, unpack=drop_int4_layout)
def linear_w4a16(x, weights, bias=None, residual=None, *, out_scale=None, out_dtype=torch.float32):
    """At most 8 rows of bf16 read the int4 weights directly (scales rounded to bf16); more rows expand them first."""
    packed, scale, int4, scale_and_zero = weights
    rows = x.flatten(0, -2)
    if rows.shape[0] <= FEW_ROWS and x.dtype == torch.bfloat16:
        group = x.shape[-1] // scale.shape[-1]
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows.contiguous(), int4, group, scale_and_zero)
    else:
        dtype = torch.bfloat16 if BF16_GEMM and x.dtype == torch.bfloat16 else torch.float32
        y = rows.to(dtype) @ dequantize_int4(packed, scale).to(dtype).T
    return finish(y.float().view(*x.shape[:-1], -1), bias, residual, out_scale, out_dtype)


def _mix(v: int) -> int:
    """The finaliser of ops.state on one Python integer."""
    v = ((v ^ (v >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    v = ((v ^ (v >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return v ^ (v >> 16)


@cache
def _indices(count: int) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.arange(count)


def _dither(rng: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ops.state.dither with the key mixed in Python: half of the calls, the same numbers."""
    seed, step = rng.tolist()
    key = _mix((seed ^ _mix(step & 0xFFFFFFFF)) & 0xFFFFFFFF)
    v = (_indices(rows + columns) + key).bitwise_and_(0xFFFFFFFF)
    v = v.bitwise_xor_(v >> 16).mul_(0x7FEB352D).bitwise_and_(0xFFFFFFFF)
    v = v.bitwise_xor_(v >> 15).mul_(0x846CA68B).bitwise_and_(0xFFFFFFFF)
    draws = v.bitwise_xor_(v >> 16).double().mul_(2.0**-32).float().clamp_(max=1 - 2**-24)
    return draws[:rows, None], draws[rows:]


def _store(h: torch.Tensor, state: torch.Tensor, scale: torch.Tensor | None, rng: torch.Tensor | None) -> None:
    """quantize_state that may overwrite h; a float32 state is h itself."""
    if scale is None:
        if state is not h:
            state.copy_(h)
        return
    torch.amax(h.abs(), -1, out=scale)  # thirteen times faster than the infinity norm
    scale.div_(QMAX).masked_fill_(scale == 0, 1.0)
    h.div_(scale.unsqueeze(-1))
    if rng is None:
        h.round_()
    else:
        rows, columns = _dither(rng, scale.numel(), h.shape[-1])
        h.add_((rows.view(*scale.shape, 1) + columns).frac_()).floor_()
        rng[1] += 1
    state.copy_(h.clamp_(-QMAX, QMAX))


def _advance(
    state: torch.Tensor, scale: torch.Tensor | None, decay: torch.Tensor, x: torch.Tensor, B: torch.Tensor
) -> torch.Tensor:
    """decay * state + x B^T, a float32 state in place: state [b, P, N], decay [b, P, 1 | N], x [b, P], B [b, N]."""
    if scale is not None:
        h = state.float().mul_(scale.unsqueeze(-1) * decay)
    else:
        h = state.mul_(decay) if state.dtype == torch.float32 else state.float().mul_(decay)
    return h.addcmul_(x.unsqueeze(-1), B.unsqueeze(1))


@ops.ssd_update.backend("cpu", why_not=needs_cpu)
def ssd_update(
    state, state_scale, rng, x, dt, A, B, C, D, dt_bias=None, *,
    x_scale=None, B_scale=None, C_scale=None, dt_limit=ssd.NO_LIMIT, out_dtype=torch.float32,
):  # fmt: skip
    """The state is read and written once or twice instead of a dozen times: every step works in place.

    The heads of a state group share B and C, so a group is one matrix of (heads x headdim) rows.
    """
    batch, heads, headdim, d_state = state.shape
    groups = batch * B.shape[1]
    x = dequantize(x, x_scale)
    B = dequantize(B, ssd.group_scale(B_scale)).reshape(groups, d_state)
    C = dequantize(C, ssd.group_scale(C_scale)).reshape(groups, d_state, 1)
    dt = ssd.timestep(dt, dt_bias, dt_limit)
    flat = state.view(groups, -1, d_state)
    scale = None if state_scale is None else state_scale.view(groups, -1)
    decay = torch.exp(dt * A).unsqueeze(-1).expand(-1, -1, headdim).reshape(groups, -1, 1)
    h = _advance(flat, scale, decay, (dt.unsqueeze(-1) * x).reshape(groups, -1), B)
    y = torch.bmm(h, C).view(batch, heads, headdim)
    _store(h, flat, scale, rng)
    return y.addcmul_(x, D.float().unsqueeze(-1)).to(out_dtype)


@ops.selective_update.backend("cpu", why_not=needs_cpu)
def selective_update(
    state, state_scale, rng, x, dt, A, B, C, D, dt_bias=None, *,
    x_scale=None, B_scale=None, C_scale=None, out_dtype=torch.float32,
):  # fmt: skip
    """As ssd_update, with a decay for every channel and state."""
    x, B, C = dequantize(x, x_scale), dequantize(B, B_scale), dequantize(C, C_scale)
    dt = selective.timestep(dt, dt_bias)
    decay = torch.mul(dt.unsqueeze(-1), A).exp_()
    h = _advance(state, state_scale, decay, dt * x, B)
    y = torch.bmm(h, C.unsqueeze(-1)).squeeze(-1)
    _store(h, state, state_scale, rng)
    return y.addcmul_(x, D.float()).to(out_dtype)
