"""The low-bit linears as custom ops quamba::linear_*: checked, dispatched by the number of rows, safe in CUDA graphs.

Activations (x, x_scale, residual) that are not contiguous or not aligned to 16 bytes are copied; weights, biases and
scales of such a layout are refused: they would be copied at every call, and the kernels, which read constants before
they wait for those before them, might read a copy that is not finished.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from quamba_kernels.cuda import int4_order
from quamba_kernels.cuda.expansion import ahead, expanded
from quamba_kernels.cuda.library import DTYPES, QuambaLinear, library
from quamba_kernels.cuda.rowwise import rms_norm
from quamba_kernels.ops.linear import NIBBLES, finish

W8A8_GEMM = "quamba_linear_w8a8_gemm"
W8A8_SKINNY_ROWS = 32
W4A8_SKINNY_ROWS = 64
W4A16_SKINNY_ROWS = 48
"""Up to so many rows the bytes of the weights decide, which the skinny kernels read once and expand in registers."""
WIDE, WIDE_SKINNY_ROWS = 8192, 16
"""From so many out features on, Hopper's GEMM over int4 weights fills the GPU and wins beyond so many rows."""
FEW_GROUPS = (64, 128)
FEW_TILES = {
    "w8a8": {32: 10**6, 64: 160, 128: 290, 192: 96, 256: 32, 512: 16},
    "w4a8": {64: 10**6, 256: 580, 512: 16},
    "w4a16": {64: 10**6, 128: 96, 256: 128, 2048: 64},
}
"""Hopper has a kernel that splits K over a cluster, for int4 groups of 64 or a multiple of 128: up to so many rows
where tiles of 64 rows by 128 out features are at most so many, the least such number of rows deciding. With more of
them the GEMMs fill the GPU and win."""
W4A8_GEMM_O, W4A8_ANY_ROWS, W4A8_GEMM_ROWS, W4A8_MOST_ROWS = 2560, 256, 1536, 2048
"""Where that GEMM beats an expansion to int8 followed by the faster int8 GEMM: this wide, up to so many rows of groups
of any size, of a multiple of 128, and of those where its tiles leave few multiprocessors without work."""
W4A8_TILE, W4A8_FILLED = (256, 128), 0.95
"""Rows and out features of its largest tile, and the share of their waves that such tiles have to fill."""
W4A8_PIECE = 1.6
"""Such tiles in the time of 16 rows by 16 of the out features that it multiplies beside them."""
W4A8_MOST_GROUPS = 64
"""Groups of a row whose multipliers it keeps in shared memory; with more, or other groups, it has one small tile."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)
K_MULTIPLE, O_MULTIPLE, S_MULTIPLE, ALIGNMENT = 32, 8, 32, 16
K_MAX = 32768


def shape_why_not(K: int, O: int, S: int) -> str | None:
    """Why the kernels do not take a weight [O, K] with groups of S, in a sentence."""
    if K < 1 or O < 1 or K % K_MULTIPLE or O % O_MULTIPLE:
        return f"takes K a multiple of {K_MULTIPLE} and O a multiple of {O_MULTIPLE}, got K={K} and O={O}"
    if K > K_MAX:
        return f"takes K up to {K_MAX}, got K={K}"
    if S < 1 or S % S_MULTIPLE or K % S:
        return f"takes groups of a multiple of {S_MULTIPLE} that divide K={K}, got S={S}"
    return None


def tidy(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def check(
    name: str, tensor: Tensor, device: torch.device, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]
) -> int:
    """The address. Raises TypeError or ValueError in a sentence when a kernel would misread the tensor."""
    if tensor.device != device:
        raise ValueError(f"{name} lies on {tensor.device}, and x on {device}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} has to be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} has to be {list(shape)}, got {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} {list(shape)} is not contiguous (strides {tensor.stride()}); pass a contiguous copy")
    if tensor.data_ptr() % ALIGNMENT:
        raise ValueError(f"{name} does not start at a multiple of {ALIGNMENT} bytes; pass a clone")
    return tensor.data_ptr()


def on_hopper(device: torch.device) -> bool:
    """Whether the object for this device has the GEMMs over int4 weights, and the kernels that split K."""
    return library(device.index).arch == "sm_90a"


def takes_order(group_size: int, device: torch.device) -> bool:
    """Whether this device's kernels take int4 weights for 16-bit activations in the order of ``int4_order``."""
    return on_hopper(device) and group_size % int4_order.MULTIPLE == 0


