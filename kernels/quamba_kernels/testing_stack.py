"""Cases of stacks of blocks; ``quamba_kernels.testing`` imports them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from quamba_kernels.ops.stack import BlockMemory, SsdBlock
from quamba_kernels.testing import F16, FLIPS, Case, _codes, _for, _normal, _scale, _stored
from quamba_kernels.testing_linear import weights

FLOAT_FLIPS = {torch.float16: 0.005, torch.bfloat16: 0.02}
"""Share of an int8 state's codes that may be off by one where activations are floats: one element of B or dt that is
rounded the other way moves all states that it meets. The torch body on a GPU is 0.0042 and 0.0155 off that on a CPU."""


class Sizes(NamedTuple):
    """Of a Mamba2 block: D, H, P, G, N, groups of the norm and Hadamard block as in the ops; S group size."""

    D: int
    H: int
    P: int
    G: int
    N: int
    norm_groups: int
    block: int
    S: int = 128

    def shape(self, linear: str, kind: torch.dtype) -> dict[str, int]:
        """As a backend is asked; kind: type of the state."""
        coded = int(linear != "linear_w4a16")
        size = 0 if linear == "linear_w8a8" else self.S
        return {
            **self._asdict(), "I": self.H * self.P, "W": 4, "S": size, "coded": coded, "codes": coded,
            "state_bits": 8 * kind.itemsize, "residual_bits": 32,
        }  # fmt: skip


def draw(
    linear: str, rng: torch.Generator, sizes: Sizes, dtype: torch.dtype, kind: torch.dtype, *, noisy: bool = False,
    static: bool = True, gains: bool = True,
) -> tuple[SsdBlock, BlockMemory]:  # fmt: skip
    """A block and what it remembers. dtype: of activations; kind: of the state; static: scales of the linears' inputs;
    gains: norms have weights, linears and the convolution biases."""
    D, H, P, G, N, groups, _, size = sizes
    inner, channels = H * P, H * P + 2 * G * N
    coded, outputs = linear != "linear_w4a16", 2 * inner + 2 * G * N + H
    state, state_scale = _stored(rng, kind, 1, H, P, N)
    if state_scale is not None:
        state_scale *= 0.3
    window = _codes(rng, 1, 3, channels) if coded else _normal(rng, 1, 3, channels, dtype=dtype)
    scales: dict[str, torch.Tensor | None] = dict.fromkeys(
        ("conv_in_scale", "conv_weight_scale", "conv_out_scale", "x_scale", "B_scale", "C_scale", "z_scale")
    )
    taps = _normal(rng, channels, 4, dtype=dtype) * 0.5
    if coded:
        taps = _codes(rng, channels, 4)
        scales = {
            "conv_in_scale": _scale(rng, 1), "conv_weight_scale": _scale(rng, channels) * 0.5,
            "conv_out_scale": _scale(rng, channels), "x_scale": _scale(rng, H, P), "B_scale": _scale(rng, G),
            "C_scale": _scale(rng, G), "z_scale": _scale(rng, 1),
        }  # fmt: skip
    block = SsdBlock(
        norm_weight=1 + 0.1 * _normal(rng, D, dtype=dtype) if gains else None,
        in_scale=torch.tensor([0.03]) if coded and static else None,
        in_weights=weights(linear, rng, outputs, D, size),
        in_bias=_normal(rng, outputs, dtype=dtype) * 0.1 if gains else None,
        conv_weight=taps, conv_bias=_normal(rng, channels, dtype=dtype) if gains else None,
        A=-torch.rand(H, generator=rng) * 2 - 0.1, D=_normal(rng, H), dt_bias=_normal(rng, H),
        gate_weight=1 + 0.1 * _normal(rng, inner, dtype=dtype) if groups else None, **scales,
        out_scale=torch.tensor([0.03]) if coded and static else None,
        out_weights=weights(linear, rng, D, inner, size),
        out_bias=_normal(rng, D, dtype=dtype) * 0.1 if gains else None,
    )  # fmt: skip
    return block, BlockMemory(window, state, state_scale, torch.tensor([11, 4]) if noisy else None)


@_for("ssd_stack")
def _ssd_stack(name: str, rng: torch.Generator, dtype: torch.dtype) -> Iterator[Case]:
    sizes = (  # of outputs of in_proj that are a multiple of 8, or no kernel takes them
        Sizes(256, 8, 32, 1, 128, 1, 256), Sizes(256, 40, 32, 4, 128, 5, 640), Sizes(1024, 16, 64, 1, 128, 0, 0),
        Sizes(256, 24, 32, 3, 128, 3, 768),
    )  # fmt: skip
    variants = ((F16, False, True), (torch.int8, True, True), (torch.int8, False, False))
    for i, made in enumerate(sizes):
        for j, linear in enumerate(("linear_w8a8", "linear_w4a8", "linear_w4a16")):
            kind, noisy, static = variants[(i + j) % len(variants)]
            how: dict[str, bool] = {"noisy": noisy, "static": static, "gains": j != 1}
            drawn = [draw(linear, rng, made, dtype, kind, **how) for _ in range(1 + i % 2)]
            blocks, memories = tuple(b for b, _ in drawn), tuple(m for _, m in drawn)
            options: dict[str, Any] = {
                "linear": linear, "eps": 1e-5, "gate_eps": 1e-6, "norm_groups": made.norm_groups, "block": made.block,
                "in_dtype": dtype, **({"dt_limit": (0.1, 0.8)} if i == 1 else {}),
            }  # fmt: skip
            x = _normal(rng, 1, made.D)
            label = f"{linear} {made} {len(drawn)} layers {kind} rng={noisy} static={static} {dtype}"
            flips = FLIPS if linear != "linear_w4a16" else FLOAT_FLIPS[dtype]
            yield Case(label, (x, blocks, memories), options, made.shape(linear, kind), dtype, 1, flips)
