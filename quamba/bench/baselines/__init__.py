"""What a model is compared with, one file each, found by being here."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence

import torch

from quamba.bench.contender import Baseline
from quamba.errors import UserError

BASELINES: dict[str, Baseline] = {}
for _module in pkgutil.iter_modules(__path__):
    BASELINES |= importlib.import_module(f"{__name__}.{_module.name}").BASELINES


def check(names: Sequence[str], device: torch.device) -> list[str]:
    """The names. Raises UserError for an unknown one, listing the known, and for one that cannot run on the device."""
    for name in names:
        if name not in BASELINES:
            raise UserError(f"There is no baseline '{name}'; known are {', '.join(sorted(BASELINES))}.")
        reason = BASELINES[name].why_not(device)
        if reason is not None:
            raise UserError(f"The baseline '{name}' {reason}; leave it out.")
    return list(names)
