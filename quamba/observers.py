"""Statistics of an activation -> its scale. An observer is a function of a histogram, registered by its name here."""

from __future__ import annotations

from collections.abc import Callable

import torch

from quamba.ranks import Ranks

BINS_PER_OCTAVE = 16
OCTAVES = 40
BINS = BINS_PER_OCTAVE * OCTAVES
TOP = 2.0**20
QMAX = 127


class Histogram:
    """|x| of every channel in logarithmic bins (16 per octave, 2^-20 to 2^20, 4% wide) and its exact maximum.

    peak fp32 [C]; counts fp32 [C, BINS] when asked for. A permutation or a grouping of the channels maps the
    statistics exactly, so neither asks for another calibration.
    """

    def __init__(self, channels: int, detailed: bool, device: torch.device | str = "cpu") -> None:
        self.peak = torch.zeros(channels, device=device)
        self.counts = torch.zeros(channels, BINS, device=device) if detailed else None

    def update(self, x: torch.Tensor) -> None:
        """Add x [..., C]. Raises FloatingPointError when it holds NaN or Inf."""
        x = x.detach().float().flatten(0, -2).abs()
        peak = x.amax(0)
        if not torch.isfinite(peak).all():
            raise FloatingPointError("NaN or Inf in its activations")
        torch.maximum(self.peak, peak, out=self.peak)
        if self.counts is not None:
            octave = torch.log2(x.clamp_min_(TOP * 2.0**-OCTAVES) / TOP) + OCTAVES
            index = (octave * BINS_PER_OCTAVE).long().clamp_(0, BINS - 1)
            index += torch.arange(x.shape[1], device=x.device) * BINS
            self.counts.view(-1).add_(torch.bincount(index.flatten(), minlength=self.counts.numel()))

    def unite(self, ranks: Ranks) -> None:
        """Take in what the other ranks have seen: counts are whole numbers, so exact to 2^24 tokens."""
        ranks.largest(self.peak)
        if self.counts is not None:
            ranks.count(self.counts)

    def grouped(self, label: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Merge channels by label [C] into ``groups``: (peak [groups], counts [groups, BINS] or None)."""
        peak = self.peak.new_zeros(groups).scatter_reduce_(0, label, self.peak, "amax")
        if self.counts is None:
            return peak, None
        return peak, self.counts.new_zeros(groups, BINS).index_add_(0, label, self.counts)


def _edges(peak: torch.Tensor) -> torch.Tensor:
    """Upper edge of every bin, [C, BINS]: no value lies above the peak, and the last bin takes all above the top."""
    edges = TOP * 2.0 ** ((torch.arange(BINS, device=peak.device) + 1) / BINS_PER_OCTAVE - OCTAVES)
    edges[-1] = torch.inf
    return torch.minimum(edges, peak.unsqueeze(1))


def absmax(peak: torch.Tensor, counts: torch.Tensor | None, quantile: float) -> torch.Tensor:
    """The largest magnitude seen."""
    return peak


def percentile(peak: torch.Tensor, counts: torch.Tensor | None, quantile: float) -> torch.Tensor:
    """The magnitude below which a share ``quantile`` of the values lies (Quamba, section 4.1)."""
    assert counts is not None
    share = counts.cumsum(1) / counts.sum(1, keepdim=True).clamp_min(1)
    index = (share < quantile).sum(1).clamp_max(BINS - 1)
    return _edges(peak).gather(1, index.unsqueeze(1)).squeeze(1)


def mse(peak: torch.Tensor, counts: torch.Tensor | None, quantile: float) -> torch.Tensor:
    """The clipping bound with the least squared error of int8 rounding and clipping together."""
    assert counts is not None
    upper = _edges(peak)
    lower = upper.roll(1, 1)  # within a bin the values are taken as evenly spread
    lower[:, 0] = 0
    width = (upper - lower).clamp_min(1e-30)
    best, best_error = peak, torch.full_like(peak, torch.inf)
    for shrink in torch.linspace(1.0, 0.2, 41).tolist():
        bound = (peak * shrink).unsqueeze(1)
        clipped = ((upper - bound).clamp_min(0) ** 3 - (lower - bound).clamp_min(0) ** 3) / (3 * width)
        inside = ((bound - lower) / width).clamp(0, 1) * (bound / QMAX) ** 2 / 12
        error = (counts * (inside + clipped)).sum(1)
        best, best_error = torch.where(error < best_error, peak * shrink, best), torch.minimum(error, best_error)
    return best


OBSERVERS: dict[str, Callable[[torch.Tensor, torch.Tensor | None, float], torch.Tensor]] = {
    "absmax": absmax,
    "percentile": percentile,
    "mse": mse,
}
DETAILED = {"percentile", "mse"}
