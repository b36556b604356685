"""The vocabulary in which an architecture describes itself: axes, tensors, projections, scan inputs, output.

The engine never mentions an architecture. What may be rotated or permuted is derived from these facts
(quamba.transforms.legality), not declared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from quamba.errors import UserError

Segment = tuple[str, ...]
"""Axes whose sizes multiply to one stretch of a tensor dimension, slowest first: ("head", "value")."""

Layout = tuple[tuple[Segment, ...], ...]
"""For each dimension of a tensor, the segments that lie one after the other along it."""


@dataclass(frozen=True)
class Axis:
    """A named channel axis. Tensors that carry it are permuted together.

    share: the axis inside whose members permutations may move ("group": heads stay in their state group);
    fixed: the order carries meaning, so the axis is never permuted on its own.
    """

    name: str
    size: int
    share: str | None = None
    fixed: bool = False


@dataclass(frozen=True)
class Param:
    """One tensor of a sublayer, by its path below the mixer, with the axes of every dimension."""

    path: str
    layout: Layout


@dataclass(frozen=True)
class Output:
    """A stretch of a projection's outputs. post: the elementwise or channel-wise steps before its consumer."""

    name: str
    segment: Segment
    post: tuple[str, ...] = ()


@dataclass(frozen=True)
class Proj:
    """One linear, in the order of execution. reads: the name of what it consumes ("residual" or a scan input)."""

    role: str
    path: str
    reads: str
    input: Segment
    outputs: tuple[Output, ...]
    bias: bool = False


@dataclass(frozen=True)
class ScanInput:
    """What enters the recurrence, and how it may become int8: groups are axes that get a scale of their own."""

    name: str
    role: str
    axes: tuple[str, ...]
    semantics: Literal["value", "key", "query", "rate"]


@dataclass(frozen=True)
class Scan:
    """The recurrence. decay: one number per head, or one per channel and state ("diagonal")."""

    family: str
    decay: Literal["scalar", "diagonal"]


@dataclass(frozen=True)
class OutSite:
    """Between scan and out_proj: gate, then norm (with its gain's path below the mixer), then the online rotation."""

    gate: str | None
    norm: Literal["rms"] | None
    norm_groups: int = 0
    norm_weight: str | None = None
    role: str = "out_proj"


@dataclass(frozen=True)
class MixerSpec:
    """A recurrent mixer. sizes: by the letters of quamba_kernels.ops (D, I, H, P, G, N, W) and R for dt_rank."""

    path: str
    axes: dict[str, Axis]
    params: tuple[Param, ...]
    projs: tuple[Proj, ...]
    inputs: tuple[ScanInput, ...]
    scan: Scan
    out: OutSite
    sizes: dict[str, int]
    conv_bias: bool = True
    dt_limit: tuple[float, float] = (0.0, float("inf"))

    def proj(self, role: str) -> Proj:
        """The projection of that role."""
        return next(p for p in self.projs if p.role == role)


@dataclass(frozen=True)
class Sublayer:
    """Residual + mixer(norm(residual)); norm is a path below the block."""

    norm: str
    mixer: MixerSpec
    norm_kind: Literal["rms", "layer"] = "rms"
    residual_weighted: bool = False


@dataclass(frozen=True)
class BlockSpec:
    """One block of the model: its path and its sublayers in order."""

    path: str
    sublayers: tuple[Sublayer, ...]


@dataclass(frozen=True)
class ModelSpec:
    """A whole model: where the residual stream begins, its blocks, where it ends."""

    d_model: int
    vocab: int
    eps: float
    embedding: str
    blocks: tuple[BlockSpec, ...]
    final_norm: str
    head: str
    residual_fp32: bool = True


@dataclass(frozen=True)
class Architecture:
    """One file in quamba.models. describe reads a config strictly; tiny is a config that the tests build.

    renames: (old, new) substrings of tensor names found in older checkpoints of the same architecture.
    """

    model_type: str
    describe: Callable[[Any], ModelSpec]
    tiny: tuple[dict[str, Any], ...]
    renames: tuple[tuple[str, str], ...] = field(default=())


def require(config: Any, name: str, *allowed: Any) -> None:
    """Raises UserError unless the config's value is one of ``allowed``."""
    value = getattr(config, name)
    if value not in allowed:
        wanted = " or ".join(repr(a) for a in allowed)
        raise UserError(f"{config.model_type} config has {name}={value!r}; supported is {wanted}")
