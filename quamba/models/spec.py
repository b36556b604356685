"""The vocabulary in which an architecture describes itself: axes, tensors, projections, scan inputs, output.

The engine never mentions an architecture. What may be rotated or permuted is derived from these facts
(quamba.transforms.legality), not declared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
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
    """A stretch of a projection's outputs. post: the elementwise or channel-wise steps before its consumer; a step
    "rms" is an RMS norm over the stretch, whose gain lies at ``gain`` below the mixer (None: it has none). factor: a
    constant that multiplies the stretch in the original; quamba's own mixers have it in the weight. within: the outputs
    that lie one after the other in every member of the stretch's first axis."""

    name: str
    segment: Segment
    post: tuple[str, ...] = ()
    gain: str | None = None
    factor: float = 1.0
    within: tuple[Output, ...] = ()


@dataclass(frozen=True)
class Proj:
    """One linear, in the order of execution. reads: the name of what it consumes ("residual" or a scan input).

    stack: the axis of experts along the weight's first dimension; the path is the weight's own then. keep: small and
    decisive (a router, the rate of a gate), so it stays in the checkpoint's type unless a recipe names its role.
    """

    role: str
    path: str
    reads: str
    input: Segment
    outputs: tuple[Output, ...]
    bias: bool = False
    stack: str | None = None
    keep: bool = False

    @property
    def weight(self) -> str:
        """Path of the weight below the mixer."""
        return self.path if self.stack else f"{self.path}.weight"

    @property
    def parts(self) -> tuple[Output, ...]:
        """Its outputs, those within others in their place."""
        return tuple(part for output in self.outputs for part in output.within or (output,))


@dataclass(frozen=True)
class ScanInput:
    """What enters the recurrence, and how it may become int8: groups are axes that get a scale of their own. at: where
    transformers' own code hands it on: the path of a module below the mixer and the argument that it is of its call,
    None for what the module returns."""

    name: str
    role: str
    axes: tuple[str, ...]
    semantics: Literal["value", "key", "query", "rate"]
    at: tuple[str, str | None] | None = None


@dataclass(frozen=True)
class Scan:
    """What mixes the tokens. decay: one number per head, or one per channel and state ("diagonal"). Softmax attention
    forgets nothing: to rotations of its keys it is a scan with a scalar decay."""

    family: str
    decay: Literal["scalar", "diagonal"]

    @property
    def recurrent(self) -> bool:
        """Whether a state is all that is kept of the tokens so far."""
        return self.family != "softmax"


@dataclass(frozen=True)
class OutSite:
    """Before the projection back into the residual stream: gate, then norm (with its gain's path below the mixer), then
    the online rotation."""

    gate: str | None
    norm: str | None
    norm_groups: int = 0
    norm_weight: str | None = None
    role: str = "out_proj"


