"""Cases of the linears; ``quamba_kernels.testing`` imports them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from quamba_kernels.testing import F16, F32, Case, _codes, _for, _normal, _scale

ZEROS = -0x77777778
"""A word of eight int4 zeros."""
LINEARS = (
    (1, 64, 48), (3, 384, 32), (8, 1536, 16), (9, 1152, 80), (2, 3200, 16), (33, 256, 64),
    (17, 72, 24), (63, 96, 40), (129, 40, 8),
)  # fmt: skip
"""Rows, in features and out features: from 1152 on products of +-127 pass 2^24, where fp32 ceases to be exact."""
LONG = 1000
"""In features beyond which a linear has no fp16 case: one type less of the slowest."""


def _words(rng: torch.Generator, rows: int, features: int, lowest: int) -> torch.Tensor:
    """int4 codes from ``lowest`` to 7, packed."""
    nibbles = torch.randint(lowest + 8, 16, (rows, features // 8, 8), generator=rng, dtype=torch.int32)
    return (nibbles << torch.arange(0, 32, 4, dtype=torch.int32)).sum(-1, dtype=torch.int32)


def _low_bit(name: str, rng: torch.Generator, features: int, outputs: int) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Group size and canonical weights."""
    if name == "linear_w8a8":
        codes = _codes(rng, outputs, features)
        codes[:4] = _codes(rng, 4, features, low=120)
        codes[-1] = 0
        yield features, (codes, _scale(rng, outputs))
    for size in [] if name == "linear_w8a8" else [s for s in (32, 128, features) if features % s == 0]:
        shape = outputs, features // size
        words = _words(rng, outputs, features, -7 if name == "linear_w4a8" else -8)
        words[-1, : size // 8] = ZEROS
        if name == "linear_w4a8":
            yield size, (words, _codes(rng, *shape, low=1, high=17), _scale(rng, outputs))
        else:
            signs = torch.randint(0, 2, shape, generator=rng) * 2 - 1
            yield size, (words, (_scale(rng, *shape) * signs).half())


def weights(linear: str, rng: torch.Generator, outputs: int, features: int, size: int) -> tuple[torch.Tensor, ...]:
    """Canonical weights whose products with unit inputs have about unit variance."""
    if linear == "linear_w8a8":
        scale = (torch.rand(outputs, generator=rng) + 0.5) / (73 * math.sqrt(features))
        return _codes(rng, outputs, features), scale
    shape = outputs, features // size
    if linear == "linear_w4a8":
        scale = (torch.rand(outputs, generator=rng) + 0.5) / (43 * math.sqrt(features))
        return _words(rng, outputs, features, -7), _codes(rng, *shape, low=1, high=17), scale
    scale = (torch.rand(shape, generator=rng) + 0.5) / (4.6 * math.sqrt(features))
    return _words(rng, outputs, features, -8), scale.half()


@_for("linear_w8a8", "linear_w4a8", "linear_w4a16")
def _linear(name: str, rng: torch.Generator, dtype: torch.dtype) -> Iterator[Case]:
    int8 = name != "linear_w4a16"
    for rows, features, outputs in LINEARS:
        if dtype == F16 and features > LONG:
            continue
        for size, weights in _low_bit(name, rng, features, outputs):
            lead = (rows,) if rows % 3 else (3, rows // 3)
            shape = {"K": features, "O": outputs, "S": size}
            x = _codes(rng, *lead, features) if int8 else _normal(rng, *lead, features, dtype=dtype)
            x[..., -1, :] = 127  # the largest sums; a row of them also saturates an int8 output
            scale: Any = (torch.tensor([0.02]) if rows % 2 else _scale(rng, *lead, 1),) if int8 else ()
            bias, residual = _normal(rng, outputs, dtype=dtype), _normal(rng, *lead, outputs)
            extra = (bias, residual) if rows % 3 == 0 else (None, None)
            label = f"{rows} rows K={features} O={outputs} S={size} {dtype}"
            at = 2 if int8 else 1
            yield Case(label, (x, *scale, weights, *extra), {"out_dtype": dtype}, shape, dtype, at)
            if int8 or dtype == F32:  # sums of bf16 products are off by more than a code
                out = {"out_scale": _scale(rng, outputs)}
                yield Case(f"int8 out {label}", (x, *scale, weights), out, shape, dtype, at)


@_for("norm_linear")
def _norm_linear(name: str, rng: torch.Generator, dtype: torch.dtype) -> Iterator[Case]:
    for rows, features, outputs in ((1, 256, 48), (2, 640, 16), (3, 384, 24)):
        for linear in ("linear_w8a8", "linear_w4a8", "linear_w4a16"):
            if linear == "linear_w4a16" and dtype == F32:
                continue  # what it multiplies has 16 bits
            *_, (size, weights) = _low_bit(linear, rng, features, outputs)
            x = _normal(rng, rows, features, dtype=F32 if rows == 2 else dtype)
            gain = _normal(rng, features, dtype=dtype) if rows % 2 else None
            into: dict[str, Any] = {"in_dtype": dtype}
            if linear != "linear_w4a16":
                into |= {"per_token": True} if rows == 2 else {"in_scale": torch.tensor([0.02])}
            residual = _normal(rng, rows, outputs) if rows != 3 else None
            options = {"linear": linear, "out_dtype": dtype, **into}
            label = f"{linear} {rows} rows K={features} O={outputs} S={size} {dtype}"
            shape = {"K": features, "O": outputs, "S": size}
            yield Case(label, (x, gain, 1e-5, weights, None, residual), options, shape, dtype, 3)
