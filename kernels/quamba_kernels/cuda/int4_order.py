"""Int4 weights for 16-bit activations in the order in which products on Hopper take them (csrc/operand_w4.cuh).

As stored, a word holds eight neighbours in K. A lane's piece of a product of tensor cores is two neighbours of every
eight, so that four lanes would pick from the same words. In this order each of the four words of 32 columns is one
lane's: word t has columns 8 q + 2 t and 8 q + 2 t + 1 as nibbles q and q + 4, for q from 0 to 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quamba_kernels.ops.linear import NIBBLES

WORDS, MULTIPLE = 4, 64
"""Words of 32 columns; groups of a multiple of so many columns are multiplied in this order."""

_STORED, _ORDERED = (8, 4), (4, 16)
"""Bits from the place of one code of a word to the next: by the word that it lies in otherwise, by the neighbour."""


def shape(O: int, K: int) -> tuple[int, int, int]:
    """Of a weight [O, K] in this order."""
    return O, K // (NIBBLES * WORDS), WORDS


def ordered(weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The weights of a linear, int4 ones that groups of a multiple of MULTIPLE columns alone scale in this order."""
    w, *scales = weights
    if w.dtype != torch.int32 or len(scales) != 1 or w.shape[1] * NIBBLES // scales[0].shape[1] % MULTIPLE:
        return weights
    return order(w), *scales


def restored(weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Undo ``ordered``."""
    w, *scales = weights
    return (stored(w), *scales) if w.dim() == 3 else weights


def order(w: Tensor) -> Tensor:
    """int32 [O, K/8] as stored -> int32 [O, K/32, 4], which no kernel can take for the other."""
    return _exchange(w.unflatten(-1, (-1, WORDS)), _STORED, _ORDERED)


def stored(w: Tensor) -> Tensor:
    """Undo ``order``."""
    return _exchange(w, _ORDERED, _STORED).flatten(-2)


def _exchange(words: Tensor, places: tuple[int, int], into: tuple[int, int]) -> Tensor:
    made = torch.zeros_like(words)
    for i in range(WORDS):
        for j in range(WORDS):
            for neighbour in range(2):
                code = words[..., i] >> (places[0] * j + places[1] * neighbour) & 15
                made[..., j] |= code << (into[0] * i + into[1] * neighbour)
    return made