@dataclass(frozen=True)
class MixerSpec:
    """What a sublayer does between its norm and the residual sum: a recurrent mixer, attention, an MLP, experts.

    sizes: of a recurrent mixer, by the letters of quamba_kernels.ops (D, I, H, P, G, N, W) and R for dt_rank;
    eps: of the norms inside the mixer, None for the model's.
    """

    path: str
    axes: dict[str, Axis]
    params: tuple[Param, ...]
    projs: tuple[Proj, ...]
    inputs: tuple[ScanInput, ...] = ()
    scan: Scan | None = None
    out: OutSite | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    conv_bias: bool = True
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    eps: float | None = None

    def proj(self, role: str) -> Proj:
        """The projection of that role."""
        return next(p for p in self.projs if p.role == role)

    def name(self, path: str) -> str:
        """A path below the mixer as a path below the block."""
        return f"{self.path}.{path}" if self.path else path

    def size(self, segment: Segment) -> int:
        """Channels of a segment."""
        return prod(self.axes[name].size for name in segment)

    def rows(self, proj: Proj, name: str) -> list[int]:
        """The rows of a projection that give the output of a name; none where it gives no such."""
        start = 0
        for output in proj.outputs:
            size = self.size(output.segment)
            if output.name == name:
                return list(range(start, start + size))
            outer, offset = self.axes[output.segment[0]].size, 0
            for part in output.within:
                own = self.size(part.segment)
                if part.name == name:
                    firsts = range(start + offset, start + size, size // outer)
                    return [first + row for first in firsts for row in range(own)]
                offset += own
            start += size
        return []

    @property
    def out_proj(self) -> Proj | None:
        """The projection whose input is rotated online, where there is one."""
        return None if self.out is None else self.proj(self.out.role)

    def shape(self, param: Param) -> tuple[int, ...]:
        """The shape that a tensor must have."""
        return tuple(sum(self.size(segment) for segment in segments) for segments in param.layout)


@dataclass(frozen=True)
class Sublayer:
    """Residual + mixer(norm(residual)). norm: a path below the block, None where the mixer reads the stream itself;
    sublayers side by side share one norm.

    gain_offset: what is added to the stored gain; residual_weighted: something per channel stands between the mixer
    and the sum (a norm with a gain, a learned weight). norm_bias: whether a layer norm has a shift.
    """

    norm: str | None
    mixer: MixerSpec
    norm_kind: Literal["rms", "layer"] = "rms"
    gain_offset: float = 0.0
    residual_weighted: bool = False
    norm_bias: bool = True

    @property
    def norm_tensors(self) -> tuple[str, ...]:
        """What the norm holds."""
        return ("weight", "bias") if self.norm_kind == "layer" and self.norm_bias else ("weight",)

    @property
    def width(self) -> int:
        """Channels that the norm sees: those of the stream, or of what lies beside it too."""
        read = (self.mixer.size(proj.input) for proj in self.mixer.projs if proj.reads == "residual")
        return next(read, self.mixer.axes["resid"].size)


@dataclass(frozen=True)
class BlockSpec:
    """One block of the model: its path and its sublayers in order.

    hosted: transformers' own layer runs, with quamba's norms, linears and recurrent mixers in the places of its parts.
    params: tensors of the block that belong to no sublayer, left as they are. borrows: (path below this block, full
    path of the module of an earlier block that stands there too): its weights exist once, its sublayers are the
    earlier block's.
    """

    path: str
    sublayers: tuple[Sublayer, ...]
    hosted: bool = False
    params: tuple[str, ...] = ()
    borrows: tuple[str, str] | None = None

    @property
    def norms(self) -> dict[str, Sublayer]:
        """The norms by their paths, each with a sublayer that reads it."""
        return {sub.norm: sub for sub in self.sublayers if sub.norm is not None}


@dataclass(frozen=True)
class ModelSpec:
    """A whole model: where the residual stream begins, its blocks, where it ends.

    returns: length of the tuple that a hosted layer returns, its hidden states first; 0 for the bare tensor.
    passes_embedding: hosted layers take what left the embedding as their first argument beside the hidden states.
    carry: the keyword by which hosted layers are passed a dict of tensors [B, ...] that each may add to for later ones.
    params: tensors that belong neither to a block nor to one of the ends, left as they are. logits_fp32: transformers'
    code takes what the head returns to fp32.
    """

    d_model: int
    vocab: int
    eps: float
    embedding: str
    blocks: tuple[BlockSpec, ...]
    final_norm: str
    head: str
    residual_fp32: bool = True
    returns: int = 0
    passes_embedding: bool = False
    final_norm_kind: Literal["rms", "layer"] = "rms"
    final_gain_offset: float = 0.0
    final_norm_bias: bool = True
    carry: str | None = None
    params: tuple[str, ...] = ()
    logits_fp32: bool = False

    @property
    def hosted(self) -> bool:
        """Whether transformers' own layers run somewhere."""
        return any(block.hosted for block in self.blocks)

    def lent(self, block: BlockSpec) -> tuple[str, ...]:
        """Full paths of the modules of a block that later ones borrow."""
        borrowed = {other.borrows[1] for other in self.blocks if other.borrows is not None}
        return tuple(sorted(path for path in borrowed if path.startswith(f"{block.path}.")))

    @property
    def streams(self) -> int:
        """How many tensors of the samples' hidden states are held at once, at most, while quantising."""
        borrows = sum(block.borrows is not None for block in self.blocks)
        together = 2 if self.passes_embedding else 1
        return together + (borrows + together if borrows else 0)


@dataclass(frozen=True)
class Architecture:
    """One file in quamba.models. describe reads a config strictly; tiny is a config that the tests build.

    renames: (old, new) substrings of tensor names found in older checkpoints of the same architecture. settings: config
    values of every quantised model, where transformers' code of another value would write into weights.
    """

    model_type: str
    describe: Callable[[Any], ModelSpec]
    tiny: tuple[dict[str, Any], ...]
    renames: tuple[tuple[str, str], ...] = field(default=())
    settings: tuple[tuple[str, Any], ...] = field(default=())


def require(config: Any, name: str, *allowed: Any) -> None:
    """Raises UserError unless the config's value is one of ``allowed``."""
    value = getattr(config, name)
    if value not in allowed:
        wanted = " or ".join(repr(a) for a in allowed)
        raise UserError(f"{config.model_type} config has {name}={value!r}; supported is {wanted}")
