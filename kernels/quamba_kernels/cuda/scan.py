"""Mamba1's scan as custom ops quamba::selective_scan and quamba::selective_prefill, of csrc/scan.h."""

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
from quamba_kernels.cuda.expansion import QuambaExpansion, waiting
from quamba_kernels.cuda.library import DTYPES
from quamba_kernels.cuda.linear import check, tidy
from quamba_kernels.ops.sequences import check_cu_seqlens

STATES = (8, 16, 32)
LANES = 0
"""Lanes of a warp that share a channel of 16 states: 4, 8, or 24 for 8 of three; 0 leaves it to the problem."""
PREFILL_RANK, RANK_MULTIPLE, CHANNEL_MULTIPLE = 160, 32, 8
"""The most rates a token that dt_proj of a prompt takes, and what they and channels are multiples of."""


class QuambaScan(Arguments):
    """The struct of csrc/scan.h."""

    _fields_ = fields(
        "x dt b c x_scale b_scale c_scale A D dt_bias z z_scale state last cu_seqlens y",
        "T x_batch x_token dt_batch dt_token b_batch b_token c_batch c_token z_batch z_token",
        "I N sequences x_scale_count z_scale_count lanes x_dtype dt_dtype b_dtype c_dtype D_dtype dt_bias_dtype "
        "z_dtype y_dtype",
    ) + [("expansion", QuambaExpansion)]


class QuambaScanCodes(Arguments):
    """The struct of csrc/scan.h."""

    _fields_ = fields("x rank_codes rank_scale columns b_scale c_scale", "T", "B rank N x_dtype")


class QuambaScanRates(Arguments):
    """The struct of csrc/scan.h."""

    _fields_ = fields("rank_codes rank_scale w w_scale bias dt", "T", "B I rank bias_dtype dt_dtype")


def why_not(N: int) -> str | None:
    """Why the kernel does not take this number of states, in a sentence."""
    return None if N in STATES else f"takes {', '.join(map(str, STATES))} states a channel, got {N}"


def prefill_why_not(shape: dict[str, int], dtype: torch.dtype) -> str | None:
    """Why the kernels do not take x_proj's outputs of these sizes (I, N, R rates), in a sentence."""
    I, N, R = (shape.get(name, size) for name, size in (("I", CHANNEL_MULTIPLE), ("N", 16), ("R", RANK_MULTIPLE)))
    if dtype not in FLOATS[1:]:
        return f"takes activations of float16 or bfloat16, got {str(dtype).removeprefix('torch.')}"
    if reason := why_not(N):
        return reason
    if R % RANK_MULTIPLE or not 0 < R <= PREFILL_RANK:
        return f"takes a multiple of {RANK_MULTIPLE} rates a token, up to {PREFILL_RANK}, got {R}"
    return f"takes a multiple of {CHANNEL_MULTIPLE} channels, got {I}" if I % CHANNEL_MULTIPLE else None


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor | None, state: Tensor | None,
    x_scale: Tensor | None, B_scale: Tensor | None, C_scale: Tensor | None, out_dtype: torch.dtype,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _scan(x, dt, A, B, C, D, dt_bias, None, state, x_scale, B_scale, C_scale, None, out_dtype, cu_seqlens)


def _scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor | None, z: Tensor | None,
    state: Tensor | None, x_scale: Tensor | None, B_scale: Tensor | None, C_scale: Tensor | None,
    z_scale: Tensor | None, out_dtype: torch.dtype, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """selective_scan, gated where there is z."""
    if x.dim() != 3:
        raise ValueError(f"x has to be [B, T, I], got {list(x.shape)}")
    batch, T, I = x.shape
    N = A.shape[-1]
    if reason := why_not(N):
        raise ValueError(f"the CUDA selective_scan {reason}")
    out_type(out_dtype)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x, state)
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    x = stream("x", x, x, (*FLOATS, *CODES))
    dt = stream("dt", dt, x, FLOATS, (batch, T, I))
    B, C = (stream(name, t, x, (*FLOATS, *CODES), (batch, T, N)) for name, t in (("B", B), ("C", C)))
    y = torch.empty((batch, T, I), dtype=out_dtype, device=x.device)
    last = torch.empty((sequences, I, N), dtype=torch.float32, device=x.device)
    before = None if state is None else state.float().contiguous()

    a = QuambaScan(T=T, I=I, N=N, sequences=sequences, lanes=LANES)
    streams = {"x": x, "dt": dt, "b": B, "c": C}
    if z is not None:
        streams["z"] = stream("z", z, x, (*FLOATS, *CODES), (batch, T, I))
    for name, tensor in streams.items():
        setattr(a, name, tensor.data_ptr())
        setattr(a, f"{name}_batch", tensor.stride(0))
        setattr(a, f"{name}_token", tensor.stride(1))
        setattr(a, f"{name}_dtype", DTYPES[tensor.dtype])
    a.y, a.y_dtype, a.last = y.data_ptr(), DTYPES[out_dtype], last.data_ptr()
    fp32 = (torch.float32,)
    a.x_scale = constant("x_scale", x_scale, x, fp32, (1,), (I,))
    a.x_scale_count = 0 if x_scale is None else x_scale.numel()
    a.b_scale, a.c_scale = constant("B_scale", B_scale, x, fp32, (1,)), constant("C_scale", C_scale, x, fp32, (1,))
    a.z_scale = constant("z_scale", z_scale, x, fp32, (1,), (I,))
    a.z_scale_count = 0 if z_scale is None else z_scale.numel()
    a.A = constant("A", A, x, fp32, (I, N))
    a.D, a.D_dtype = constant("D", D, x, FLOATS, (I,)), DTYPES[D.dtype]
    a.dt_bias = constant("dt_bias", dt_bias, x, FLOATS, (I,))
    a.dt_bias_dtype = 0 if dt_bias is None else DTYPES[dt_bias.dtype]
    a.state = constant("state", before, x, fp32, (sequences, I, N))
    a.cu_seqlens = constant("cu_seqlens", cu_seqlens, x, (torch.int32,), (sequences + 1,))
    if sequences:
        a.expansion = waiting(x.device)
        launch("quamba_selective_scan", a, x.device)
    return y, last


