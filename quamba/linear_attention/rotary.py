"""Rotary positions: the two halves of a head turn against each other. Su et al., 2104.09864."""

from __future__ import annotations

import torch


def rotate_positions(x: torch.Tensor, offset: int, theta: float = 10000.0) -> torch.Tensor:
    """x [B, T, H, N] of tokens offset, offset + 1, ... -> the same, pair (i, i + N/2) turned by t * theta^(-2i/N)."""
    tokens, size = x.shape[1], x.shape[-1]
    rates = 1 / theta ** (torch.arange(0, size, 2, device=x.device, dtype=torch.float32) / size)
    angle = torch.outer(torch.arange(offset, offset + tokens, device=x.device, dtype=torch.float32), rates).unsqueeze(1)
    first, second = x.float().chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(x.dtype)
