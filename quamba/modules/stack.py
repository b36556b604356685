"""Neighbouring blocks that take a decode step of one sequence together, where a backend has a launch for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import nn

from quamba.modules.block import RecurrentBlock
from quamba.modules.joint import JOINTS, Joint
from quamba.modules.linear import Linear
from quamba.modules.mixer import Mixer
from quamba.modules.state import DTYPES, RecurrentState
from quamba_kernels import Setting
from quamba_kernels.registry import Backend, forced_backend


class Stack:
    """Blocks of one kind, called one after the other: the first does the work of all, the others pass it on.

    While ``joined``, their forward comes here; what is not one token of one sequence under way runs block by block.
    """

    def __init__(self, blocks: list[RecurrentBlock], backend: Backend) -> None:
        self.blocks, self.backend = blocks, backend
        self._taken = False
        self._constants: tuple[Any, ...] = ()

    def step(self, block: RecurrentBlock, hidden: torch.Tensor, cache: Any, mask: torch.Tensor | None) -> torch.Tensor:
        """What ``block`` makes of hidden [B, T, D]."""
        if block is not self.blocks[0]:
            return hidden if self._taken else block.alone(hidden, cache, mask)
        states = self._states(hidden, cache, mask)
        self._taken = states is not None
        return block.alone(hidden, cache, mask) if states is None else self._run(hidden, states)

    def _states(
        self, hidden: torch.Tensor, cache: Any, mask: torch.Tensor | None
    ) -> list[RecurrentState] | None:
        """The states of all blocks, if every one of them would decode this token with its fused op."""
        if cache is None or hidden.shape[:2] != (1, 1) or any(part.training for part in self.blocks):
            return None
        found = []
        for block in self.blocks:
            mixer, state = _mixer(block), cache.layers[block.layer_idx]
            if not isinstance(state, RecurrentState) or not mixer.decodes(state, 1, mask):
                return None
            linears = _joint(block).linears(mixer)
            if any(linear.capture or linear.input.watched for linear in linears):
                return None
            if any(part._forward_hooks or part._forward_pre_hooks for part in (block, mixer, *linears)):
                return None  # somebody wants to see or to change what enters or leaves there
            found.append(state)
        return found

    def _run(self, hidden: torch.Tensor, states: list[RecurrentState]) -> torch.Tensor:
        first = self.blocks[0]
        mixer, joint = _mixer(first), _joint(first)
        if not self._constants or not all(map(_holds, self.blocks, self._constants)):
            self._constants = tuple(_constants(block) for block in self.blocks)
        memories = tuple(joint.memory(state) for state in states)
        kept = first.residual_dtype or hidden.dtype
        y: torch.Tensor = self.backend(
            hidden[:, 0].to(kept), self._constants, memories, linear=mixer.linear("in_proj").format.op.name,
            eps=_norm(first).eps, block=mixer.block, in_dtype=mixer.dtype, **joint.options(mixer),
        )  # fmt: skip
        return y.unsqueeze(1)


def stacks_of(model: nn.Module) -> list[Stack]:
    """The stacks of a model: runs of alike blocks for which a backend has one launch."""
    found = []
    for siblings in model.modules():
        if isinstance(siblings, nn.ModuleList):
            for kind, run in groupby(siblings, _kind):
                blocks = [block for block in run if isinstance(block, RecurrentBlock)]
                backend = _backend(blocks[0]) if kind is not None and len(blocks) > 1 else None
                if backend is not None:
                    found.append(Stack(blocks, backend))
    return found


@contextmanager
def joined(stacks: list[Stack]) -> Iterator[None]:
    """Inside, the blocks of each stack take a step together."""
    try:
        for stack in stacks:
            for block in stack.blocks:
                block.stack = stack
        yield
    finally:
        for stack in stacks:
            for block in stack.blocks:
                block.stack = None


def _mixer(block: RecurrentBlock) -> Mixer:
    return block.part(block.block_spec.sublayers[0])


def _joint(block: RecurrentBlock) -> Joint:
    return JOINTS[type(_mixer(block))]


def _norm(block: RecurrentBlock) -> Any:
    return getattr(block, str(block.block_spec.sublayers[0].norm))


def _kind(block: nn.Module) -> tuple[Any, ...] | None:
    """What the blocks of a stack have in common; None for a block that no stack takes."""
    if not isinstance(block, RecurrentBlock) or len(block.block_spec.sublayers) != 1 or hasattr(block, "_hf_hook"):
        return None
    mixer, joint = _mixer(block), JOINTS.get(type(_mixer(block)))
    if joint is None:
        return None
    linears, streamed = joint.linears(mixer), joint.streamed(mixer)
    if any(not linear.format.has_grid or linear.held is not None or linear.input.block for linear in linears):
        return None
    into, out = streamed[0], streamed[-1]
    if any(linear.format is not into.format or _size(linear) != _size(into) for linear in streamed):
        return None
    _bind(block)
    if mixer._decode is None or not joint.takes(mixer):
        return None
    sites = (mixer.conv_input, mixer.gate, *mixer.sites.values(), into.input, out.input)
    return (
        joint.op.name, tuple(mixer.mixer_spec.sizes.items()), mixer._any_device(), block.residual_dtype,
        mixer.dtype, into.format.op.name, _size(into), into.bias is None, out.bias is None,
        mixer.state_spec.dtype, mixer.state_spec.rounding,
        _norm(block).folded, _norm(block).eps, mixer.block, mixer.conv1d.scale is None,
        tuple((site.ready, site.per_token, site.quantised, site.spec.granularity) for site in sites),
        joint.alike(mixer),
    )  # fmt: skip


def _size(linear: Linear) -> int | None:
    return linear.spec.group_size


def _backend(block: RecurrentBlock) -> Backend | None:
    """What runs a stack of such blocks in one launch, if anything does."""
    joint, mixer = _joint(block), _mixer(block)
    op, into = joint.op, mixer.linear("in_proj")
    grouped = into._weights[1]
    shape = {
        **mixer.mixer_spec.sizes, "D": into.features, "norm_groups": mixer.out.norm_groups, "block": mixer.block,
        "S": into.features // grouped.shape[-1] if grouped.dim() == 2 else 0,
        "residual_bits": torch.finfo(block.residual_dtype or mixer.dtype).bits,
        "state_bits": 8 * DTYPES[mixer.state_spec.dtype].itemsize, "coded": int(into.format.int8_input),
        "codes": _codes(mixer, floats=not into.format.int8_input),
    }  # fmt: skip
    setting = Setting(mixer._any_device().type, mixer.dtype, shape)
    forced = forced_backend(op.name)
    if forced is not None and op.explain(setting).get(forced, "unknown") is not None:
        return None  # what is forced serves the blocks one by one
    backend = op.bind(setting)
    parts = {part.name for part in joint.parts} | {linear.format.op.name for linear in joint.linears(mixer)}
    if any(forced_backend(part) not in (None, backend.name) for part in parts):
        return None  # a part too
    return None if backend.name == "torch" else backend


def _codes(mixer: Mixer, floats: bool) -> int:
    """Whether the scan's inputs and the convolution are codes, 1 or 0; -1 where some are, or the gate beside floats."""
    sites = mixer.conv_input, *mixer.sites.values()
    found = {site.ready for site in sites} | {mixer.conv1d.scale is not None}
    if floats and mixer.gate.quantised:
        return -1
    return int(found.pop()) if len(found) == 1 else -1


def _bind(block: RecurrentBlock) -> None:
    mixer = _mixer(block)
    for module in (mixer, *_joint(block).linears(mixer)):
        module.bind()


def _holds(block: RecurrentBlock, constants: Any) -> bool:
    """Whether the block is bound to what it was bound to: it may have been moved or saved in between."""
    _bind(block)
    mixer = _mixer(block)
    bound = mixer._rates[0], *(linear._weights for linear in _joint(block).linears(mixer))
    return {id(part) for part in bound} <= {id(constant) for constant in constants}


def _constants(block: RecurrentBlock) -> Any:
    _bind(block)
    return _joint(block).constants(_mixer(block), _norm(block))
