"""What every weight format offers. Storage is pure functions of tensors; nothing here knows a module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch

from quamba.recipe import LinearSpec
from quamba_kernels import Backend, Op, Setting, ops
from quamba_kernels.registry import forced_backend

Tensors = dict[str, torch.Tensor]


def group_size(asked: int, features: int, multiple: int = 8) -> int:
    """The group along K: the one asked for if it divides K, else the largest divisor below it that is a multiple of
    ``multiple``, else K (one group per channel)."""
    for size in range(min(asked, features), multiple - 1, -1):
        if features % size == 0 and size % multiple == 0:
            return size
    return features


def divides(size: int, features: Iterable[int]) -> bool:
    """Whether a group size can be meant for linears of these input features: one that is wider than the row means the
    whole row, and one that some divide falls back where it does not."""
    return any(size >= each or each % size == 0 for each in features)


class Grid(ABC):
    """The values that a weight [O, K] may take, fitted as quantisation goes along K.

    size: input features per group; importance [K] weighs the squared error of each feature.
    """

    size: int

    @abstractmethod
    def begin(self, weight: torch.Tensor, importance: torch.Tensor) -> None:
        """Look at the whole weight [O, K] and fit every group."""

    @abstractmethod
    def fit(self, group: int, weight: torch.Tensor, importance: torch.Tensor) -> None:
        """Refit one group to its present weight [O, S]."""

    @abstractmethod
    def step(self, group: int) -> torch.Tensor:
        """The distance between neighbouring values in one group, [O]."""

    @property
    @abstractmethod
    def bounds(self) -> tuple[int, int]:
        """Least and largest code."""

    @abstractmethod
    def pack(self, codes: torch.Tensor) -> Tensors:
        """The stored tensors for integer codes [O, K]."""

    def quantize(self, weight: torch.Tensor, group: int) -> torch.Tensor:
        """Codes (as floats) of columns [O, ...] of one group."""
        step = self.step(group).view(-1, *([1] * (weight.dim() - 1)))
        return torch.round(weight / step).clamp_(*self.bounds)


class Format(ABC):
    """A way to store and run a linear. int8_input: whether the op takes int8 codes with their scale; has_grid: whether
    weights are rounded to a grid, or kept as they are; grouped: whether the spec's group_size is used."""

    name: str
    int8_input: bool
    has_grid = True
    grouped = False

    @abstractmethod
    def tensors(self, features: int, outputs: int, spec: LinearSpec) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> shape and dtype of what is stored, in the order in which the op takes them.

        Raises UserError for a size that the format cannot hold.
        """

    @abstractmethod
    def grid(self, features: int, outputs: int, spec: LinearSpec) -> Grid:
        """A fresh grid for a weight [outputs, features]."""

    @abstractmethod
    def dequantize(self, tensors: Tensors) -> torch.Tensor:
        """The fp32 weight [O, K] that the stored tensors stand for."""

    @abstractmethod
    def step(self, tensors: Tensors) -> torch.Tensor:
        """The distance between neighbouring values, fp32 [O, K/S]. Raises TypeError for a format without a grid."""

    @property
    @abstractmethod
    def op(self) -> Op:
        """The op of quamba_kernels that runs it."""

    def bind(self, device: str, dtype: torch.dtype, features: int, outputs: int, spec: LinearSpec) -> Backend:
        """The backend for this linear on this device."""
        size = group_size(spec.group_size, features)
        return self.op.bind(Setting(device, dtype, {"K": features, "O": outputs, "S": size}))


    def bind_norm(
        self, device: str, dtype: torch.dtype, features: int, outputs: int, spec: LinearSpec
    ) -> Backend | None:
        """The backend that runs it together with the norm before it, over weights as this op's own backend has them;
        None where only the torch body would, and where a backend is forced that does not know both."""
        size = group_size(spec.group_size, features)
        setting = Setting(device, dtype, {"K": features, "O": outputs, "S": size})
        forced = forced_backend(ops.norm_linear.name)
        if not self.has_grid or forced not in (None, *(known.name for known in ops.norm_linear.candidates)):
            return None
        backend = ops.norm_linear.bind(setting)
        return backend if backend.name == self.op.bind(setting).name != "torch" else None


def clip_search(
    error: Any, start: torch.Tensor, ratios: list[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale among start * ratios with the least error(scale) [O], elementwise; (scale, error)."""
    best, least = start.clone(), error(start)
    for ratio in ratios:
        scale = start * ratio
        e = error(scale)
        better = e < least
        best, least = torch.where(better, scale, best), torch.where(better, e, least)
    return best, least
