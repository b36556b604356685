"""Run one sublayer over the calibration samples: collect ranges at its sites, and what its linears see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import torch

from quamba.models.spec import Sublayer
from quamba.modules.block import RecurrentBlock
from quamba.modules.linear import Linear
from quamba.modules.lowbit import LowBit
from quamba.modules.site import Site
from quamba.quantizers import Hessian
from quamba_kernels.ops import Activation, dequantize


class _Seen(Exception):
    """What follows the linear of interest need not run."""


class Samples:
    """Hidden states [samples, T, D] fp32 in host memory, walked in batches on the device that computes."""

    def __init__(self, hidden: torch.Tensor, batch_size: int, device: torch.device) -> None:
        self.hidden, self.batch_size, self.device = hidden, batch_size, device

    def __iter__(self) -> Iterator[torch.Tensor]:
        for start in range(0, len(self.hidden), self.batch_size):
            yield self.hidden[start : start + self.batch_size].to(self.device)

    def first(self, samples: int) -> Samples:
        """The first few of them."""
        return Samples(self.hidden[:samples], self.batch_size, self.device)


def sites(block: RecurrentBlock, sub: Sublayer) -> list[Site]:
    """Every site of a sublayer."""
    return [m for m in block.parts(sub)[0].modules() if isinstance(m, Site)]


def collect_ranges(block: RecurrentBlock, sub: Sublayer, samples: Samples) -> None:
    """Let the float sublayer run and set the scale of every static site from what passes it."""
    for site in sites(block, sub):
        site.observe()
    rebind(block)
    for hidden in samples:
        block.run(sub, hidden)
    for site in sites(block, sub):
        site.settle()
    rebind(block)


def value_magnitude(block: RecurrentBlock, sub: Sublayer, samples: Samples) -> torch.Tensor:
    """Largest magnitude of each channel of the scan's value input after the convolution, fp32 [C]."""
    mixer = block.parts(sub)[0]
    name = next(i.name for i in sub.mixer.inputs if i.semantics == "value")
    site = mixer.sites[name]
    peak = torch.zeros(site.channels, device=samples.device)

    def see(x: torch.Tensor) -> None:
        torch.maximum(peak, x.float().abs().flatten(0, -2).amax(0), out=peak)
        raise _Seen

    for each in sites(block, sub):
        each.observe()
    rebind(block)
    site.peek = see
    for hidden in samples:
        with suppress(_Seen):
            block.run(sub, hidden)
    site.peek = None
    return peak


def collect_inputs(
    block: RecurrentBlock, sub: Sublayer, linear: Linear, samples: Samples, keep: bool
) -> tuple[Hessian, list[Activation]]:
    """The Hessian of what a linear sees with everything before it quantised, and those inputs where ``keep`` asks."""
    hessian, kept = Hessian(linear.features, samples.device), []

    def see(x: Activation) -> None:
        hessian.update(dequantize(*x))
        if keep:
            kept.append(x)
        raise _Seen

    linear.capture = see
    for hidden in samples:
        with suppress(_Seen):
            block.run(sub, hidden)
    linear.capture = None
    return hessian, kept


def rebind(block: RecurrentBlock) -> None:
    """Forget what was prepared for other scales."""
    for module in block.modules():
        if isinstance(module, LowBit):
            module.unbind()
