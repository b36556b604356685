"""Rotary positions: the two halves of a head turn against each other. Su et al., 2104.09864."""

from __future__ import annotations

import torch


def rotate_positions(x: torch.Tensor, first: torch.Tensor | int, theta: float = 10000.0) -> torch.Tensor:
    """x [B, T, H, N] at positions first [B or none], first + 1, ... -> the same, pair (i, i + N/2) turned by position *
    theta^(-2i/N)."""
    tokens, size = x.shape[1], x.shape[-1]
    rates = 1 / theta ** (torch.arange(0, size, 2, device=x.device, dtype=torch.float32) / size)
    position = torch.as_tensor(first, device=x.device).view(-1, 1) + torch.arange(tokens, device=x.device)
    angle = (position.float().unsqueeze(-1) * rates).unsqueeze(2)
    one, other = x.float().chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([one * cos - other * sin, one * sin + other * cos], -1).to(x.dtype)
