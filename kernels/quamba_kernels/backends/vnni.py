"""CPUs with AVX-512 VNNI: exact int8 products through torch._int_mm (on others it is 30 times slower than fp32)."""

from __future__ import annotations

import torch

from quamba_kernels import ops
from quamba_kernels.backends.cpu import contract, expand
from quamba_kernels.ops.linear import finish
from quamba_kernels.registry import Setting


def _why_not(setting: Setting) -> str | None:
    if setting.device != "cpu":
        return f"serves tensors on the CPU, these are on {setting.device}"
    if not torch.cpu._is_vnni_supported():
        return "this CPU has no AVX-512 VNNI, without which torch._int_mm is slower than an fp32 product"
    return None


def _product(x, x_scale, weight, scale, bias, residual, out_scale, out_dtype):
    acc = torch._int_mm(x.flatten(0, -2), weight.T).view(*x.shape[:-1], -1).float()
    return finish(acc * x_scale * scale, bias, residual, out_scale, out_dtype)


@ops.linear_w8a8.backend("vnni", why_not=_why_not, rank=40)
def linear_w8a8(
    x, x_scale, weights: tuple[torch.Tensor, torch.Tensor], bias=None, residual=None, *,
    out_scale=None, out_dtype=torch.float32,
):  # fmt: skip
    """int8 x int8 -> int32 in one call."""
    return _product(x, x_scale, *weights, bias, residual, out_scale, out_dtype)


@ops.linear_w4a8.backend("vnni", why_not=_why_not, rank=40, prepack=expand, unpack=contract)
def linear_w4a8(x, x_scale, weights, bias=None, residual=None, *, out_scale=None, out_dtype=torch.float32):
    """The weights are expanded to int8 when bound; then as linear_w8a8."""
    codes, _, scale = weights
    return _product(x, x_scale, codes, scale, bias, residual, out_scale, out_dtype)
