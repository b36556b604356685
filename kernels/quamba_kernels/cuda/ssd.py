"""Mamba2's scan as custom ops quamba::ssd_scan and quamba::ssd_prefill, of csrc/scan.h."""

from __future__ import annotations

import torch
from torch import Tensor

from quamba_kernels.cuda import conv
from quamba_kernels.cuda.arguments import CODES, FLOATS, Arguments, constant, fields, launch, stream
from quamba_kernels.cuda.expansion import QuambaExpansion, waiting
from quamba_kernels.cuda.library import DTYPES
from quamba_kernels.ops.sequences import check_cu_seqlens

STATES = (16, 32, 64, 128, 256)
CHANNELS = (16, 32, 64, 128)
HALVES = (torch.float16, torch.bfloat16)
PIECE = 16
"""Bytes that a kernel copies at a time: what each row of x, B and C must be a multiple of."""
CUTS = 0
"""Segments of each sequence; 0 leaves it to the size of the problem."""


class QuambaSsdScan(Arguments):
    """The struct of csrc/scan.h."""

    _fields_ = fields(
        "x dt b c x_scale b_scale c_scale A D dt_bias state last cu_seqlens y workspace",
        "workspace_bytes T x_batch x_token x_head dt_batch dt_token b_batch b_token b_group c_batch c_token c_group",
        "H P G N sequences cuts x_dtype dt_dtype b_dtype c_dtype D_dtype dt_bias_dtype y_dtype",
        "lowest highest",
    ) + [("expansion", QuambaExpansion)]


class QuambaSsdPrefill(Arguments):
    """The struct of csrc/scan.h."""

    _fields_ = fields("workspace", "workspace_bytes", "") + [("conv", conv.QuambaConv), ("scan", QuambaSsdScan)]


def why_not(P: int | None, N: int | None, dtype: torch.dtype) -> str | None:
    """Why the kernel does not take such heads and states, or that type of outputs, in a sentence."""
    if P is not None and P not in CHANNELS:
        return f"takes heads of {', '.join(map(str, CHANNELS))} channels, got {P}"
    if N is not None and N not in STATES:
        return f"takes {', '.join(map(str, STATES))} states a channel, got {N}"
    if dtype not in HALVES:
        return f"computes outputs of 16 bits, got {str(dtype).removeprefix('torch.')}"
    return None


def prefill_why_not(P: int | None, N: int | None, W: int | None, dtype: torch.dtype) -> str | None:
    """Why the kernel that also convolves does not take such heads, states and taps, in a sentence."""
    for what, size, wanted in (("channels a head", P, 64), ("states a channel", N, 128), ("taps", W, 4)):
        if size not in (None, wanted):
            return f"is written for {wanted} {what}, got {size}"
    return why_not(P, N, dtype)


def _strides(tensor: Tensor) -> list[int]:
    """Strides, 0 along axes of one element: nothing is read there, and whatever torch says could be off the grid."""
    return [stride if size > 1 else 0 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)]


