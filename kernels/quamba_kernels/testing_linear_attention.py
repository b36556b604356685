"""Cases of the scans of linear attention; ``quamba_kernels.testing`` imports them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from quamba_kernels.testing import F16, F32, STATES, TOKENS, Case, _codes, _for, _normal, _scale, _stored


def _scan_case(
    name: str, rng: torch.Generator, dtype: torch.dtype, j: int, tokens: dict[str, Any], state: tuple[int, ...],
    fixed: tuple[Any, ...], options: dict[str, Any], label: str, shape: dict[str, int],
) -> Case:  # fmt: skip
    """Arguments of a scan or an update over ``tokens``, in order: tensors in fp32, or int8 with their scale."""
    scales = {f"{key}_scale": t[1] for key, t in tokens.items() if isinstance(t, tuple)}
    data = [t[0] if isinstance(t, tuple) else t if t is None else t.to(dtype) for t in tokens.values()]
    options = {**options, **scales, "out_dtype": dtype}
    if name.endswith("_scan"):
        before = _normal(rng, *state) if j % 2 else None
        return Case(f"{label} state={j % 2} {dtype}", (*data, *fixed, before), options, shape, dtype)
    kind = F32 if STATES[j][0] == F16 and dtype == F32 else STATES[j][0]  # one fp16 tie exceeds the tolerance of fp32
    stored, scale = _stored(rng, kind, *state)
    noise = torch.tensor([11, 4]) if STATES[j][1] else None
    label = f"{label} {kind} rng={STATES[j][1]} {dtype}"
    return Case(label, (stored, scale, noise, *data, *fixed), options, shape, dtype)


@_for("gla_scan", "gla_update", "delta_scan", "delta_update", "dplr_scan", "dplr_update")
def _matrix_state(name: str, rng: torch.Generator, dtype: torch.dtype) -> Iterator[Case]:
    kind = name.partition("_")[0]
    sizes = ((4, 16, 4, 8, 1), (4, 24, 2, 16, 1), (6, 16, 6, 8, 2), (3, 16, 1, 16, 1))  # H P G N M
    for i, ((batch, tokens), (H, P, G, N, M)) in enumerate(zip(TOKENS, sizes, strict=True)):
        T = (tokens,) if name.endswith("_scan") else ()
        heads = H if kind == "dplr" else G
        steps = (M,) if kind == "delta" else ()
        shapes = {"q": (heads, N), "k": (*steps, heads, N), "v": (*steps, H, P)}
        for j in range(4) if dtype == F32 else (1, 2):
            floats = {key: _normal(rng, batch, *T, *s) / (N**0.5 if key != "v" else 1) for key, s in shapes.items()}
            codes = {key: (_codes(rng, batch, *T, *s), _scale(rng, *((H, P) if key == "v" else (heads,))) / 4)
                     for key, s in shapes.items()}  # fmt: skip
            given: dict[str, Any] = dict(codes if j > 1 else floats)
            decay = -torch.rand(batch, *T, H, 1 if (i + j) % 2 and kind != "dplr" else N, generator=rng)
            if j == 3:
                decay = decay * 60  # far below what fp32 can invert
            fixed: tuple[Any, ...] = ()
            options: dict[str, Any] = {} if kind == "dplr" else {"scale": 0.5}
            if kind == "delta":
                given["beta"] = torch.rand(batch, *T, M, H, generator=rng) * 2
                given["g"] = None if j == 0 else decay
                options["norm_eps"] = 1e-6 if j else None
            else:
                given["g"] = decay
            if kind == "dplr":
                a = torch.nn.functional.normalize(_normal(rng, batch, *T, H, N), dim=-1)
                given |= {"a": -a, "b": a * torch.rand(batch, *T, H, N, generator=rng)}
            if kind not in ("delta", "dplr"):
                fixed = (_normal(rng, H, N) if j % 3 == 0 else None,)
            label = f"{batch}x{tokens if T else 1} H={H} P={P} G={heads} N={N} M={M} int8={j > 1}"
            shape = {"H": H, "P": P, "G": heads, "N": N, "M": M}
            yield _scan_case(name, rng, dtype, j, given, (batch, H, P, N), fixed, options, label, shape)


@_for("elementwise_scan", "elementwise_update")
def _elementwise(name: str, rng: torch.Generator, dtype: torch.dtype) -> Iterator[Case]:
    for (batch, tokens), inner in zip(TOKENS, (48, 20, 7, 96), strict=True):
        T = (tokens,) if name.endswith("_scan") else ()
        for j in range(4):
            x: Any = _normal(rng, batch, *T, inner)
            if j > 1:
                x = _codes(rng, batch, *T, inner), _scale(rng, inner if j == 2 else 1)
            given = {"x": x, "g": -torch.rand(batch, *T, inner, generator=rng)}
            label = f"{batch}x{tokens if T else 1} I={inner} int8={j > 1}"
            yield _scan_case(name, rng, dtype, j, given, (batch, inner), (), {}, label, {"I": inner})
