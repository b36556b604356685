"""Cases of the decode steps; ``quamba_kernels.testing`` imports them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from quamba_kernels.testing import STATES, Case, _codes, _for, _normal, _scale, _stored


@_for("conv_decode")
def _conv_decode(name: str, rng: torch.Generator, dtype: torch.dtype) -> Iterator[Case]:
    for batch, channels in ((1, 40), (3, 320)):
        x, bias = _normal(rng, batch, channels, dtype=dtype), _normal(rng, channels, dtype=dtype)
        x[0, :3] = 1e4  # saturates
        floats = (x, _normal(rng, batch, 3, channels, dtype=dtype), _normal(rng, channels, 4, dtype=dtype), None)
        label = f"{batch}x{channels} {dtype}"
        yield Case(f"float {label}", floats, {"out_dtype": dtype}, {"W": 4}, dtype)
        for count, out in ((1, {"out_dtype": dtype}), (channels, {"out_scale": _scale(rng, channels)})):
            codes = (x, _codes(rng, batch, 3, channels), _codes(rng, channels, 4), bias)
            scales = {"in_scale": _scale(rng, count), "weight_scale": _scale(rng, channels) * 0.2}
            yield Case(f"int8 {next(iter(out))} {label}", codes, {**scales, **out}, {"W": 4}, dtype)


_DECODE_OUTS: tuple[dict[str, Any], ...] = ({}, {"out_scale": torch.tensor([0.02])}, {"per_token": True})


@_for("ssd_decode")
def _ssd_decode(name: str, rng: torch.Generator, dtype: torch.dtype) -> Iterator[Case]:
    sizes = (  # B H P G N, groups of the norm, Hadamard block
        (1, 2, 32, 1, 16, 1, 64), (5, 8, 64, 8, 64, 8, 512), (2, 10, 64, 1, 128, 1, 640), (3, 3, 128, 1, 256, 0, 384),
        (4, 16, 32, 8, 128, 2, 32), (1, 80, 64, 1, 128, 1, 5120), (2, 28, 64, 1, 16, 1, 1792),
        (3, 36, 64, 2, 16, 2, 2304), (2, 12, 32, 1, 16, 1, 0), (1, 160, 64, 1, 16, 1, 10240),
    )  # fmt: skip
    for i, (batch, H, P, G, N, groups, block) in enumerate(sizes):
        inner, channels = H * P, H * P + 2 * G * N
        A, D, bias = -torch.rand(H, generator=rng) * 2 - 0.1, _normal(rng, H), _normal(rng, H)
        for j, (kind, noisy) in enumerate(STATES):
            if H >= 80 and j % 2:
                continue
            int8 = j > 1
            projected = _normal(rng, batch, inner + channels + H, dtype=dtype)
            state, scale = _stored(rng, kind, batch, H, P, N)
            conv = (_codes(rng, channels, 4), _normal(rng, channels, dtype=dtype) if i % 2 else None)
            window = _codes(rng, batch, 3, channels)
            scales: dict[str, Any] = {
                "conv_in_scale": _scale(rng, channels if i else 1), "conv_weight_scale": _scale(rng, channels) * 0.2,
                "conv_out_scale": _scale(rng, channels), "x_scale": _scale(rng, H, P), "B_scale": _scale(rng, G),
                "C_scale": _scale(rng, G), "z_scale": _scale(rng, inner if i % 2 else 1),
            }  # fmt: skip
            if not int8:
                scales, window = {}, _normal(rng, batch, 3, channels, dtype=dtype)
                conv = (_normal(rng, channels, 4, dtype=dtype) * 0.5, conv[1])
            weight = _normal(rng, inner, dtype=dtype) if groups else None
            noise = torch.tensor([11, 4]) if noisy else None
            options = {**scales, "norm_groups": groups, "block": block, "out_dtype": dtype,
                       **({"dt_limit": (0.1, 0.8)} if (i + j) % 2 else {}), **_DECODE_OUTS[(i + j) % 3]}  # fmt: skip
            label = f"B={batch} H={H} P={P} G={G} N={N} groups={groups} block={block} {kind} rng={noisy} {dtype}"
            shape = {"H": H, "P": P, "G": G, "N": N, "W": 4, "norm_groups": groups, "block": block}
            given = (projected, window, state, scale, noise, *conv, A, D, bias if j else None, weight, 1e-5)
            yield Case(label, given, options, shape, dtype)


@_for("selective_decode")
def _selective_decode(name: str, rng: torch.Generator, dtype: torch.dtype) -> Iterator[Case]:
    N = 16
    for i, (batch, inner, block) in enumerate(((1, 64, 64), (5, 96, 12), (3, 192, 0), (2, 1280, 1280))):
        A, D, bias = -torch.rand(inner, N, generator=rng) * 2 - 0.1, _normal(rng, inner), _normal(rng, inner)
        for j, (kind, noisy) in enumerate(STATES):
            state, scale = _stored(rng, kind, batch, inner, N)
            x, scales = _normal(rng, batch, inner, dtype=dtype), {}
            if j > 1:
                x = _codes(rng, batch, inner)
                scales = {"x_scale": _scale(rng, inner if i % 2 else 1), "B_scale": _scale(rng, 1),
                          "C_scale": _scale(rng, 1), "z_scale": _scale(rng, 1 if i % 2 else inner)}  # fmt: skip
            z, dt = _normal(rng, batch, inner, dtype=dtype), _normal(rng, batch, inner, dtype=dtype)
            B, C = _normal(rng, batch, 8 + 2 * N, dtype=dtype).split([8 + N, N], -1)
            noise = torch.tensor([11, 4]) if noisy else None
            given = (z, state, scale, noise, x, dt, A, B[:, 8:], C, D, bias if i else None)
            options = {**scales, "block": block, "out_dtype": dtype, **_DECODE_OUTS[(i + j) % 3]}
            label = f"B={batch} I={inner} block={block} {kind} rng={noisy} {dtype}"
            yield Case(label, given, options, {"I": inner, "N": N, "block": block}, dtype)