def few_tiles(kind: str, rows: int, out_features: int) -> bool:
    """Whether the kernel that splits K is Hopper's fastest."""
    tiles = -(-rows // 64) * -(-out_features // 128)
    return tiles <= next((most for limit, most in FEW_TILES[kind].items() if limit >= rows), 0)


def multiplies_int4(rows: int, out_features: int, in_features: int, group_size: int) -> bool:
    """Whether W4A8 is faster by Hopper's GEMM over int4 weights than by an expansion and the GEMM over int8; beyond
    W4A8_GEMM_ROWS only where tiles_fill says so, too."""
    if out_features < W4A8_GEMM_O or rows > W4A8_MOST_ROWS:
        return False
    whole = group_size % max(FEW_GROUPS) == 0 and in_features <= W4A8_MOST_GROUPS * group_size
    return whole or rows <= W4A8_ANY_ROWS


def tiles_fill(rows: int, out_features: int, processors: int) -> bool:
    """Whether the largest tiles of that GEMM leave few multiprocessors without work in their last wave. Out features of
    half a tile may have tiles of twice the rows, and fewer are multiplied beside the tiles where that is soon done."""
    down, (across, left) = -(-rows // W4A8_TILE[0]), divmod(out_features, W4A8_TILE[1])

    def fill(tiles: int, pieces: int = 0) -> bool:
        waves = -(-tiles // processors)
        soon = -(-pieces // processors) * W4A8_PIECE <= waves
        return soon and tiles >= W4A8_FILLED * processors * waves

    half = W4A8_TILE[1] // 2
    halves = -(-down // 2) if left >= half else 0
    return fill(down * (across + (left > 0))) or fill(down * across + halves, -(-rows // 16) * -(-(left % half) // 16))


def w4a8_gemm(rows: int, out_features: int, in_features: int, group_size: int, device: torch.device) -> bool:
    """Whether Hopper's GEMM over int4 weights is the fastest over many rows of int8 on this device."""
    if not on_hopper(device) or not multiplies_int4(rows, out_features, in_features, group_size):
        return False
    if rows <= W4A8_GEMM_ROWS:
        return True
    return tiles_fill(rows, out_features, torch.cuda.get_device_properties(device).multi_processor_count)


def splits(kind: str, rows: int, out_features: int, group_size: int, device: torch.device) -> bool:
    """Whether Hopper's kernel that splits K over a cluster is the fastest over int4 weights."""
    if not on_hopper(device) or (group_size not in FEW_GROUPS and group_size % max(FEW_GROUPS)):
        return False
    return few_tiles(kind, rows, out_features)


def few_rows(rows: int, out_features: int, limit: int, device: torch.device) -> bool:
    """Whether int4 weights are better read by the skinny kernel; ``limit`` where no GEMM fits them better."""
    return rows <= (min(limit, WIDE_SKINNY_ROWS) if out_features >= WIDE and on_hopper(device) else limit)


def w4a8_kernel(rows: int, w: Tensor, w_multiplier: Tensor) -> str | None:
    """The fastest over two-level int4 weights; None for an expansion to int8 and the GEMM over that."""
    O, K, device = w.shape[0], w.shape[1] * NIBBLES, w.device
    S = K // w_multiplier.shape[1]
    if splits("w4a8", rows, O, S, device):
        return "quamba_linear_w4a8_few"
    if few_rows(rows, O, W4A8_SKINNY_ROWS, device):
        return "quamba_linear_w4a8_skinny"
    return "quamba_linear_w4a8_gemm" if w4a8_gemm(rows, O, K, S, device) else None


def w8a8_kernel(rows: int, out_features: int, device: torch.device) -> str:
    """The fastest over int8 weights."""
    if on_hopper(device) and few_tiles("w8a8", rows, out_features):
        return "quamba_linear_w8a8_few"
    return "quamba_linear_w8a8_skinny" if rows <= W8A8_SKINNY_ROWS else W8A8_GEMM


class Problem:
    """One call of a linear: its checked arguments as the struct that the kernels take."""

    def __init__(
        self,
        x: Tensor,
        x_scale: Tensor | None,
        w: Tensor,
        w_scale: Tensor,
        w_multiplier: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        out_scale: Tensor | None,
        out_dtype: torch.dtype,
    ) -> None:
        K, O, device = x.shape[-1], w.shape[0], x.device
        M = x.numel() // max(K, 1)
        integers = x_scale is not None or w_multiplier is not None or w.dtype == torch.int8
        grouped = w_multiplier if integers else w_scale
        groups = 1 if grouped is None else grouped.shape[-1]
        if not groups or K % groups:
            raise ValueError(f"the scales of {groups} groups do not divide K={K}")
        S = K // groups
        if reason := shape_why_not(K, O, S):
            raise ValueError(f"the CUDA linear {reason}")
        if out_dtype not in FLOATS:
            raise TypeError(f"out_dtype has to be one of {FLOATS}, got {out_dtype}; out_scale gives an int8 result")
        self.device, self.shape, self.int4 = device, (*x.shape[:-1], O), w.dtype != torch.int8
        self.kind = "w8a8" if not self.int4 else "w4a8" if integers else "w4a16"
        self.dtype = out_dtype if out_scale is None else torch.int8
        # what the struct points at has to outlive it
        self.x = x = tidy(x)
        self.x_scale = x_scale = None if x_scale is None else x_scale.contiguous()
        self.residual = residual = None if residual is None else tidy(residual)

        int8, fp32 = (torch.int8,), (torch.float32,)
        self.linear = a = QuambaLinear(M=M, O=O, K=K, S=S, y_dtype=DTYPES[self.dtype])
        a.x = check("x", x, device, int8 if integers else HALVES, x.shape)
        a.x_dtype = DTYPES[x.dtype]
        if x_scale is not None:
            if x_scale.device != device or x_scale.dtype != torch.float32 or x_scale.numel() not in (1, M):
                raise ValueError(
                    f"x_scale has to be torch.float32 [1] or {[*x.shape[:-1], 1]} on {device}, "
                    f"got {x_scale.dtype} {list(x_scale.shape)} on {x_scale.device}"
                )
            a.x_scale, a.x_scale_count = x_scale.data_ptr(), x_scale.numel()
        if grouped is None:
            a.w = check("w", w, device, int8, (O, K))
        elif self.kind == "w4a16" and takes_order(S, device):
            a.w = check("w as prepacked", w, device, (torch.int32,), int4_order.shape(O, K))
        else:
            a.w = check("w", w, device, (torch.int32,), (O, K // NIBBLES))
        if w_multiplier is not None:
            a.w_multiplier = check("w_multiplier", w_multiplier, device, int8, (O, K // S))
        if integers:
            a.w_scale = check("w_scale", w_scale, device, fp32, (O,))
        else:
            a.w_scale = check("w_scale", w_scale, device, (torch.float16,), (O, K // S))
        if bias is not None:
            a.bias, a.bias_dtype = check("bias", bias, device, FLOATS, (O,)), DTYPES[bias.dtype]
        if residual is not None:
            a.residual = check("residual", residual, device, FLOATS, self.shape)
            a.residual_dtype = DTYPES[residual.dtype]
        if out_scale is not None:
            a.out_scale_count = 1 if out_scale.numel() == 1 else O
            a.out_scale = check("out_scale", out_scale, device, fp32, (a.out_scale_count,))

    def run(self, kernel: str) -> Tensor:
        """y, from a kernel that does the whole linear."""
        y = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        if self.linear.M:
            self.linear.y = y.data_ptr()
            self._call(kernel, self.linear)
        return y

    def expand(self, kernel: str, dtype: torch.dtype) -> Tensor:
        """The weight in scratch memory, [O, K] of ``dtype``."""
        weight = torch.empty(self.linear.O, self.linear.K, dtype=dtype, device=self.device)
        a = QuambaLinear.from_buffer_copy(self.linear)
        a.y, a.y_dtype, a.out_scale, a.bias, a.residual = weight.data_ptr(), DTYPES[dtype], None, None, None
        self._call(kernel, a)
        return weight

    def _call(self, kernel: str, linear: QuambaLinear) -> None:
        with torch.cuda.device(self.device):
            library(self.device.index).call(kernel, linear, self.device)


def linear_w8a8(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, *epilogue: Any) -> Tensor:
    p = Problem(x, x_scale, w, w_scale, None, *epilogue)
    return p.run(w8a8_kernel(p.linear.M, p.linear.O, p.device))


def linear_w4a8(
    x: Tensor, x_scale: Tensor, w: Tensor, w_multiplier: Tensor, w_scale: Tensor, *epilogue: Any
) -> Tensor:
    """Many rows: on sm_90a a GEMM that unpacks as it multiplies where that is faster, else the weight is expanded to
    int8 once per call, and the rest is linear_w8a8; fewer rows, kernels that unpack as they multiply."""
    p = Problem(x, x_scale, w, w_scale, w_multiplier, *epilogue)
    kernel = w4a8_kernel(p.linear.M, w, w_multiplier)
    if kernel is not None:
        return p.run(kernel)
    weight = expanded(w)
    if weight is None:
        weight = p.expand("quamba_expand_w4a8", torch.int8)
    p.linear.w, p.linear.w_multiplier, p.linear.S = weight.data_ptr(), None, p.linear.K
    return p.run(W8A8_GEMM)


def ahead_w4a8(weights: tuple[Tensor, ...], rows: int) -> AbstractContextManager[None]:
    """Inside, kernels may expand the weights (q4, m, scale) for linear_w4a8 of so many rows, where it would do that."""
    w, w_multiplier, _ = weights
    return nullcontext() if w4a8_kernel(rows, w, w_multiplier) is not None else ahead(w, w_multiplier)


def linear_w4a16(x: Tensor, w: Tensor, w_scale: Tensor, *epilogue: Any) -> Tensor:
    """Many rows: a mixed-input kernel on sm_90a; elsewhere the weight is expanded to x's type for torch's product."""
    p = Problem(x, None, w, w_scale, None, *epilogue)
    if takes_order(p.linear.S, p.device):
        few = splits("w4a16", p.linear.M, p.linear.O, p.linear.S, p.device)
        return p.run("quamba_linear_w4a16_few" if few else "quamba_linear_w4a16_gemm")
    if few_rows(p.linear.M, p.linear.O, W4A16_SKINNY_ROWS, p.device):
        return p.run("quamba_linear_w4a16_skinny")
    if on_hopper(p.device):
        return p.run("quamba_linear_w4a16_gemm")
    weight = p.expand("quamba_expand_w4a16", x.dtype)
    y = torch.mm(p.x.view(-1, p.linear.K), weight.T, out_dtype=torch.float32)
    return finish(y.view(p.shape), *epilogue)


def waits_for_all(rows: int, w: Tensor, w_multiplier: Tensor | None) -> bool:
    """Whether all that a linear does waits for its input, as in the GEMMs over int8 activations: its blocks, let go
    early, would only take the room of the kernel before. Int4 weights: beyond W4A8_ANY_ROWS, where it was measured."""
    if w.dtype == torch.int8:
        return w8a8_kernel(rows, w.shape[0], w.device) == W8A8_GEMM
    if w_multiplier is None or rows <= W4A8_ANY_ROWS:
        return False
    return w4a8_kernel(rows, w, w_multiplier) == "quamba_linear_w4a8_gemm"


def norm_linear(
    x: Tensor, norm_weight: Tensor | None, eps: float, w: Tensor, w_multiplier: Tensor | None, w_scale: Tensor,
    bias: Tensor | None, residual: Tensor | None, in_scale: Tensor | None, per_token: bool, in_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The norm, and the linear, which has weights on their way while the norm runs or lets it have their room."""
    rows = x.numel() // max(x.shape[-1], 1)
    held, epilogue = waits_for_all(rows, w, w_multiplier), (bias, residual, None, out_dtype)
    u, scale = rms_norm(x, norm_weight, eps, in_scale, per_token, in_dtype, held)
    if w_multiplier is None and w.dtype != torch.int8:
        return linear_w4a16(u, w, w_scale, *epilogue)
    if not per_token:
        if in_scale is None:
            raise ValueError("the linear takes codes: give in_scale or per_token")
        scale = in_scale
    if w_multiplier is None:
        return linear_w8a8(u, scale, w, w_scale, *epilogue)
    return linear_w4a8(u, scale, w, w_multiplier, w_scale, *epilogue)


def _fake(x: Tensor, w: Tensor, out_scale: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]), dtype=out_dtype if out_scale is None else torch.int8)


def _fake_int8(x: Tensor, x_scale: Tensor, w: Tensor, *rest: Any) -> Tensor:
    return _fake(x, w, *rest[-2:])


def _fake_half(x: Tensor, w: Tensor, *rest: Any) -> Tensor:
    return _fake(x, w, *rest[-2:])


_EPILOGUE = "Tensor? bias, Tensor? residual, Tensor? out_scale, ScalarType out_dtype) -> Tensor"
_LIBRARY = torch.library.Library("quamba", "FRAGMENT")
for _op, _without_data, _inputs in (
    (linear_w8a8, _fake_int8, "Tensor x, Tensor x_scale, Tensor w, Tensor w_scale"),
    (linear_w4a8, _fake_int8, "Tensor x, Tensor x_scale, Tensor w, Tensor w_multiplier, Tensor w_scale"),
    (linear_w4a16, _fake_half, "Tensor x, Tensor w, Tensor w_scale"),
):
    _LIBRARY.define(f"{_op.__name__}({_inputs}, {_EPILOGUE}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_op.__name__, _op, "CUDA")
    torch.library.register_fake(f"quamba::{_op.__name__}", _without_data, lib=_LIBRARY)

_LIBRARY.define(
    "norm_linear(Tensor x, Tensor? norm_weight, float eps, Tensor w, Tensor? w_multiplier, Tensor w_scale, "
    "Tensor? bias, Tensor? residual, Tensor? in_scale, bool per_token, ScalarType in_dtype, ScalarType out_dtype) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("norm_linear", norm_linear, "CUDA")


@torch.library.register_fake("quamba::norm_linear", lib=_LIBRARY)
def _fake_norm_linear(x: Tensor, norm_weight: Tensor | None, eps: float, w: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]), dtype=rest[-1])
