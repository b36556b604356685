"""Tasks of lm-eval on a model that is already in memory, without the network."""

from __future__ import annotations

import difflib
import math
import random
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quamba.errors import UserError
from quamba.placement import entry
from quamba.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# lm-eval's own default, so that the few-shot examples of a task are the ones it would draw.
FEWSHOT_SEED = 1234
# Resamples behind the standard error of a metric that has no closed form; the mean has one. lm-eval's 100,000 take
# minutes and change the second digit of an error bar.
BOOTSTRAPS = 1000


def find_tasks(names: Sequence[str], tasks_path: str | Path | None = None) -> TaskManager:
    """Return a task manager that knows every one of `names`: tasks, groups or tags.

    `tasks_path` is a directory of task YAMLs, whose names win over the built-in ones. Raises UserError for names that
    nobody knows, with the nearest known ones, and for a directory that is not there.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("Tasks need lm-eval, which 'pip install quamba[eval]' brings.") from None

    if not names:
        raise UserError("No task was named.")
    if tasks_path is not None:
        if not Path(tasks_path).is_dir():
            raise UserError(f"There is no directory '{tasks_path}' of task files.")
        # Reading the thousands of built-in task files takes about 20 seconds: not for tasks that do not need them.
        local = TaskManager(include_path=str(tasks_path), include_defaults=False)
        if all(_is_complete(local, name) for name in names):
            return local
    manager = TaskManager(include_path=str(tasks_path) if tasks_path is not None else None)
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=5, cutoff=0.5)
            hint = f"near names are {', '.join(near)}" if near else "and no known name is near"
            raise UserError(f"There is no task '{name}'; {hint}.")
    return manager


def _is_complete(manager: TaskManager, name: str) -> bool:
    """Say whether `manager` knows `name` and, if it is a group, everything in it."""
    entry = manager.task_index.get(name)
    if entry is None:
        return False
    members = (entry.cfg or {}).get("task", []) if name in manager.all_groups else []
    return all(_is_complete(manager, member) for member in members if isinstance(member, str))


def tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    tasks_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    manager: TaskManager | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, dict[str, float]]:
    """Return {name: {metric: value}} for lm-eval tasks, and for the groups and their members.

    `limit` is the number of documents of each task, all by default. `manager` comes from `find_tasks`, where the names
    were checked before the model was loaded. A metric is called as in lm-eval without the ",none" of the default
    filter ("acc", "acc_stderr"); other filters are kept ("exact_match@strict-match"). A value that is not a number,
    such as the standard error of one document, is left out. `ranks` share the documents: each has the whole model, all
    call this, and all return the metrics of all documents.
    Raises UserError for unknown names, a task named twice, counts below 1 and data sets that cannot be had.
    """
    import torch
    from datasets.exceptions import DatasetsError
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    for value, what in ((limit, "The limit of documents"), (batch_size, "The batch size")):
        if value is not None and value < 1:
            raise UserError(f"{what} is at least 1, and {value} was given.")
    manager = manager or find_tasks(names, tasks_path)
    try:
        loaded = manager.load(list(dict.fromkeys(names)))
    except (DatasetsError, OSError) as error:
        raise UserError(f"The data of {', '.join(names)} cannot be had: {_first_line(error)}.") from error
    except ValueError as error:
        if "Duplicate task" not in str(error):
            raise
        raise UserError(f"{_first_line(error)}.") from None
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)

    # `evaluate` and not `simple_evaluate`: that one describes the machine and asks the Hub about the model.
    adapter = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    adapter._device = entry(model)
    silent = {} if sys.stderr.isatty() and ranks.first else {"disable_tqdm": True}
    for verb in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(adapter, verb, partial(_answer, partial(getattr(adapter, verb), **silent), ranks))
    random.seed(0)
    with torch.inference_mode():
        results = evaluate(lm=adapter, task_dict=loaded, limit=limit, bootstrap_iters=BOOTSTRAPS, log_samples=False)
    return {name: _clean(metrics) for name, metrics in results["results"].items()}


def _answer(ask: Callable[[list[Any]], list[Any]], ranks: Ranks, requests: list[Any], **options: Any) -> list[Any]:
    """What `ask` gives for lm-eval's requests, each rank those of some documents.

    lm-eval itself sees one process: shared out there, the documents would come back in another order, and with it other
    sums and resamples.
    """
    documents = [list(group) for _, group in groupby(requests, lambda r: (r.task_name, r.doc_id))]
    own = ranks.share(documents)
    flat = iter(ask([request for document in own for request in document], **options) if own else ())
    answers = ranks.gather([list(islice(flat, len(document))) for document in own], len(documents))
    return [tuple(a) if isinstance(a, list) else a for document in answers for a in document]


def _clean(metrics: dict[str, Any]) -> dict[str, float]:
    """Return {"acc": 0.5} for lm-eval's {"acc,none": 0.5, "alias": ...}."""
    cleaned = {}
    for key, value in metrics.items():
        name, comma, kept = key.partition(",")
        if comma and isinstance(value, int | float) and math.isfinite(value):
            cleaned[name if kept == "none" else f"{name}@{kept}"] = float(value)
    return cleaned


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
