"""Modules that several blocks use: what reaches each at its later uses, found before it is quantised at its first."""

from __future__ import annotations

from collections.abc import Callable

import torch

from quamba import calibrate, memory
from quamba.models.spec import BlockSpec, ModelSpec, Sublayer
from quamba.modules.host import HostedBlock
from quamba.skeleton import Arguments

Lent = dict[str, torch.nn.Module]
"""Modules of finished blocks that later ones use, by full path."""
Uses = dict[str, list[calibrate.Use]]
"""What reaches a module at every use but the first, by full path."""


def later_uses(
    model: ModelSpec,
    arguments: dict[str, Arguments],
    stream: calibrate.Samples,
    done: int,
    floats: Callable[[int, BlockSpec, Lent], HostedBlock],
) -> Uses:
    """A pass of the float model over the samples. floats: builds a block, by its index, that runs on its float weights
    in the quantised model's basis. Empty where nothing of the kind is left after ``done`` layers."""
    uses, lent = Uses(), Lent()
    if not any(model.lent(block) for block in model.blocks[done:]):
        return uses
    last = max(i for i, block in enumerate(model.blocks) if block.borrows is not None)
    samples = stream.copy()
    for layer, block in enumerate(model.blocks[: last + 1]):
        if block.borrows is not None:
            reached = samples.hidden[..., : model.d_model].clone()
            uses.setdefault(block.borrows[1], []).append((arguments.get(block.path, {}), reached))
        if layer < last:
            module = floats(layer, block, lent)
            calibrate.advance(module, block.sublayers[-1], samples)
            lent |= module.lend(model.lent(block))
            memory.release()
    return uses


def reaching(block: calibrate.Block, sub: Sublayer, stream: calibrate.Samples, uses: Uses) -> calibrate.Samples:
    """The samples that a sublayer sees: those of all its uses where there are several."""
    path = f"{block.block_spec.path}.{sub.mixer.path}."
    others = next((found for lent, found in uses.items() if path.startswith(f"{lent}.")), None)
    if others is None:
        return stream
    assert isinstance(block, HostedBlock)
    return calibrate.Uses(block, stream, others)
