"""What all commands share on the terminal: results on stdout, progress and errors on stderr."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from quamba import ranks

# Off a terminal there is no width to keep to, and rich would assume 80 columns and cut long task names.
PIPE_WIDTH = 160

# `highlight` would colour every number and path.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPE_WIDTH)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def fail(sentence: str) -> NoReturn:
    """Print one sentence to stderr and exit with status 2: the user has something to change."""
    sentence = " ".join(sentence.split())
    line = f"Error: {sentence}" + ("" if sentence.endswith((".", "?", "!", ")")) else ".")
    if ranks.launched():
        ranks.fail(lambda: print(line, file=sys.stderr), 2)
    print(line, file=sys.stderr)
    sys.exit(2)


def settle() -> None:
    """Settle the libraries below: no load reports, hints about kernels, progress bars of their own or busy waiting.
    Of several processes one prints.

    Call it first in a command: some of them read the environment when they are imported.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")
    # Threads that wait by spinning take the core from the thread they wait for: with another process on two cores,
    # 48 tokens of the embedded model took 49 to 190 s; waiting passively, 5 s. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    if not sys.warnoptions:  # python -W ... asked to see them
        warnings.simplefilter("ignore")

    if not ranks.speaks():
        out.quiet = err.quiet = True

    from transformers.utils import logging as transformers_logging

    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("lm_eval", "lm-eval", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callback (phase, done, total) that draws one bar per phase on stderr, and nothing off a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=err.quiet or not err.is_terminal) as bars:
        known = {}

        def report(phase: str, done: int, total: int) -> None:
            if phase not in known:
                known[phase] = bars.add_task(phase, total=total)
            bars.update(known[phase], completed=done, total=total)

        yield report


def table(*columns: str, title: str | None = None) -> Table:
    """Return an empty table: names in the first column, which may wrap, and numbers in the others, which may not."""
    made = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left", no_wrap=index > 0, overflow="fold")
    return made


def megabytes(size: int) -> str:
    """Return `size` bytes in MB of 10^6 bytes, with two digits after the point."""
    return f"{size / 1e6:,.2f}"


def ratio(size: int, original: int) -> str:
    """Return size / original, or a dash where there was nothing (an lm_head tied to the embedding)."""
    return f"{size / original:.3f}" if original else "-"