def _fake(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor | None, state: Tensor | None,
    x_scale: Tensor | None, B_scale: Tensor | None, C_scale: Tensor | None, out_dtype: torch.dtype,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty((sequences, *A.shape), dtype=torch.float32)


def selective_prefill(
    x: Tensor, projected: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, A: Tensor, D: Tensor, z: Tensor,
    state: Tensor | None, x_scale: Tensor | None, B_scale: Tensor | None, C_scale: Tensor | None,
    z_scale: Tensor | None, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if x.dim() != 3:
        raise ValueError(f"x has to be [B, T, I], got {list(x.shape)}")
    batch, T, I = x.shape
    N, R = A.shape[-1], w.shape[-1]
    if reason := prefill_why_not({"N": N, "R": R, "I": I}, out_dtype):
        raise ValueError(f"the CUDA selective_prefill {reason}")
    if (B_scale is None) != (C_scale is None):
        raise ValueError("B_scale and C_scale come together: B and C are both codes or both floats")
    z = stream("z", z, x, (*FLOATS, *CODES), (batch, T, I))
    projected = tidy(stream("projected", projected, x, FLOATS, (batch, T, R + 2 * N)))
    fp32, blocks = (torch.float32,), -(-T // 16)
    codes = torch.empty((batch, blocks, R, 16), dtype=torch.int8, device=x.device)
    scale = torch.empty((batch, blocks, 16), dtype=torch.float32, device=x.device)
    dt = torch.empty((batch, T, I), dtype=out_dtype, device=x.device)
    columns = projected[..., R:]
    rounding = QuambaScanCodes(T=T, B=batch, rank=R, N=N, x_dtype=DTYPES[projected.dtype])
    rounding.x, rounding.rank_codes, rounding.rank_scale = projected.data_ptr(), codes.data_ptr(), scale.data_ptr()
    if B_scale is not None:
        columns = torch.empty((batch, T, 2 * N), dtype=torch.int8, device=x.device)
        rounding.columns = columns.data_ptr()
        rounding.b_scale = constant("B_scale", B_scale, x, fp32, (1,))
        rounding.c_scale = constant("C_scale", C_scale, x, fp32, (1,))
    rates = QuambaScanRates(T=T, B=batch, I=I, rank=R, dt_dtype=DTYPES[out_dtype])
    rates.rank_codes, rates.rank_scale, rates.dt = rounding.rank_codes, rounding.rank_scale, dt.data_ptr()
    rates.w, rates.w_scale = check("w", w, x.device, CODES, (I, R)), check("w_scale", w_scale, x.device, fp32, (I,))
    if bias is not None:
        rates.bias, rates.bias_dtype = check("bias", bias, x.device, FLOATS, (I,)), DTYPES[bias.dtype]
    if batch * T:
        launch("quamba_scan_codes", rounding, x.device)
        launch("quamba_scan_rates", rates, x.device)
    B, C = columns.chunk(2, -1)
    return _scan(x, dt, A, B, C, D, None, z, state, x_scale, B_scale, C_scale, z_scale, out_dtype, None)


def _fake_prefill(
    x: Tensor, projected: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, A: Tensor, D: Tensor, z: Tensor,
    state: Tensor | None, x_scale: Tensor | None, B_scale: Tensor | None, C_scale: Tensor | None,
    z_scale: Tensor | None, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty((x.shape[0], *A.shape), dtype=torch.float32)


_LIBRARY = torch.library.Library("quamba", "FRAGMENT")
_LIBRARY.define(
    "selective_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor? dt_bias, Tensor? state, "
    "Tensor? x_scale, Tensor? B_scale, Tensor? C_scale, ScalarType out_dtype, Tensor? cu_seqlens) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("selective_scan", selective_scan, "CUDA")
torch.library.register_fake("quamba::selective_scan", _fake, lib=_LIBRARY)
_LIBRARY.define(
    "selective_prefill(Tensor x, Tensor projected, Tensor w, Tensor w_scale, Tensor? bias, Tensor A, Tensor D, "
    "Tensor z, Tensor? state, Tensor? x_scale, Tensor? B_scale, Tensor? C_scale, Tensor? z_scale, "
    "ScalarType out_dtype) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("selective_prefill", selective_prefill, "CUDA")
torch.library.register_fake("quamba::selective_prefill", _fake_prefill, lib=_LIBRARY)
