"""Choosing the next token from logits, by operations that a CUDA graph can record."""

from __future__ import annotations

import torch

from quamba.modules.likeliest import likeliest
from quamba_kernels.ops.state import dither


class Sampler:
    """logits [B, V] -> ids int64 [B]: the likeliest at temperature 0, else drawn.

    Tokens are drawn from the smallest set whose probability reaches ``top_p``, by inverting the cumulative sum at one
    uniform number per sequence. Its seed and step lie in device memory (``rng`` int64 [2], as for the states), so a
    replayed graph draws anew, and draws what eager calls would have drawn.
    """

    def __init__(
        self, temperature: float = 0.0, top_p: float = 1.0, *, device: torch.device | str = "cpu", seed: int = 0
    ) -> None:
        self.temperature, self.top_p = temperature, top_p
        self.rng = torch.tensor([seed, 0], device=device)

    def restart(self, seed: int) -> None:
        """Begin the draws of that seed, in place."""
        self.rng[0], self.rng[1] = seed, 0

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        if not self.temperature:
            return likeliest(logits)
        share = torch.softmax(logits.float() / self.temperature, -1).double()
        uniform, _ = dither(self.rng, logits.shape[0], 0)
        self.rng[1] += 1
        if self.top_p == 1:
            return _invert(share.cumsum(-1), uniform).squeeze(1)
        share, order = share.sort(dim=-1, descending=True, stable=True)
        total = share.cumsum(-1)
        # what comes before a token decides, so that the likeliest is always kept
        kept = (total - share < self.top_p).sum(-1, keepdim=True)
        mass = total.gather(1, kept - 1)
        return order.gather(1, _invert(total, uniform * mass)).squeeze(1)


def _invert(total: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Index int64 [B, 1] of the first cumulative probability [B, V] above ``at`` [B, 1]."""
    return (total <= at).sum(-1, keepdim=True).clamp_max(total.shape[-1] - 1)
