"""The causal convolution as custom op quamba::causal_conv1d, of csrc/conv.h. Updates the state in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
from quamba_kernels.ops.sequences import check_cu_seqlens

WIDTHS = (2, 3, 4)
ROWS = 65535


class QuambaConv(Arguments):
    """The struct of csrc/conv.h."""

    _fields_ = fields(
        "x in_scale x_scale weight weight_scale bias state cu_seqlens out_scale y", "T batch_stride token_stride",
        "B C W sequences in_scale_count x_scale_count out_scale_count x_dtype weight_dtype bias_dtype y_dtype",
    ) + [("expansion", QuambaExpansion)]  # fmt: skip


def why_not(W: int) -> str | None:
    """Why the kernel does not take kernels of this width, in a sentence."""
    return None if W in WIDTHS else f"takes convolutions of width {WIDTHS[0]} to {WIDTHS[-1]}, got {W}"


def arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, in_scale: Tensor | None,
    x_scale: Tensor | None, weight_scale: Tensor | None, out_scale: Tensor | None, out_dtype: torch.dtype,
    cu_seqlens: Tensor | None,
) -> tuple[QuambaConv, Tensor, list[Tensor]]:  # fmt: skip
    """What the kernel takes, its result, and what must live until it is launched; the state has to be contiguous."""
    if x.dim() != 3:
        raise ValueError(f"x has to be [B, T, C], got {list(x.shape)}")
    x = stream("x", x, x, FLOATS if in_scale is not None else (*FLOATS, *CODES))
    B, T, C = x.shape
    W = weight.shape[-1]
    if reason := why_not(W):
        raise ValueError(f"the CUDA causal_conv1d {reason}")
    if B > ROWS:
        raise ValueError(f"the CUDA causal_conv1d takes up to {ROWS} rows, got {B}; pass cu_seqlens or fewer at a time")
    if out_scale is None:
        out_type(out_dtype)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x, state)
    y = torch.empty(x.shape, dtype=out_dtype if out_scale is None else torch.int8, device=x.device)
    sequences = B if cu_seqlens is None else len(cu_seqlens) - 1
    a = QuambaConv(T=T, batch_stride=x.stride(0), token_stride=x.stride(1), B=B, C=C, W=W, sequences=sequences)
    a.x, a.y, a.x_dtype, a.y_dtype = x.data_ptr(), y.data_ptr(), DTYPES[x.dtype], DTYPES[y.dtype]
    a.weight = constant("weight", weight, x, (*FLOATS, *CODES), (C, W))
    a.weight_dtype = DTYPES[weight.dtype]
    a.weight_scale = constant("weight_scale", weight_scale, x, (torch.float32,), (C,))
    a.bias = constant("bias", bias, x, FLOATS, (C,))
    a.bias_dtype = 0 if bias is None else DTYPES[bias.dtype]
    for name, scale in (("in_scale", in_scale), ("x_scale", x_scale), ("out_scale", out_scale)):
        setattr(a, name, constant(name, scale, x, (torch.float32,), (1,), (C,)))
        setattr(a, f"{name}_count", 0 if scale is None else scale.numel())
    a.cu_seqlens = constant("cu_seqlens", cu_seqlens, x, (torch.int32,), (sequences + 1,))
    a.state = constant("state", state, x, (torch.int8 if in_scale is not None else x.dtype,), (sequences, W - 1, C))
    return a, y, [x]


@contextmanager
def contiguous(state: Tensor | None) -> Iterator[Tensor | None]:
    """A state that a kernel updates in place, or a contiguous copy that is copied back."""
    kept = None if state is None else state.contiguous()
    yield kept
    if state is not None and kept is not None and kept is not state:
        state.copy_(kept)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, in_scale: Tensor | None,
    x_scale: Tensor | None, weight_scale: Tensor | None, out_scale: Tensor | None, out_dtype: torch.dtype,
    cu_seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    with contiguous(state) as kept:
        a, y, _alive = arguments(
            x, weight, bias, kept, in_scale, x_scale, weight_scale, out_scale, out_dtype, cu_seqlens
        )
        if x.numel():
            a.expansion = waiting(x.device)
            launch("quamba_causal_conv1d", a, x.device)
    return y


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, in_scale: Tensor | None,
    x_scale: Tensor | None, weight_scale: Tensor | None, out_scale: Tensor | None, out_dtype: torch.dtype,
    cu_seqlens: Tensor | None,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape, dtype=out_dtype if out_scale is None else torch.int8)


_LIBRARY = torch.library.Library("quamba", "FRAGMENT")
_LIBRARY.define(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor(a!)? state, Tensor? in_scale, Tensor? x_scale, "
    "Tensor? weight_scale, Tensor? out_scale, ScalarType out_dtype, Tensor? cu_seqlens) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("causal_conv1d", causal_conv1d, "CUDA")
torch.library.register_fake("quamba::causal_conv1d", _fake, lib=_LIBRARY)
