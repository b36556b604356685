"""Tensors of a model in a few large blocks of a GPU's memory.

The allocator holds for a tensor of more than 1 MB up to 1 MB that it did not ask for: of a model of 64 layers in 4 bits
3.5%. A block holds many tensors, and leaves that once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

BLOCK = 2**28
"""Bytes of a block; a tensor of as many or more stays where it is."""
ALIGNMENT = 512
"""Bytes: as the allocator aligns a tensor, so kernels find what they expect."""


def settle(model: Any) -> None:
    """Move the parameters and buffers that lie on a GPU into blocks of BLOCK bytes; values, types and ties stay.

    Modules that have bound kernels to their tensors must be unbound. Needs BLOCK bytes more for a while. transformers
    clones tensors that share a storage before it saves them: save from a CPU what fills more than half a GPU.
    """
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"]
    if tensors:
        into_blocks(tensors)
        torch.cuda.empty_cache()


def into_blocks(tensors: list[torch.Tensor], block: int = BLOCK) -> None:
    """Give contiguous tensors of less than a block storages that they share; those of one address stay one."""
    for inference in (False, True):  # a tensor made in inference mode can only hold another such one
        same: dict[tuple[Any, ...], list[torch.Tensor]] = {}
        for tensor in tensors:
            if 0 < tensor.nbytes < block and tensor.is_contiguous() and tensor.is_inference() is inference:
                same.setdefault((tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape), []).append(tensor)
        with torch.inference_mode(inference), torch.no_grad():
            for group in _groups(list(same.values()), block):
                _share(group)


def _share(group: list[list[torch.Tensor]]) -> None:
    whole = torch.empty(sum(_room(t) for t, *_ in group), dtype=torch.uint8, device=group[0][0].device)
    start = 0
    for tensor, *others in group:
        moved = whole[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        start += _room(tensor)
        for holder in (tensor, *others):
            holder.data = moved


def _room(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _groups(tensors: list[list[torch.Tensor]], block: int) -> Iterator[list[list[torch.Tensor]]]:
    """Tensors of one device in their order, as many as a block has room for."""
    group: list[list[torch.Tensor]] = []
    room = 0
    for holders in tensors:
        tensor = holders[0]
        if group and (_room(tensor) > room or tensor.device != group[0][0].device):
            yield group
            group = []
        if not group:
            room = block
        group.append(holders)
        room -= _room(tensor)
    if group:
        yield group