def _pieces(name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x, B or C with every row at a multiple of PIECE bytes, copied if they were not."""
    tensor = stream(name, tensor, x, (*HALVES, *CODES), shape)
    elements = PIECE // tensor.element_size()
    if tensor.data_ptr() % PIECE or any(stride % elements for stride in _strides(tensor)[:-1]):
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def arguments(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor | None, state: Tensor | None,
    x_scale: Tensor | None, B_scale: Tensor | None, C_scale: Tensor | None, lowest: float, highest: float,
    out_dtype: torch.dtype, cu_seqlens: Tensor | None,
) -> tuple[QuambaSsdScan, Tensor, Tensor, list[Tensor | None]]:  # fmt: skip
    """What the kernel takes, y and the last state, and what must live until it is launched."""
    if x.dim() != 4 or B.dim() != 4:
        raise ValueError(f"x and B have to be [B, T, H, P] and [B, T, G, N], got {list(x.shape)} and {list(B.shape)}")
    batch, T, H, P = x.shape
    G, N = B.shape[2:]
    if reason := why_not(P, N, out_dtype):
        raise ValueError(f"the CUDA ssd_scan {reason}")
    if H % G:
        raise ValueError(f"the {G} state groups have to divide the {H} heads")
    if not 0 <= lowest <= highest:
        raise ValueError(f"dt_limit has to rise from 0 or more, got {(lowest, highest)}")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x, state)
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    x = _pieces("x", x, x, (batch, T, H, P))
    B, C = (_pieces(name, t, x, (batch, T, G, N)) for name, t in (("B", B), ("C", C)))
    dt = stream("dt", dt, x, FLOATS, (batch, T, H))
    y = torch.empty((batch, T, H, P), dtype=out_dtype, device=x.device)
    last = torch.empty((sequences, H, P, N), dtype=torch.float32, device=x.device)
    before = None if state is None else state.float().contiguous()

    a = QuambaSsdScan(T=T, H=H, P=P, G=G, N=N, sequences=sequences, cuts=CUTS, lowest=lowest, highest=highest)
    for name, tensor, part in (("x", x, "head"), ("b", B, "group"), ("c", C, "group"), ("dt", dt, None)):
        setattr(a, name, tensor.data_ptr())
        setattr(a, f"{name}_dtype", DTYPES[tensor.dtype])
        for axis, stride in zip(("batch", "token", part), _strides(tensor), strict=False):
            if axis is not None:
                setattr(a, f"{name}_{axis}", stride)
    a.y, a.y_dtype, a.last = y.data_ptr(), DTYPES[out_dtype], last.data_ptr()
    fp32 = (torch.float32,)
    a.x_scale = constant("x_scale", x_scale, x, fp32, (H, P))
    a.b_scale, a.c_scale = constant("B_scale", B_scale, x, fp32, (G,)), constant("C_scale", C_scale, x, fp32, (G,))
    a.A = constant("A", A, x, fp32, (H,))
    a.D, a.D_dtype = constant("D", D, x, FLOATS, (H,)), DTYPES[D.dtype]
    a.dt_bias = constant("dt_bias", dt_bias, x, FLOATS, (H,))
    a.dt_bias_dtype = 0 if dt_bias is None else DTYPES[dt_bias.dtype]
    a.state = constant("state", before, x, fp32, (sequences, H, P, N))
    a.cu_seqlens = constant("cu_seqlens", cu_seqlens, x, (torch.int32,), (sequences + 1,))
    return a, y, last, [x, B, C, dt, before]


def ssd_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor | None, state: Tensor | None,
    x_scale: Tensor | None, B_scale: Tensor | None, C_scale: Tensor | None, lowest: float, highest: float,
    out_dtype: torch.dtype, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    a, y, last, _alive = arguments(
        x, dt, A, B, C, D, dt_bias, state, x_scale, B_scale, C_scale, lowest, highest, out_dtype, cu_seqlens
    )
    if a.sequences:
        a.expansion = waiting(x.device)
        launch("quamba_ssd_scan", a, x.device)
    return y, last


def _fake(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor | None, state: Tensor | None,
    x_scale: Tensor | None, B_scale: Tensor | None, C_scale: Tensor | None, lowest: float, highest: float,
    out_dtype: torch.dtype, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    last = x.new_empty((sequences, *x.shape[2:], B.shape[-1]), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=out_dtype), last


def ssd_prefill(
    mixed: Tensor, dt: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, conv_state: Tensor | None, A: Tensor,
    D: Tensor, dt_bias: Tensor | None, state: Tensor | None, groups: int, d_state: int, conv_in_scale: Tensor | None,
    conv_weight_scale: Tensor | None, conv_out_scale: Tensor | None, x_scale: Tensor | None, B_scale: Tensor | None,
    C_scale: Tensor | None, lowest: float, highest: float, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    heads, columns = A.numel(), groups * d_state
    inner = mixed.shape[-1] - 2 * columns
    if mixed.dim() != 3 or inner <= 0 or inner % heads:
        sizes = f"{heads} heads, {groups} groups and {d_state} states"
        raise ValueError(f"mixed has to be [B, T, H P + 2 G N] with {sizes}, got {list(mixed.shape)}")
    with conv.contiguous(conv_state) as kept:
        convolution, convolved, _x = conv.arguments(
            mixed, conv_weight, conv_bias, kept, conv_in_scale, None, conv_weight_scale, conv_out_scale, out_dtype, None
        )
        x, B, C = convolved.split([inner, columns, columns], -1)
        scan, y, last, _alive = arguments(
            x.unflatten(-1, (heads, -1)), dt, A, B.unflatten(-1, (groups, -1)), C.unflatten(-1, (groups, -1)), D,
            dt_bias, state, x_scale, B_scale, C_scale, lowest, highest, out_dtype, None,
        )  # fmt: skip
        if mixed.numel():
            scan.expansion = waiting(mixed.device)
            launch("quamba_ssd_prefill", QuambaSsdPrefill(conv=convolution, scan=scan), mixed.device)
        else:
            last.copy_(torch.zeros_like(last) if state is None else state)
    return y, last


def _fake_prefill(
    mixed: Tensor, dt: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, conv_state: Tensor | None, A: Tensor,
    D: Tensor, dt_bias: Tensor | None, state: Tensor | None, groups: int, d_state: int, conv_in_scale: Tensor | None,
    conv_weight_scale: Tensor | None, conv_out_scale: Tensor | None, x_scale: Tensor | None, B_scale: Tensor | None,
    C_scale: Tensor | None, lowest: float, highest: float, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    heads = A.shape[0]
    P = (mixed.shape[-1] - 2 * groups * d_state) // heads
    last = mixed.new_empty((mixed.shape[0], heads, P, d_state), dtype=torch.float32)
    return mixed.new_empty((*mixed.shape[:2], heads, P), dtype=out_dtype), last


_LIBRARY = torch.library.Library("quamba", "FRAGMENT")
_LIBRARY.define(
    "ssd_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor? dt_bias, Tensor? state, "
    "Tensor? x_scale, Tensor? B_scale, Tensor? C_scale, float lowest, float highest, ScalarType out_dtype, "
    "Tensor? cu_seqlens) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("ssd_scan", ssd_scan, "CUDA")
torch.library.register_fake("quamba::ssd_scan", _fake, lib=_LIBRARY)
_LIBRARY.define(
    "ssd_prefill(Tensor mixed, Tensor dt, Tensor conv_weight, Tensor? conv_bias, Tensor(a!)? conv_state, Tensor A, "
    "Tensor D, Tensor? dt_bias, Tensor? state, int groups, int d_state, Tensor? conv_in_scale, "
    "Tensor? conv_weight_scale, Tensor? conv_out_scale, Tensor? x_scale, Tensor? B_scale, Tensor? C_scale, "
    "float lowest, float highest, ScalarType out_dtype) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("ssd_prefill", ssd_prefill, "CUDA")
torch.library.register_fake("quamba::ssd_prefill", _fake_prefill, lib=_LIBRARY)
