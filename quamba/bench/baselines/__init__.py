"""What a model is compared with, one file each, found by being here."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from quamba.bench.contender import Baseline
from quamba.discovery import members
from quamba.errors import UserError

BASELINES: dict[str, Baseline] = {
    name: baseline for file in members(__name__, "BASELINES") for name, baseline in file.items()
}


def check(names: Sequence[str], device: torch.device) -> list[str]:
    """The names. Raises UserError for an unknown one, listing the known, and for one that cannot run on the device."""
    for name in names:
        if name not in BASELINES:
            raise UserError(f"There is no baseline '{name}'; known are {', '.join(sorted(BASELINES))}.")
        reason = BASELINES[name].why_not(device)
        if reason is not None:
            raise UserError(f"The baseline '{name}' {reason}; leave it out.")
    return list(names)
