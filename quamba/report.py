"""What a quantisation did: sizes by part, time, memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from quamba.checkpoint import Checkpoint, part_of


@dataclass
class Report:
    """sizes in bytes: layers, embedding, lm_head, and the same of the original at 16 bits (``*_original``).

    seconds of wall time; peak_memory in bytes above the start; largest_layer in bytes at fp32; notes: what the recipe
    asks for and the architecture does not allow.
    """

    output: Path
    tensors: dict[str, int] = field(repr=False)
    checkpoint: Checkpoint = field(repr=False)
    seconds: float
    peak_memory: int
    largest_layer: int
    notes: list[str] = field(default_factory=list)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes by part, with the original's beside them."""
        spec = self.checkpoint.spec
        parts = {"layers": 0, "embedding": 0, "lm_head": 0}
        for name, size in self.tensors.items():
            parts[part_of(name, spec.embedding, spec.head)] += size
        return {**parts, **{f"{k}_original": v for k, v in self.checkpoint.bytes().items()}}
