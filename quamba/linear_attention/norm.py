"""Norms of the outputs of a scan."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import sigmoid, silu

GATES = {"swish": silu, "silu": silu, "sigmoid": sigmoid}


class GatedRMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight * act(gate) over the last axis; weight [C], or None for no gain."""

    weight: nn.Parameter | None

    def __init__(self, size: int, eps: float, *, activation: str = "swish", affine: bool = True) -> None:
        super().__init__()
        self.eps, self.activation = eps, activation
        self.register_parameter("weight", nn.Parameter(torch.ones(size)) if affine else None)

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """x and gate [..., C] -> [..., C] of the gate's type, computed in fp32."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        if self.weight is not None:
            y = y * self.weight.float()
        return (y * GATES[self.activation](gate.float())).to(gate.dtype)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis; weight [C], or None for no gain."""

    weight: nn.Parameter | None

    def __init__(self, size: int, eps: float, *, affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.register_parameter("weight", nn.Parameter(torch.ones(size)) if affine else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., C] -> the same, computed in fp32."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        if self.weight is not None:
            y = y * self.weight.float()
        return y.to(x.dtype)
