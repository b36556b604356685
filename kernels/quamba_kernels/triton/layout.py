"""How tensors reach a kernel: unit stride along the last axis, int64 offsets, and what the device can hold."""

from __future__ import annotations

from functools import cache

import torch

PROCESSORS = 132
"""Streaming multiprocessors that sizes are chosen for where there is no GPU: those of an H100."""


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """[..., C] as [M, C] with unit stride along C: a view where there is one, else a copy."""
    return unit(tensor.reshape(-1, tensor.shape[-1]))


def unit(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with unit stride along its last axis: itself where it has, else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def packed(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Contiguous, as weights, scales and bias are read; they are so already unless someone sliced them."""
    return None if tensor is None else tensor.contiguous()


def whole(scale: torch.Tensor | None, *shape: int) -> torch.Tensor | None:
    """A scale spread to its full shape, contiguous."""
    return None if scale is None else scale.expand(shape).contiguous()


def in_place(name: str, tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A tensor that a kernel writes. Raises ValueError when it is not contiguous: a copy would swallow the result."""
    if tensor is not None and not tensor.is_contiguous():
        raise ValueError(f"{name} is updated in place and must be contiguous, got strides {tensor.stride()}")
    return tensor


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device."""
    return _processors(device.index) if device.type == "cuda" else PROCESSORS


@cache
def _processors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
