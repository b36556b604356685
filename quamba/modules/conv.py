"""Depthwise causal convolution of a mixer."""

from __future__ import annotations

import torch

from quamba.modules.lowbit import LowBit
from quamba.recipe import StorageSpec
from quamba_kernels.ops.rowwise import to_int8, token_scale


class Conv(LowBit):
    """Weight [C, 1, W] as the checkpoint lays it out, int8 with a scale per channel or in its own type; bias [C]."""

    weight: torch.Tensor
    weight_packed: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        channels: int,
        width: int,
        spec: StorageSpec,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(dtype)
        self.spec = spec
        self._held: torch.Tensor | None = None
        if spec.bits == 8:
            self.register_buffer("weight_packed", torch.zeros(channels, 1, width, dtype=torch.int8, device=device))
            self.register_buffer("weight_scale", torch.ones(channels, dtype=torch.float32, device=device))
        else:
            self.plain("weight", channels, 1, width, device=device)
        if bias:
            self.plain("bias", channels, device=device)
        else:
            self.bias = None

    def hold(self, weight: torch.Tensor) -> None:
        """Run on the float weight [C, 1, W] until ``quantise``."""
        self._held = weight

    def quantise(self) -> None:
        """Store the held weight as the spec says."""
        weight, self._held = self._held, None
        assert weight is not None
        if self.spec.bits == 8:
            scale = token_scale(weight.float())
            self.weight_packed.copy_(to_int8(weight, scale))
            self.weight_scale.copy_(scale.flatten())
        else:
            self.weight.copy_(weight)

    @property
    def taps(self) -> torch.Tensor:
        """[C, W]."""
        weight = self._held
        if weight is None:
            weight = self.weight_packed if self.spec.bits == 8 else self.weight
        return weight.squeeze(1)

    @property
    def scale(self) -> torch.Tensor | None:
        """[C] fp32 for int8 taps."""
        return None if self._held is not None else self._buffers.get("weight_scale")
