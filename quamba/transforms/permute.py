"""Permute named axes through every tensor that carries them, and through the statistics taken before."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quamba.models.spec import MixerSpec, Segment, Sublayer

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Permutation:
    """New order of one axis: new[i] = old[order[i]]. order [size], or [outer size, size] for an axis whose order
    differs along an outer axis, in the OLD numbering of that axis ("value" channels by head)."""

    axis: str
    order: torch.Tensor
    outer: str | None = None


def segment_index(mixer: MixerSpec, segment: Segment, permutations: list[Permutation]) -> torch.Tensor:
    """For one segment, the old flat position of every new one."""
    sizes = [mixer.axes[name].size for name in segment]
    position = torch.arange(int(torch.tensor(sizes).prod())).view(sizes)
    for p in permutations:
        if p.axis not in segment:
            continue
        dim = segment.index(p.axis)
        if p.outer is None:
            position = position.index_select(dim, p.order)
        elif p.outer in segment:
            shape = [1] * len(sizes)
            shape[segment.index(p.outer)], shape[dim] = p.order.shape
            order = p.order if segment.index(p.outer) < dim else p.order.T
            position = position.gather(dim, order.reshape(shape).expand_as(position))
    return position.flatten()


def dimension_index(mixer: MixerSpec, segments: tuple[Segment, ...], permutations: list[Permutation]) -> torch.Tensor:
    """For a dimension made of segments, the old position of every new one."""
    parts, start = [], 0
    for segment in segments:
        index = segment_index(mixer, segment, permutations)
        parts.append(index + start)
        start += len(index)
    return torch.cat(parts)


def permute(tensors: Tensors, sublayer: Sublayer, permutations: list[Permutation]) -> Tensors:
    """Apply permutations (an inner one before the one of its outer axis) to every tensor of the mixer. Returns a new
    dict; the outputs of the block are unchanged.

    Raises ValueError when a permutation crosses a class that its axis must stay in, or moves a fixed axis.
    """
    mixer = sublayer.mixer
    for p in permutations:
        _check(mixer, p)
    out = dict(tensors)
    for param in mixer.params:
        name = mixer.name(param.path)
        for dim, segments in enumerate(param.layout):
            if any(p.axis in segment for p in permutations for segment in segments):
                out[name] = out[name].index_select(dim, dimension_index(mixer, segments, permutations))
    return out


def _check(mixer: MixerSpec, p: Permutation) -> None:
    axis = mixer.axes[p.axis]
    if axis.fixed:
        raise ValueError(f"axis {p.axis!r} has a fixed order")
    if axis.share:
        classes = mixer.axes[axis.share].size
        label = torch.arange(axis.size) // (axis.size // classes)
        if (label[p.order] != label).any():
            raise ValueError(f"a permutation of {p.axis!r} must stay inside each {axis.share!r}")
