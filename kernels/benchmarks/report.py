"""What the commands have in common: their options, the head of their results, and the files that they write."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


def add_options(made: argparse.ArgumentParser, replays: int, budget_s: float) -> None:
    """How often and how long, from which seed, and where to."""
    made.add_argument("--replays", type=int, default=replays, help="timed replays of each graph")
    made.add_argument("--budget-s", type=float, default=budget_s, help="stop cleanly after this many seconds")
    made.add_argument("--seed", type=int, help="of the random inputs; drawn anew unless given")
    made.add_argument("--output", type=Path, help="a JSON file for the results; a .md of the same name for the tables")


def header(seed: int, bandwidth: float, **more: Any) -> Row:
    """What the results are of; not complete yet."""
    return {
        "device": torch.cuda.get_device_name(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]), "seed": seed, "torch": torch.__version__,
        "cuda": torch.version.cuda, "copy_gb_s": bandwidth, **more, "complete": False,
    }  # fmt: skip


def write(path: Path | None, head: Row, rows: Sequence[Row], tables: str) -> None:
    """The JSON file and the tables beside it, each replaced as a whole."""
    if path is None:
        return
    contents = {path: json.dumps({**head, "rows": rows}, indent=1), path.with_suffix(".md"): tables}
    for target, content in contents.items():
        part = target.with_name(target.name + ".part")
        part.write_text(f"{content}\n", encoding="utf-8")
        os.replace(part, target)
