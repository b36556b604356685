"""What a backend of selective_prefill must agree with."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quamba_kernels.testing import TOKENS, Case, _codes, _for, _normal, _scale


@_for("selective_prefill")
def _selective_prefill(name: str, rng: torch.Generator, dtype: torch.dtype) -> Iterator[Case]:
    N = 16
    for i, ((batch, tokens), (inner, rank)) in enumerate(
        zip(TOKENS, ((48, 32), (96, 160), (168, 64), (80, 96)), strict=True)
    ):
        A, D = -torch.rand(inner, N, generator=rng) * 2 - 0.1, _normal(rng, inner)
        for coded in (True, False):
            x, scales = _normal(rng, batch, tokens, inner, dtype=dtype), {}
            if coded:
                x = _codes(rng, batch, tokens, inner)
                scales = {"x_scale": _scale(rng, inner if i % 2 else 1), "B_scale": _scale(rng, 1),
                          "C_scale": _scale(rng, 1)}  # fmt: skip
            projected = _normal(rng, batch, tokens, rank + 2 * N, dtype=dtype)
            projected[0, 0] = 0
            weights = _codes(rng, inner, rank), torch.rand(inner, generator=rng) * 2e-3
            bias = _normal(rng, inner, dtype=dtype) - 2 if i % 2 else None
            state = _normal(rng, batch, inner, N) if coded else None
            z = _normal(rng, batch, tokens, inner, dtype=dtype)
            if coded:
                scales["z_scale"] = _scale(rng, 1 if i % 2 else inner)
            if i == 2:
                z = _codes(rng, batch, tokens, inner) if coded else z.float()
            given = (x, projected, weights, bias, A, D, z, state)
            shape = {"I": inner, "N": N, "R": rank}
            yield Case(f"{batch}x{tokens} I={inner} R={rank} int8={coded} {dtype}", given,
                       {**scales, "out_dtype": dtype}, shape, dtype)  # fmt: skip
