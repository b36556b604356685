"""What a model is compared with, one file each, found by being here."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

import torch

from quamba.bench.contender import Contender
from quamba.bench.source import Source
from quamba.errors import UserError

Make = Callable[[Source, torch.dtype, torch.device], Contender]

BASELINES: dict[str, Make] = {}
for _module in pkgutil.iter_modules(__path__):
    BASELINES |= importlib.import_module(f"{__name__}.{_module.name}").BASELINES


def baseline(name: str, source: Source, dtype: torch.dtype, device: torch.device) -> Contender:
    """The contender of that name, with weights of the source's sizes. Raises UserError for one that cannot be had."""
    return BASELINES[check(name)](source, dtype, device)


def check(name: str) -> str:
    """The name. Raises UserError for an unknown one, listing the known."""
    if name not in BASELINES:
        raise UserError(f"There is no baseline '{name}'; known are {', '.join(sorted(BASELINES))}.")
    return name
