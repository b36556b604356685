"""Cases of stacks of Mamba1 blocks; ``quamba_kernels.testing`` imports them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from quamba_kernels.ops.selective_stack import SelectiveBlock
from quamba_kernels.ops.stack import BlockMemory
from quamba_kernels.testing import F16, FLIPS, Case, _codes, _for, _normal, _scale, _stored
from quamba_kernels.testing_linear import weights
from quamba_kernels.testing_stack import FLOAT_FLIPS


class Sizes(NamedTuple):
    """Of a Mamba1 block: D, I, R rank of dt, N, Hadamard block as in the ops; S group size."""

    D: int
    I: int  # noqa: E741 (as the axis is called everywhere)
    R: int
    N: int
    block: int
    S: int = 128

    def shape(self, linear: str, kind: torch.dtype) -> dict[str, int]:
        """As a backend is asked; kind: type of the state."""
        coded = int(linear != "linear_w4a16")
        size = 0 if linear == "linear_w8a8" else self.S
        return {
            **self._asdict(), "W": 4, "S": size, "coded": coded, "codes": coded, "state_bits": 8 * kind.itemsize,
            "residual_bits": 32,
        }  # fmt: skip


def draw(
    linear: str, rng: torch.Generator, sizes: Sizes, dtype: torch.dtype, kind: torch.dtype, *, noisy: bool = False,
    static: bool = True, gains: bool = True,
) -> tuple[SelectiveBlock, BlockMemory]:  # fmt: skip
    """A block and what it remembers. dtype: of activations; kind: of the state; static: scales of the linears' inputs;
    gains: norms have weights, linears and the convolution biases."""
    D, inner, R, N, _, size = sizes
    coded = linear != "linear_w4a16"
    state, state_scale = _stored(rng, kind, 1, inner, N)
    if state_scale is not None:
        state_scale *= 0.3
    window = _codes(rng, 1, 3, inner) if coded else _normal(rng, 1, 3, inner, dtype=dtype)
    scales: dict[str, torch.Tensor | None] = dict.fromkeys(
        ("conv_in_scale", "conv_weight_scale", "conv_out_scale", "x_scale", "B_scale", "C_scale", "z_scale")
    )
    taps = _normal(rng, inner, 4, dtype=dtype) * 0.5
    if coded:
        taps = _codes(rng, inner, 4)
        x_scale = _scale(rng, 1)
        scales = {
            "conv_in_scale": _scale(rng, inner if static else 1), "conv_weight_scale": _scale(rng, inner) * 0.5,
            "conv_out_scale": x_scale.expand(inner).contiguous(), "x_scale": x_scale, "B_scale": _scale(rng, 1),
            "C_scale": _scale(rng, 1), "z_scale": _scale(rng, inner if static else 1),
        }  # fmt: skip
    block = SelectiveBlock(
        norm_weight=1 + 0.1 * _normal(rng, D, dtype=dtype) if gains else None,
        in_scale=torch.tensor([0.03]) if coded and static else None,
        in_weights=weights(linear, rng, 2 * inner, D, size),
        in_bias=_normal(rng, 2 * inner, dtype=dtype) * 0.1 if gains else None,
        conv_weight=taps, conv_bias=_normal(rng, inner, dtype=dtype) if gains else None,
        x_weights=weights(linear, rng, R + 2 * N, inner, size),
        dt_weights=weights("linear_w8a8", rng, inner, R, size), dt_bias=_normal(rng, inner, dtype=dtype),
        A=-torch.rand(inner, N, generator=rng) * 2 - 0.1, D=_normal(rng, inner), **scales,
        out_scale=torch.tensor([0.03]) if coded and static else None,
        out_weights=weights(linear, rng, D, inner, size),
        out_bias=_normal(rng, D, dtype=dtype) * 0.1 if gains else None,
    )  # fmt: skip
    return block, BlockMemory(window, state, state_scale, torch.tensor([11, 4]) if noisy else None)


@_for("selective_stack")
def _selective_stack(name: str, rng: torch.Generator, dtype: torch.dtype) -> Iterator[Case]:
    sizes = Sizes(256, 512, 16, 16, 512), Sizes(256, 1280, 20, 16, 640), Sizes(1024, 1024, 64, 16, 0)
    variants = ((F16, False, True), (torch.int8, True, True), (torch.int8, False, False))
    for i, made in enumerate(sizes):
        for j, linear in enumerate(("linear_w8a8", "linear_w4a8", "linear_w4a16")):
            kind, noisy, static = variants[(i + j) % len(variants)]
            drawn = [
                draw(linear, rng, made, dtype, kind, noisy=noisy, static=static, gains=j != 1) for _ in range(1 + i % 2)
            ]
            blocks, memories = tuple(b for b, _ in drawn), tuple(m for _, m in drawn)
            options: dict[str, Any] = {"linear": linear, "eps": 1e-5, "block": made.block, "in_dtype": dtype}
            x = _normal(rng, 1, made.D)
            label = f"{linear} {made} {len(drawn)} layers {kind} rng={noisy} static={static} {dtype}"
            flips = FLIPS if linear != "linear_w4a16" else FLOAT_FLIPS[dtype]
            yield Case(label, (x, blocks, memories), options, made.shape(linear, kind), dtype, 1, flips)
