"""What a backend of ssd_prefill must agree with."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quamba_kernels.testing import TOKENS, Case, _codes, _for, _normal, _scale

P, N, W = 64, 128, 4


@_for("ssd_prefill")
def _ssd_prefill(name: str, rng: torch.Generator, dtype: torch.dtype) -> Iterator[Case]:
    for i, ((batch, tokens), (H, G)) in enumerate(zip(TOKENS, ((2, 1), (4, 2), (3, 1), (5, 1)), strict=True)):
        channels = H * P + 2 * G * N
        for coded in (True, False):
            mixed = _normal(rng, batch, tokens, channels, dtype=dtype)
            dt = _normal(rng, batch, tokens, H, dtype=dtype) * 2 - 3
            A, D = -torch.rand(H, generator=rng) * 4 - 0.01, _normal(rng, H)
            bias, stateful = _normal(rng, channels, dtype=dtype) if i % 2 else None, i != 2
            options = {"groups": G, "d_state": N, "out_dtype": dtype}
            if coded:
                weight, kept = _codes(rng, channels, W), _codes(rng, batch, W - 1, channels)
                columns = [_scale(rng, G), _scale(rng, G)]
                x_scale = _scale(rng, H, P)
                out_scale = torch.cat([x_scale.flatten(), *(c.repeat_interleave(N) for c in columns)])
                options |= {
                    "conv_in_scale": _scale(rng, channels), "conv_weight_scale": _scale(rng, channels),
                    "conv_out_scale": out_scale, "x_scale": x_scale, "B_scale": columns[0], "C_scale": columns[1],
                }  # fmt: skip
            else:
                weight = _normal(rng, channels, W, dtype=dtype)
                kept = _normal(rng, batch, W - 1, channels, dtype=dtype)
            state = _normal(rng, batch, H, P, N) if stateful else None
            given = (mixed, dt, weight, bias, kept if stateful else None, A, D, _normal(rng, H) - 2, state)
            shape = {"H": H, "P": P, "G": G, "N": N, "W": W}
            yield Case(f"{batch}x{tokens} H={H} G={G} int8={coded} {dtype}", given, options, shape, dtype)
