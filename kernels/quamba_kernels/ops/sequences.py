"""Batches of sequences of different lengths: their tokens lie one after the other along T, and B is 1.

cu_seqlens int32 [S + 1] holds where each sequence begins and the last one ends: 0, ..., T, never falling. A state is
then [S, ...], one per sequence; a sequence without tokens keeps its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch


def check_cu_seqlens(cu_seqlens: torch.Tensor, x: torch.Tensor, state: torch.Tensor | None) -> None:
    """What can be seen without reading the device. Raises ValueError when the shapes or the type do not fit."""
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens is int32 [S + 1], got {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    if x.shape[0] != 1:
        raise ValueError(f"with cu_seqlens the tokens of all sequences lie in one row, got a batch of {x.shape[0]}")
    if state is not None and len(state) != len(cu_seqlens) - 1:
        raise ValueError(f"cu_seqlens has {len(cu_seqlens) - 1} sequences and there are {len(state)} states")


def sequences(
    cu_seqlens: torch.Tensor, state: torch.Tensor | None, x: torch.Tensor, *streams: torch.Tensor
) -> Iterator[tuple[torch.Tensor | None, list[torch.Tensor]]]:
    """The state [1, ...] and the streams [1, t, ...], x first, of each sequence.

    Raises ValueError for a cu_seqlens that does not rise from 0 to T.
    """
    check_cu_seqlens(cu_seqlens, x, state)
    bounds = cu_seqlens.tolist()
    if bounds != sorted(bounds) or bounds[0] != 0 or bounds[-1] != x.shape[1]:
        raise ValueError(f"cu_seqlens rises from 0 to the {x.shape[1]} tokens given, got {bounds}")
    for s, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        yield None if state is None else state[s : s + 1], [part[:, start:end] for part in (x, *streams)]


def scan_each(
    scan: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    cu_seqlens: torch.Tensor,
    state: torch.Tensor | None,
    *streams: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [1, T, ...] and the last states [S, ...] of ``scan(state, *streams)``, run on each sequence alone."""
    done = [scan(before, *own) for before, own in sequences(cu_seqlens, state, *streams)]
    return torch.cat([y for y, _ in done], 1), torch.cat([last for _, last in done])
