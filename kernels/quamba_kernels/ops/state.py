"""Storage of the recurrent state: fp32, fp16, or int8 with one dynamic scale per row over d_state."""

from __future__ import annotations

import torch

from quamba_kernels.ops.rowwise import QMAX, peak_scale
from quamba_kernels.registry import op

_MASK = 0xFFFFFFFF


def _mix(v: torch.Tensor) -> torch.Tensor:
    """A 32-bit finaliser (two multiply-xorshift rounds) in int64 arithmetic."""
    v = ((v ^ (v >> 16)) * 0x7FEB352D) & _MASK
    v = ((v ^ (v >> 15)) * 0x846CA68B) & _MASK
    return v ^ (v >> 16)


def dither(rng: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random numbers u_row [rows, 1] and v_column [columns] in [0, 1); frac(u + v) is the dither of an element.

    rng int64 [2]: seed and step. Every element is uniform and any two are uncorrelated, for one hash per row and one
    per column instead of one per element.
    """
    index = torch.arange(rows + columns, device=rng.device, dtype=torch.int64)
    key = _mix((rng[0] ^ _mix(rng[1] & _MASK)) & _MASK)
    draws = _mix((index + key) & _MASK).to(torch.float64) / 2**32
    draws = draws.float().clamp_(max=1 - 2**-24)
    return draws[:rows, None], draws[rows:]


def load_state(state: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """The fp32 value of a stored state [..., N]; scale fp32 [...] for int8 codes."""
    return state.float() if scale is None else state.float() * scale.unsqueeze(-1)


@op
def quantize_state(
    h: torch.Tensor, state: torch.Tensor, scale: torch.Tensor | None = None, rng: torch.Tensor | None = None
) -> None:
    """Store h [..., N] fp32 into ``state`` (fp32, fp16 or int8) in place; int8 also writes scale [...] fp32.

    int8: scale = max |h| / 127 over N, code = rint(h / scale), or floor(h / scale + dither) when rng (int64 [2]: seed,
    step) is given; the step advances by one, so that a replayed graph draws anew.
    """
    if scale is None:
        state.copy_(h)
        return
    scale.copy_(peak_scale(h.abs().amax(-1)))
    codes = h / scale.unsqueeze(-1)
    if rng is None:
        codes.round_()
    else:
        rows, columns = dither(rng, h[..., 0].numel(), h.shape[-1])
        noise = rows.view(*h.shape[:-1], 1) + columns
        codes.add_(noise.sub_(noise.floor())).floor_()
        rng[1] += 1
    state.copy_(codes.clamp_(-QMAX, QMAX))


@op
def quantize_states(
    h: tuple[torch.Tensor, ...],
    state: tuple[torch.Tensor, ...],
    scale: tuple[torch.Tensor, ...] | None = None,
    rng: tuple[torch.Tensor, ...] | None = None,
) -> None:
    """quantize_state of several layers, whose tensors are alike in shape and type."""
    for i, one in enumerate(h):
        quantize_state(one, state[i], None if scale is None else scale[i], None if rng is None else rng[i])
