"""The canonical bit layout on disk: pure functions, versioned by quamba.recipe.FORMAT_VERSION.

int4 codes lie as compressed-tensors' ``pack-quantized`` does: int32 [O, K/8], eight nibbles a word, low first, +8.
"""

from __future__ import annotations

import torch

from quamba_kernels.ops.linear import NIBBLES, unpack_int4

__all__ = ["NIBBLES", "pack_int4", "unpack_int4"]


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """int8 [O, K] in [-8, 7] -> int32 [O, K/8].

    Raises ValueError when K is no multiple of 8 or a code is out of range.
    """
    if codes.shape[-1] % NIBBLES:
        raise ValueError(f"int4 packing takes a multiple of {NIBBLES} input features, got {codes.shape[-1]}")
    if codes.numel() and (codes.min() < -8 or codes.max() > 7):
        raise ValueError(f"int4 codes lie in [-8, 7], got [{int(codes.min())}, {int(codes.max())}]")
    nibbles = (codes.to(torch.int32) + 8).unflatten(-1, (-1, NIBBLES))
    shifts = torch.arange(0, 4 * NIBBLES, 4, device=codes.device, dtype=torch.int32)
    return (nibbles << shifts).sum(-1, dtype=torch.int32)
