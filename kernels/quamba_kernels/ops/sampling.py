"""The choice of a token."""

from __future__ import annotations

import torch

from quamba_kernels.registry import op


@op
def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """Index int64 [...] of the largest of logits [..., V]; of several that are equal, the first; NaN is the largest."""
    return logits.argmax(-1)
