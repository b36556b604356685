"""The linears of three published models, and random low-bit weights and activations for them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from quamba_kernels import ops

GROUP = 128
OPS = ("linear_w8a8", "linear_w4a8", "linear_w4a16")
FP16 = "fp16"
"""The dense product that the low-bit ones are compared with; measured once for each shape."""
ROWS = (1, 4, 16, 64, 256, 2048, 8192)
SAMPLE = 64
"""Rows of x beyond which the reference is computed for a sample of them: rows do not depend on one another."""


class Shape(NamedTuple):
    """A linear of a model: K in features, O out features."""

    model: str
    role: str
    K: int
    O: int


SHAPES = (
    Shape("mamba2-2.7b", "in_proj", 2560, 10576),
    Shape("mamba2-2.7b", "out_proj", 5120, 2560),
    Shape("mamba2-2.7b", "lm_head", 2560, 50288),
    Shape("mamba1-2.8b", "in_proj", 2560, 10240),
    Shape("mamba1-2.8b", "x_proj", 5120, 192),
    Shape("mamba1-2.8b", "out_proj", 5120, 2560),
    Shape("mamba1-2.8b", "lm_head", 2560, 50280),
    Shape("mamba2-8b", "in_proj", 4096, 18560),
    Shape("mamba2-8b", "out_proj", 8192, 4096),
    Shape("mamba2-8b", "lm_head", 4096, 256000),
)
LONG_PROMPT = 2048
"""Rows from which lm_head is left out unless asked for: a prompt needs the logits of its last token alone."""


class Inputs(NamedTuple):
    """x [M, K], int8 with scale fp32 [M, 1], or fp16 with scale None."""

    x: torch.Tensor
    scale: torch.Tensor | None


@dataclass(frozen=True)
class Problem:
    """One shape in one format, with one copy of canonical weights (as in ``ops.linear``; fp16 [O, K] for FP16)."""

    shape: Shape
    op: str
    weights: tuple[torch.Tensor, ...]

    @property
    def group(self) -> int:
        """S, the number of in features that share a factor."""
        return GROUP if self.op in ("linear_w4a8", "linear_w4a16") else self.shape.K

    @property
    def weight_bytes(self) -> int:
        """Bytes of the canonical weights with their scales, which every implementation must read."""
        return sum(w.numel() * w.element_size() for w in self.weights)


def weight_bytes(shape: Shape, op: str) -> int:
    """Bytes of a problem's weights, before there are any."""
    cells, groups = shape.K * shape.O, shape.K // GROUP * shape.O
    return {FP16: 2 * cells, "linear_w8a8": cells + 4 * shape.O, "linear_w4a8": cells // 2 + groups + 4 * shape.O,
            "linear_w4a16": cells // 2 + 2 * groups}[op]  # fmt: skip


def problem(shape: Shape, op: str, device: str, rng: torch.Generator) -> Problem:
    """Fresh random weights of one shape in one format; outputs stay far inside the range of fp16."""
    K, outputs = shape.K, shape.O

    def uniform(*size: int, low: float, high: float) -> torch.Tensor:
        return torch.rand(size, generator=rng, device=device) * (high - low) + low

    def words(lowest: int) -> torch.Tensor:
        packed = torch.zeros(outputs, K // 8, dtype=torch.int32, device=device)
        for nibble in range(8):
            code = torch.randint(lowest + 8, 16, packed.shape, generator=rng, device=device, dtype=torch.int32)
            packed |= code << 4 * nibble
        return packed

    size = K**-0.5
    if op == FP16:
        weights: tuple[torch.Tensor, ...] = (torch.randn(outputs, K, generator=rng, device=device).mul_(size).half(),)
    elif op == "linear_w8a8":
        codes = torch.randint(-127, 128, (outputs, K), generator=rng, device=device, dtype=torch.int8)
        weights = codes, uniform(outputs, low=0.75, high=1.25) * size / 73
    elif op == "linear_w4a8":
        m = torch.randint(1, 18, (outputs, K // GROUP), generator=rng, device=device, dtype=torch.int8)
        weights = words(-7), m, uniform(outputs, low=0.75, high=1.25) * size / 40
    else:
        weights = words(-8), (uniform(outputs, K // GROUP, low=0.75, high=1.25) * size / 4.6).half()
    return Problem(shape, op, weights)


def inputs(K: int, rows: int, op: str, device: str, rng: torch.Generator) -> Inputs:
    """Fresh random activations of standard deviation near 1."""
    if op in (FP16, "linear_w4a16"):
        return Inputs(torch.randn(rows, K, generator=rng, device=device).half(), None)
    codes = torch.randint(-127, 128, (rows, K), generator=rng, device=device, dtype=torch.int8)
    return Inputs(codes, torch.rand(rows, 1, generator=rng, device=device) * 0.01 + 0.008)


def sampled(rows: int) -> torch.Tensor:
    """Row numbers that are compared: all of a few, else the ends and an even spread between them."""
    return torch.arange(rows) if rows <= SAMPLE else torch.linspace(0, rows - 1, SAMPLE).round().long()


def reference(given: Problem, x: Inputs) -> torch.Tensor:
    """fp32 [len(sampled), O]: the torch body of the op on the sampled rows."""
    at = sampled(x.x.shape[0]).to(x.x.device)
    codes, scale = x.x[at], None if x.scale is None else x.scale[at]
    if given.op == FP16:
        return codes.float() @ given.weights[0].float().T
    arguments = (codes,) if scale is None else (codes, scale)
    op = getattr(ops, given.op)
    # in slabs of out features: the body works in fp64, eight times the bytes of an int8 head
    slabs: Iterable[tuple[torch.Tensor, ...]] = zip(*(w.split(32768) for w in given.weights), strict=True)
    return torch.cat([op(*arguments, weights) for weights in slabs], -1)
