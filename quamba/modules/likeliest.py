"""The likeliest token, by whatever finds it fastest here."""

from __future__ import annotations

import torch

from quamba_kernels import Setting, ops


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """Index int64 [B] of the largest of logits [B, V]; of several that are equal, the first."""
    ids: torch.Tensor = ops.likeliest.bind(Setting(logits.device.type, logits.dtype))(logits)
    return ids
