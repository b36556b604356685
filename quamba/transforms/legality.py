"""Which transforms are exact for a sublayer, derived from its description. Rules: Quamba2, section 4, and the algebra
of each recurrence: the value axis commutes with any matrix state, the key axis only with a scalar decay, and neither
passes through a convolution or an activation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quamba.models.spec import MixerSpec, ModelSpec, Output, Sublayer
from quamba.transforms.permute import Permutation, permute
from quamba.transforms.rotate import rotate_rows, rotate_values
from quamba_kernels import hadamard

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Transform:
    """A change of a block's tensors. why_illegal: None when the block's output stays what it was, else the reason."""

    name: str
    why_illegal: Callable[[Sublayer], str | None]
    apply: Callable[[Tensors, Sublayer, torch.Generator], Tensors]


def legal(sublayer: Sublayer) -> dict[str, str | None]:
    """Transform name -> None, or why it is not exact here."""
    return {name: t.why_illegal(sublayer) for name, t in TRANSFORMS.items()}


def residual_rotation_illegal(sublayer: Sublayer) -> str | None:
    """Rotating the residual stream needs an RMS norm before, linear readers and an unweighted sum."""
    if sublayer.norm_kind != "rms":
        return f"a {sublayer.norm_kind} norm does not commute with a rotation"
    return "the residual sum is weighted per channel" if sublayer.residual_weighted else None


def residual_rotation_obstacle(model: ModelSpec) -> str | None:
    """Why the residual stream of a whole model cannot be rotated, or None."""
    for block in model.blocks:
        for sub in block.sublayers:
            if reason := residual_rotation_illegal(sub):
                return f"in {block.path}, {reason}"
    return None if model.final_norm_kind == "rms" else f"the last norm is a {model.final_norm_kind} norm"


def _source(mixer: MixerSpec, name: str) -> Output:
    return next(output for proj in mixer.projs for output in proj.parts if output.name == name)


def value_rotation_illegal(mixer: MixerSpec) -> str | None:
    """Rotating the values of each head in the projections around the scan needs nothing elementwise in between."""
    value = next((i for i in mixer.inputs if i.semantics == "value"), None)
    if value is None or mixer.out is None:
        return "there is no axis of values"
    if post := _source(mixer, value.name).post:
        return f"{value.name} passes through {' and '.join(post)}"
    if mixer.out.gate:
        return f"the output is gated by {mixer.out.gate}"
    # an RMS norm over whole heads keeps rotations of them, once its gain is folded into what reads it
    return f"the output passes a {mixer.out.norm} norm" if mixer.out.norm not in (None, "rms") else None


def _key_rotation_illegal(sublayer: Sublayer) -> str | None:
    mixer = sublayer.mixer
    if mixer.scan is None or not any(i.semantics == "key" for i in mixer.inputs):
        return "there is no axis of keys"
    if mixer.scan.decay != "scalar":
        return f"the decay is {mixer.scan.decay}"
    for i in mixer.inputs:
        # what is divided by its length may be rotated before or after
        if i.semantics in ("key", "query") and (post := [s for s in _source(mixer, i.name).post if s != "l2"]):
            return f"{i.name} passes through {' and '.join(post)}"
    return None


def _rotate_keys(tensors: Tensors, sublayer: Sublayer, generator: torch.Generator) -> Tensors:
    mixer = sublayer.mixer
    for i in mixer.inputs:
        if i.semantics in ("key", "query"):
            rotation = hadamard.hadamard_matrix(hadamard.block_size(mixer.axes[i.axes[-1]].size))
            tensors = rotate_rows(tensors, mixer, i.name, rotation)
    return tensors


def _random_order(size: int, classes: int, generator: torch.Generator) -> torch.Tensor:
    each = size // classes
    return torch.cat([torch.randperm(each, generator=generator) + c * each for c in range(classes)])


def _permute_axis(name: str) -> Transform:
    def why_illegal(sublayer: Sublayer) -> str | None:
        axis = sublayer.mixer.axes.get(name)
        if axis is None:
            return f"there is no axis {name!r}"
        return f"axis {name!r} has a fixed order" if axis.fixed else None

    def apply(tensors: Tensors, sublayer: Sublayer, generator: torch.Generator) -> Tensors:
        axis = sublayer.mixer.axes[name]
        classes = sublayer.mixer.axes[axis.share].size if axis.share else 1
        return permute(tensors, sublayer, [Permutation(name, _random_order(axis.size, classes, generator))])

    return Transform(f"permute_{name}", why_illegal, apply)


def _permute_one_tensor(tensors: Tensors, sublayer: Sublayer, generator: torch.Generator) -> Tensors:
    """Reverse what one projection reads, and nothing else: what a permutation that forgets a tensor looks like."""
    name = sublayer.mixer.name(sublayer.mixer.projs[-1].weight)
    return {**tensors, name: tensors[name].flip(-1)}


AXES = "channel", "head", "kv_head", "key", "value", "state", "rank", "hidden", "expert"

TRANSFORMS = {
    t.name: t
    for t in (
        *map(_permute_axis, AXES),
        Transform(
            "rotate_value_offline",
            lambda sub: value_rotation_illegal(sub.mixer),
            lambda tensors, sub, generator: rotate_values(tensors, sub),
        ),
        Transform("rotate_key_offline", _key_rotation_illegal, _rotate_keys),
        Transform("permute_one_tensor", lambda s: "the other tensors of the axis stay behind", _permute_one_tensor),
    )
}
