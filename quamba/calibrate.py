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
from quamba.skeleton import Arguments
from quamba_kernels.ops import Activation, dequantize

Block = RecurrentBlock | HostedBlock
Use = tuple[Arguments, torch.Tensor]
Stage = list[list[Linear]]
"""Linears that can be quantised once all before them are: each inner list reads one and the same input."""

CARRY = "carry."
HESSIANS = 2**30
"""Bytes of Hessians collected in one pass: experts beyond that take another one."""


class _Seen(Exception):
    """What follows the linear of interest need not run."""


class Samples:
    """Hidden states [samples, T, D] fp32 in host memory, walked in batches on the device that computes.

    carry: what finished layers leave for later ones, [samples, ...] by name.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        batch_size: int,
        device: torch.device,
        carry: dict[str, torch.Tensor] | None = None,
    ) -> None:
        self.hidden, self.batch_size, self.device = hidden, batch_size, device
        self.carry: dict[str, torch.Tensor] = carry or {}

    def __iter__(self) -> Iterator[torch.Tensor]:
        for hidden, _ in self.batches():
            yield hidden

    def batches(self) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
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

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything by name, as ``restore`` takes it back."""
        return {"hidden": self.hidden, **{f"{CARRY}{name}": tensor for name, tensor in self.carry.items()}}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Go on from what ``tensors`` gave."""
        self.hidden.copy_(tensors["hidden"])
        self.carry = {name.removeprefix(CARRY): t for name, t in tensors.items() if name.startswith(CARRY)}

    def check(self) -> None:
        """Raises FloatingPointError when a hidden state is NaN or Inf."""
        if not all(torch.isfinite(sample).all() for sample in self.hidden):
            raise FloatingPointError("NaN or Inf in its activations")

    def first(self, samples: int) -> Samples:
        """The first few of them."""
        carry = {name: tensor[:samples] for name, tensor in self.carry.items()}
        return Samples(self.hidden[:samples], self.batch_size, self.device, carry)


class Uses(Samples):
    """What reaches a part that several blocks use: at the first of them what the quantised model gives, at the others
    what the float model gives. The layer runs with the arguments of the use in question.

    others: for each later use, its arguments and its hidden states, without what lies beside them everywhere.
    """

    def __init__(self, block: HostedBlock, first: Samples, others: list[Use]) -> None:
        super().__init__(first.hidden, first.batch_size, first.device, first.carry)
        self.block, self.others = block, others

    def batches(self) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        yield from super().batches()
        own = self.block.arguments
        try:
            for arguments, hidden in self.others:
                self.block.arguments = self.block.placed(arguments)
                beside = self.hidden[..., hidden.shape[-1] :]
                for parts in zip(hidden.split(self.batch_size), beside.split(self.batch_size), strict=True):
                    yield torch.cat(parts, -1).to(self.device), {}
        finally:
            self.block.arguments = own


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
        site.settle()
    rebind(block)


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
    return peak


def collect_inputs(
    block: Block, sub: Sublayer, stage: Stage, samples: Samples, keep: bool
) -> tuple[list[Hessian], list[Activation]]:
    """The Hessian of what each input of a stage holds with everything before it quantised, and those inputs where
    ``keep`` asks (of a stage with one)."""
    hessians = [Hessian(linears[0].features, samples.device) for linears in stage]
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
    for hidden, carry in samples.batches():
        with suppress(_Seen):
            block.run(sub, hidden, carry)
    for linears in stage:
        linears[0].capture = None
    return hessians, kept


def advance(block: HostedBlock, sub: Sublayer, samples: Samples) -> None:
    """Move the samples on to what the finished block gives."""
    starts = range(0, len(samples.hidden), samples.batch_size)
    for start, (hidden, carry) in zip(starts, samples.batches(), strict=True):
        samples.replace(start, block.run(sub, hidden, carry), carry)


def rebind(block: Block) -> None:
    """Forget what was prepared for other scales."""
    for module in block.modules():
        if isinstance(module, LowBit):
            module.unbind()
