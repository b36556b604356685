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
from quamba.modules.scan_inputs import ScanInputs
from quamba.modules.site import Site
from quamba.quantizers import Hessian
from quamba.ranks import ALONE, Ranks
from quamba.skeleton import Arguments
from quamba_kernels.ops import Activation, dequantize

Block = RecurrentBlock | HostedBlock
Batch = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""Hidden states [B, T, D], and by name what has been carried to them."""
Use = tuple[Arguments, torch.Tensor]
Stage = list[list[Linear]]
"""Linears that can be quantised once all before them are: each inner list reads one and the same input."""

HIDDEN, CARRY = "hidden", "carry."
HESSIANS = 2**30
"""Bytes of Hessians collected in one pass: experts beyond that take another one."""


class _Seen(Exception):
    """What follows the linear of interest need not run."""


class Samples:
    """Hidden states fp32 [samples, T, D] of this rank's batches in host memory, walked in batches on the device that
    computes.

    carry: what finished layers leave for later ones, [samples, ...] by name. count: the samples of all ranks, whose
    batches go round (``share``); None where there is one rank.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        batch_size: int,
        device: torch.device,
        ranks: Ranks = ALONE,
        count: int | None = None,
        carry: dict[str, torch.Tensor] | None = None,
    ) -> None:
        self.hidden, self.batch_size, self.device, self.ranks = hidden, batch_size, device, ranks
        self.count = len(hidden) if count is None else count
        self.carry: dict[str, torch.Tensor] = carry or {}

    @staticmethod
    def share(tokens: torch.Tensor, batch_size: int, ranks: Ranks) -> torch.Tensor:
        """Of tokens [samples, T] those in this rank's batches; batches are the same however many ranks there are."""
        return torch.cat([tokens[:0], *ranks.share(tokens.split(batch_size))])

    def __iter__(self) -> Iterator[torch.Tensor]:
        for hidden, _ in self.batches():
            yield hidden

    def batches(self) -> Iterator[Batch]:
        """Hidden states and what has been carried to them."""
        for start in range(0, len(self.hidden), self.batch_size):
            part = slice(start, start + self.batch_size)
            carried = {name: tensor[part].to(self.device) for name, tensor in self.carry.items()}
            yield self.hidden[part].to(self.device), carried

    def replace(self, start: int, hidden: torch.Tensor, carry: dict[str, torch.Tensor]) -> None:
        """Set the batch that begins with sample ``start`` to what a layer made of it."""
        part = slice(start, start + len(hidden))
        self.hidden[part] = hidden
        for name, tensor in carry.items():
            if name not in self.carry:
                self.carry[name] = torch.empty(len(self.hidden), *tensor.shape[1:], dtype=tensor.dtype)
            self.carry[name][part] = tensor

    def rounds(self) -> Iterator[Batch | None]:
        """Batches in step with the other ranks: None where this one has none left and others have."""
        yield from self._in_step(self.batches())

    def _in_step(self, own: Iterator[Batch]) -> Iterator[Batch | None]:
        for _ in range(self.ranks.rounds(len(range(0, self.count, self.batch_size)))):
            yield next(own, None)

    def whole(self) -> dict[str, torch.Tensor] | None:
        """The hidden states of all ranks [samples, T, D] and what is carried to them, by name; None on others than the
        first. Called by all."""
        own = {HIDDEN: self.hidden, **{f"{CARRY}{name}": tensor for name, tensor in sorted(self.carry.items())}}
        if self.ranks.size == 1:
            return own
        whole = {}
        for name, tensor in own.items():  # a rank without samples carries nothing, and has nothing to send
            if self.ranks.first:
                whole[name] = tensor.new_empty(self.count, *tensor.shape[1:])
            for owner, here, mine in self._pieces(whole.get(name), tensor):
                if self.ranks.first and owner == 0:
                    here.copy_(mine)
                self.ranks.move(here if self.ranks.first else mine, owner, 0)
        return whole if self.ranks.first else None

    def take(self, whole: dict[str, torch.Tensor] | None) -> None:
        """Go on from what ``whole`` gave the first rank. Called by all."""
        for name, (shape, dtype) in self.ranks.outline(whole).items():
            own = self.hidden if name == HIDDEN else torch.empty(len(self.hidden), *shape[1:], dtype=dtype)
            for owner, here, mine in self._pieces(None if whole is None else whole[name], own):
                if self.ranks.first and owner == 0:
                    mine.copy_(here)
                self.ranks.move(here if self.ranks.first else mine, 0, owner)
            if name != HIDDEN:
                self.carry[name.removeprefix(CARRY)] = own

    def _pieces(
        self, whole: torch.Tensor | None, own: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """For every batch its rank, where it lies in the whole, and where it lies in the owner's part."""
        size = self.batch_size
        for batch, start in enumerate(range(0, self.count, size)):
            at = batch // self.ranks.size * size
            mine = own[at : at + size]
            yield self.ranks.owner(batch), mine if whole is None else whole[start : start + size], mine

    def copy(self) -> Samples:
        """The same once more, to go another way from here."""
        carry = {name: tensor.clone() for name, tensor in self.carry.items()}
        return Samples(self.hidden.clone(), self.batch_size, self.device, self.ranks, self.count, carry)

    def check(self) -> None:
        """Raises FloatingPointError when a hidden state is NaN or Inf."""
        if not all(torch.isfinite(sample).all() for sample in self.hidden):
            raise FloatingPointError("NaN or Inf in its activations")

    def first(self, samples: int) -> Samples:
        """The first few of all ranks' samples."""
        own = len(self.share(torch.arange(self.count)[:samples], self.batch_size, self.ranks))
        carry = {name: tensor[:own] for name, tensor in self.carry.items()}
        count = min(samples, self.count)
        return Samples(self.hidden[:own], self.batch_size, self.device, self.ranks, count, carry)


class Uses(Samples):
    """What reaches a part that several blocks use: at the first of them what the quantised model gives, at the others
    what the float model gives. The layer runs with the arguments of the use in question.

    others: for each later use, its arguments and its hidden states, without what lies beside them everywhere.
    """

    def __init__(self, block: HostedBlock, first: Samples, others: list[Use]) -> None:
        super().__init__(first.hidden, first.batch_size, first.device, first.ranks, first.count, first.carry)
        self.block, self.others = block, others

    def batches(self) -> Iterator[Batch]:
        for use in self._uses():
            yield from use

    def rounds(self) -> Iterator[Batch | None]:
        for use in self._uses():
            yield from self._in_step(use)

    def _uses(self) -> Iterator[Iterator[Batch]]:
        yield super().batches()
        own = self.block.arguments
        try:
            for arguments, hidden in self.others:
                self.block.arguments = self.block.placed(arguments)
                yield self._later(hidden)
        finally:
            self.block.arguments = own

    def _later(self, hidden: torch.Tensor) -> Iterator[Batch]:
        beside = self.hidden[..., hidden.shape[-1] :]
        for start in range(0, len(hidden), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield torch.cat([hidden[part], beside[part]], -1).to(self.device), {}


def sites(block: Block, sub: Sublayer) -> list[Site]:
    """Every site of a sublayer; a hosted part has those of its linears and of what its scan reads, and may hold other
    parts."""
    part = block.part(sub)
    if isinstance(part, Mixer):
        return [m for m in part.modules() if isinstance(m, Site)]
    entering = (m for m in (part, *part.children()) if isinstance(m, ScanInputs)) if sub.mixer.scan else ()
    own = [site for module in entering for site in module.sites]
    return [*own, *(linear.input for proj in sub.mixer.projs for linear in block.linears(sub, proj))]


def stages(block: Block, sub: Sublayer) -> list[Stage]:
    """The linears of a sublayer in the order of execution; projections that read the same go together, and those of
    one role side by side."""
    out: list[Stage] = []
    reads = role = ""
    for proj in sub.mixer.projs:
        linears = block.linears(sub, proj)
        if proj.stack:
            out += _affordable([[linear] for linear in linears])
        elif linears and out and proj.reads == reads and len(out[-1]) == 1 and not _stacked(sub, reads):
            out[-1][0] += linears
        elif linears and out and proj.role == role:
            out[-1].append(linears)
        elif linears:
            out.append([linears])
        reads, role = proj.reads, proj.role
    return out


def _stacked(sub: Sublayer, reads: str) -> bool:
    return any(proj.stack and proj.reads == reads for proj in sub.mixer.projs)


def _affordable(stage: Stage) -> list[Stage]:
    count = max(1, HESSIANS // (8 * stage[0][0].features ** 2)) if stage else 1
    return [stage[start : start + count] for start in range(0, len(stage), count)]


def let_through(block: Block, sub: Sublayer) -> None:
    """Let floats pass a sublayer that is not calibrated yet."""
    for site in sites(block, sub):
        site.observe()


def collect_ranges(block: Block, sub: Sublayer, samples: Samples) -> None:
    """Let the float sublayer run and set the scale of every static site from what passes it."""
    let_through(block, sub)
    rebind(block)
    for hidden, carry in samples.batches():
        block.run(sub, hidden, carry)
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
    for hidden, carry in samples.batches():
        with suppress(_Seen):
            block.run(sub, hidden, carry)
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
            if len(stage) == 1 and not (isinstance(block, HostedBlock) and block.repeats):
                raise _Seen

        linear.capture = see

    for linears, hessian in zip(stage, hessians, strict=True):
        watch(linears[0], hessian)
    for batch in samples.rounds():
        if batch is not None:
            with suppress(_Seen):
                block.run(sub, *batch)
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


def advance(block: Block, sub: Sublayer, samples: Samples) -> None:
    """Move the samples on to what the finished block gives."""
    starts = range(0, len(samples.hidden), samples.batch_size)
    for start, (hidden, carry) in zip(starts, samples.batches(), strict=True):
        samples.replace(start, block.run(sub, hidden, carry), carry)


def rebind(block: Block) -> None:
    """Forget what was prepared for other scales."""
    for module in block.modules():
        if isinstance(module, LowBit):
            module.unbind()
