"""Tensors as what the structs of csrc hold: addresses and strides, checked where a kernel would misread them.

Activations of another layout are copied, constants of a model refused, because they would be copied at every call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from quamba_kernels.cuda.library import library

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
CODES = (torch.int8,)


class Arguments(ctypes.Structure):
    """What an entry point of csrc takes; a subclass has the fields of its struct."""

    def __str__(self) -> str:
        numbers = [name for name, kind, *_ in self._fields_ if kind is not ctypes.c_void_p]
        return " ".join(f"{name}={getattr(self, name)}" for name in numbers)


def fields(pointers: str, long_longs: str, ints: str, floats: str = "") -> list[tuple[str, type]]:
    """The fields of a struct that has its pointers first, from names between spaces."""
    kinds = ((pointers, ctypes.c_void_p), (long_longs, ctypes.c_longlong), (ints, ctypes.c_int),
             (floats, ctypes.c_float))  # fmt: skip
    return [(name, kind) for names, kind in kinds for name in names.split()]


def constant(
    name: str, tensor: Tensor | None, x: Tensor, dtypes: Sequence[torch.dtype], *shapes: tuple[int, ...]
) -> int | None:
    """The address of a tensor of one of these types and shapes, None for None.

    Raises TypeError or ValueError in a sentence when a kernel would misread it.
    """
    if tensor is None:
        return None
    if tensor.device != x.device:
        raise ValueError(f"{name} lies on {tensor.device}, and x on {x.device}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} has to be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tuple(tensor.shape) not in shapes:
        raise ValueError(f"{name} has to be {' or '.join(str(list(s)) for s in shapes)}, got {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} {list(tensor.shape)} is not contiguous; pass a contiguous copy")
    return tensor.data_ptr()


def stream(
    name: str, tensor: Tensor, x: Tensor, dtypes: Sequence[torch.dtype], shape: tuple[int, ...] | None = None
) -> Tensor:
    """An activation whose last axis is dense, copied if it was not. Raises TypeError or ValueError as ``constant``."""
    if tensor.device != x.device:
        raise ValueError(f"{name} lies on {tensor.device}, and x on {x.device}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} has to be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if shape is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has to be {list(shape)}, got {list(tensor.shape)}")
    if tensor.dim() == 0 or tensor.shape[-1] == 0:
        raise ValueError(f"{name} has no channels: {list(tensor.shape)}")
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def out_type(out_dtype: torch.dtype) -> None:
    """Raises TypeError for a type that no kernel writes."""
    if out_dtype not in FLOATS:
        raise TypeError(f"out_dtype has to be one of {FLOATS}, got {out_dtype}; a scale gives an int8 result")


def launch(name: str, arguments: Arguments, device: torch.device) -> None:
    """Run a kernel on the current stream of the device."""
    with torch.cuda.device(device):
        library(device.index).call(name, arguments, device)
