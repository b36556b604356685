"""Run one sublayer over the calibration samples: collect ranges at its sites, and what its linears see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import torch

from quamba.models.spec import Sublayer
from quamba.modules.block import RecurrentBlock
from quamba.modules.host import HostedBlock
from quamba.modules.linear import Linear
from quamba.modules.lowbit import LowBit
from quamba.modules.mixer import Mixer
from quamba.modules.site import Site
from quamba.quantizers import Hessian
from quamba.ranks import ALONE, Ranks
from quamba_kernels.ops import Activation, dequantize

Block = RecurrentBlock | HostedBlock
Stage = list[list[Linear]]
"""Linears that can be quantised once all before them are: each inner list reads one and the same input."""

HESSIANS = 2**30
"""Bytes of Hessians collected in one pass: experts beyond that take another one."""


class _Seen(Exception):
    """What follows the linear of interest need not run."""


class Samples:
    """Hidden states fp32 [samples, T, D] of this rank's batches in host memory, walked in batches on the device that
    computes. count: the samples of all ranks, whose batches go round (``share``); None where there is one rank."""

    def __init__(
        self,
        hidden: torch.Tensor,
        batch_size: int,
        device: torch.device,
        ranks: Ranks = ALONE,
        count: int | None = None,
    ) -> None:
        self.hidden, self.batch_size, self.device, self.ranks = hidden, batch_size, device, ranks
        self.count = len(hidden) if count is None else count

    @staticmethod
    def share(tokens: torch.Tensor, batch_size: int, ranks: Ranks) -> torch.Tensor:
        """Of tokens [samples, T] those in this rank's batches; batches are the same however many ranks there are."""
        return torch.cat([tokens[:0], *ranks.share(tokens.split(batch_size))])

    def __iter__(self) -> Iterator[torch.Tensor]:
        for start in range(0, len(self.hidden), self.batch_size):
            yield self.hidden[start : start + self.batch_size].to(self.device)

    def rounds(self) -> Iterator[torch.Tensor | None]:
        """Batches in step with the other ranks: None where this one has none left and others have."""
        own = iter(self)
        for _ in range(self.ranks.rounds(len(range(0, self.count, self.batch_size)))):
            yield next(own, None)

    def whole(self) -> torch.Tensor | None:
        """The hidden states of all ranks [samples, T, D]; None on others than the first. Called by all."""
        if self.ranks.size == 1:
            return self.hidden
        whole = self.hidden.new_empty(self.count, *self.hidden.shape[1:]) if self.ranks.first else None
        for owner, here, own in self._pieces(whole):
            if self.ranks.first and owner == 0:
                here.copy_(own)
            self.ranks.move(here if self.ranks.first else own, owner, 0)
        return whole

    def take(self, whole: torch.Tensor | None) -> None:
        """Set the hidden states of all ranks to what the first has. Called by all."""
        for owner, here, own in self._pieces(whole):
            if self.ranks.first and owner == 0:
                own.copy_(here)
            self.ranks.move(here if self.ranks.first else own, 0, owner)

    def _pieces(self, whole: torch.Tensor | None) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """For every batch its rank, where it lies in the whole, and where it lies in the owner's hidden states."""
        size = self.batch_size
        for batch, start in enumerate(range(0, self.count, size)):
            at = batch // self.ranks.size * size
            own = self.hidden[at : at + size]
            yield self.ranks.owner(batch), own if whole is None else whole[start : start + size], own

    def check(self) -> None:
        """Raises FloatingPointError when a hidden state is NaN or Inf."""
        if not all(torch.isfinite(sample).all() for sample in self.hidden):
            raise FloatingPointError("NaN or Inf in its activations")

    def first(self, samples: int) -> Samples:
        """The first few of all ranks' samples."""
        own = len(self.share(torch.arange(self.count)[:samples], self.batch_size, self.ranks))
        return Samples(self.hidden[:own], self.batch_size, self.device, self.ranks, min(samples, self.count))


def sites(block: Block, sub: Sublayer) -> list[Site]:
    """Every site of a sublayer; a part that stays transformers' has those of its linears, and may hold other parts."""
    part = block.part(sub)
    if isinstance(part, Mixer):
        return [m for m in part.modules() if isinstance(m, Site)]
    return [linear.input for proj in sub.mixer.projs for linear in block.linears(sub, proj)]


