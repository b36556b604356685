"""Peak memory of a stretch of work, above what was held when it began."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

INTERVAL = 0.05


@dataclass
class Peak:
    """bytes above the start: of the process on a CPU, of the device's allocator on a GPU."""

    bytes: int = 0


def resident() -> int:
    """Resident set of this process in bytes; 0 where the system does not tell."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return 0
    import resource

    return int(status.read_text().split()[1]) * resource.getpagesize()


def installed() -> int:
    """Memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def release() -> None:
    """Return freed memory to the system: glibc keeps what large temporaries leave between its blocks, which after a
    dozen layers is several times what is in use. Does nothing where malloc_trim does not exist."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def collect(device: torch.device) -> None:
    """Free what only refers to itself, and give what the allocator of a GPU keeps of it back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def watch(device: torch.device) -> Iterator[Peak]:
    """Sample the resident set every 50 ms, or read the CUDA allocator's own peak."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - start
        return
    start, done = resident(), threading.Event()

    def sample() -> None:
        while not done.wait(INTERVAL):
            peak.bytes = max(peak.bytes, resident() - start)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak.bytes = max(peak.bytes, resident() - start)
