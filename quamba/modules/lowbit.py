"""The base of every module here: tensors keep their types, backends are bound once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class LowBit(nn.Module):
    """A module whose buffers are codes and scales: ``.to(dtype)`` changes the type of activations and of its plain
    float parameters, never theirs.

    dtype: the 16/32-bit type of activations. Subclasses override ``_bind``, which prepares what running needs
    (backends, prepacked weights) on the first call after building, loading or moving, and ``_unbind``, which restores
    the stored layout.
    """

    answers_weight = False
    """transformers asks some modules (lm_head, embeddings) for the type of their weight, which may not exist here."""

    _is_hf_initialized: bool

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self._bound = False

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and type(self).answers_weight and "weight" not in self.__dict__["_parameters"]:
            return torch.empty(0, dtype=self.dtype, device=self._any_device())
        return super().__getattr__(name)

    def plain(self, name: str, *shape: int, device: torch.device | str | None) -> None:
        """Register zeros of the activations' type: a tensor that stays what it is in the original checkpoint."""
        self._parameters[name] = nn.Parameter(torch.zeros(shape, dtype=self.dtype, device=device), requires_grad=False)

    def bind(self) -> None:
        """Prepare to run; does nothing when already done."""
        if not self._bound:
            # a later call may want gradients, which cannot flow past tensors made in inference mode
            with torch.inference_mode(False), torch.no_grad():
                self._bind()
            self._bound = True

    def unbind(self) -> None:
        """Return to the stored layout."""
        if self._bound:
            self._unbind()
            self._bound = False

    def _bind(self) -> None: ...

    def _unbind(self) -> None: ...

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LowBit:
        self.unbind()
        probe = fn(torch.empty(0, dtype=self.dtype, device=self._any_device()))
        self.dtype = probe.dtype

        def keep_type(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            kept = isinstance(tensor, nn.Parameter) or moved.dtype == tensor.dtype
            return moved if kept else tensor.to(moved.device)

        for child in self.children():
            child._apply(fn)
        super()._apply(keep_type, recurse=False)
        return self

    def _any_device(self) -> torch.device:
        tensors = itertools.chain(self.buffers(), self.parameters())
        return next((t.device for t in tensors), torch.device("cpu"))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.unbind()
        super()._save_to_state_dict(destination, prefix, keep_vars)