def stages(block: Block, sub: Sublayer) -> list[Stage]:
    """The linears of a sublayer in the order of execution; projections that read the same go together."""
    out: list[Stage] = []
    reads = ""
    for proj in sub.mixer.projs:
        linears = block.linears(sub, proj)
        if proj.stack:
            out += _affordable([[linear] for linear in linears])
        elif linears and out and proj.reads == reads and len(out[-1]) == 1 and not _stacked(sub, reads):
            out[-1][0] += linears
        elif linears:
            out.append([linears])
        reads = proj.reads
    return out


def _stacked(sub: Sublayer, reads: str) -> bool:
    return any(proj.stack and proj.reads == reads for proj in sub.mixer.projs)


def _affordable(stage: Stage) -> list[Stage]:
    count = max(1, HESSIANS // (8 * stage[0][0].features ** 2)) if stage else 1
    return [stage[start : start + count] for start in range(0, len(stage), count)]


def collect_ranges(block: Block, sub: Sublayer, samples: Samples) -> None:
    """Let the float sublayer run and set the scale of every static site from what passes it."""
    for site in sites(block, sub):
        site.observe()
    rebind(block)
    for hidden in samples:
        block.run(sub, hidden)
    for site in sites(block, sub):
        settle(site, samples.ranks)
    rebind(block)


def settle(site: Site, ranks: Ranks) -> None:
    """Set a site's scale from what all ranks have seen pass it."""
    if site.histogram is not None:
        site.histogram.unite(ranks)
    site.settle()


def value_magnitude(block: Block, sub: Sublayer, samples: Samples) -> torch.Tensor:
    """Largest magnitude of each channel of the scan's value input after the convolution, fp32 [C]."""
    mixer = block.part(sub)
    assert isinstance(mixer, Mixer)
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
    samples.ranks.largest(peak)
    return peak


def collect_inputs(
    block: Block, sub: Sublayer, stage: Stage, samples: Samples, keep: bool
) -> tuple[list[Hessian], list[Activation]]:
    """The Hessian of what each input of a stage holds with everything before it quantised, and those inputs where
    ``keep`` asks (of a stage with one)."""
    hessians = [Hessian(linears[0].features, samples.device, samples.ranks) for linears in stage]
    kept: list[Activation] = []

    def watch(linear: Linear, hessian: Hessian) -> None:
        def see(x: Activation) -> None:
            hessian.update(dequantize(*x))
            if keep:
                kept.append(x)
            if len(stage) == 1:
                raise _Seen

        linear.capture = see

    for linears, hessian in zip(stage, hessians, strict=True):
        watch(linears[0], hessian)
    for hidden in samples.rounds():
        if hidden is not None:
            with suppress(_Seen):
                block.run(sub, hidden)
        for hessian in hessians:
            hessian.end_batch()
    for linears, hessian in zip(stage, hessians, strict=True):
        linears[0].capture = None
        hessian.unite()
    return hessians, kept


def quantise_together(linears: list[tuple[Linear, Hessian]], ranks: Ranks) -> None:
    """Quantise linears with their Hessians, each rank some slabs of rows, and give all of them to every rank."""
    slabs = [(linear, hessian, rows) for linear, hessian in linears for rows in linear.slabs()]
    for linear, hessian, rows in ranks.share(slabs):
        linear.quantise_rows(rows, hessian)
    for index, (linear, _, rows) in enumerate(slabs):
        for tensor in linear.stored_rows(rows):
            ranks.publish(tensor, ranks.owner(index))
    for linear, _ in linears:
        linear.release()


def advance(block: HostedBlock, sub: Sublayer, samples: Samples) -> None:
    """Move the samples on to what the finished block gives."""
    for start in range(0, len(samples.hidden), samples.batch_size):
        part = samples.hidden[start : start + samples.batch_size]
        part.copy_(block.run(sub, part.to(samples.device)))


def rebind(block: Block) -> None:
    """Forget what was prepared for other scales."""
    for module in block.modules():
        if isinstance(module, LowBit):
            module.unbind()
