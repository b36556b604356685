"""Microseconds of one launch inside a CUDA graph, with weights that are not in L2."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

L2_MULTIPLE = 4
MOST_COPIES = 512
GRAPH_BYTES = 3 * 10**9
FEW_COPIES = 4
"""From LARGE rows on, where a product does not live from the bytes of its weights."""
LARGE = 2048


class Time(NamedTuple):
    """Microseconds of one launch over replays of one graph."""

    median: float
    p10: float
    p90: float
    launches: int
    replays: int


def copies_needed(weight_bytes: int, l2_bytes: int, rows: int) -> int:
    """Copies of the weights whose sum exceeds four times L2, two at least: each launch finds its own copy evicted."""
    copies = max(2, math.ceil(L2_MULTIPLE * l2_bytes / weight_bytes) + 1)
    return min(copies, FEW_COPIES if rows >= LARGE else MOST_COPIES)


def launches_needed(copies: int, rows: int, weight_bytes: int) -> int:
    """Launches of one graph: whole rounds over the copies, and about a millisecond of them.

    The microseconds between the first event and the first kernel count as the launches': they must be few beside them.
    """
    least = 8 if rows >= LARGE else min(400, max(20, GRAPH_BYTES // weight_bytes))
    return copies * math.ceil(least / copies)


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between order statistics; share in 0..1."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def summary(milliseconds: Sequence[float], launches: int) -> Time:
    """The time of one launch from the times of whole graphs."""
    each = [1000 * ms / launches for ms in milliseconds]
    return Time(statistics.median(each), percentile(each, 0.1), percentile(each, 0.9), launches, len(each))


class Captured(NamedTuple):
    """``launch(0) .. launch(launches - 1)`` in one graph; ``launch`` keeps what the graph points at."""

    graph: torch.cuda.CUDAGraph
    launches: int
    launch: Callable[[int], object]


def capture(launch: Callable[[int], object], launches: int, warm: int) -> Captured:
    """``warm`` different launches run before the capture, so that whatever is compiled or tuned at a first call is
    done."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(warm):
            launch(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            launch(i)
    return Captured(graph, launches, launch)


def in_turns(captured: Sequence[Captured], replays: int) -> list[Time]:
    """Each replay timed by events, of all graphs one after the other: what sets the clock they share, which decides
    where a kernel is bound by arithmetic."""

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    found: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in captured]
    for i in range(3 + replays):
        for marks, (graph, _, _) in zip(found, captured, strict=True):
            start = mark()
            graph.replay()
            if i >= 3:
                marks.append((start, mark()))
    torch.cuda.synchronize()
    return [
        summary([start.elapsed_time(end) for start, end in marks], made.launches)
        for marks, made in zip(found, captured, strict=True)
    ]


def replay(launch: Callable[[int], object], launches: int, replays: int, warm: int) -> Time:
    """Capture ``launch(0) .. launch(launches - 1)`` in one graph, replay it, time each replay with events."""
    return in_turns([capture(launch, launches, warm)], replays)[0]


def copy_bandwidth(gigabytes: float = 1.0, repeats: int = 20) -> float:
    """GB/s of a device-to-device copy, bytes read and written; the best of ``repeats``.

    Not from a graph, whose copy nodes reached 2.4 TB/s on an H100 where the stream's own copies reached 3.0.
    """
    source = torch.empty(int(gigabytes * 2**30), dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(4):
            target.copy_(source)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 4)
    return 2 * source.numel() / best / 1e6
