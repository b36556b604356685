"""Perplexity of a model on a text, by prefill or one token at a time; `tasks` runs lm-eval.

Axes: B windows in a batch, T tokens in a window, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quamba.decoding import Decoder
from quamba.errors import UserError
from quamba.harness import find_tasks, tasks
from quamba.placement import entry
from quamba.ranks import ALONE, Ranks
from quamba.windows import check_windows, read_text

__all__ = ["check_windows", "find_tasks", "perplexity", "read_text", "tasks"]

Progress = Callable[[str, int, int], None]

# Elements of the float32 logits that the loss looks at in one go (64 MB).
LOSS_CHUNK = 16 * 2**20


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    *,
    window: int = 1024,
    max_windows: int | None = None,
    stepwise: bool = False,
    batch_size: int | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Return the perplexity of `model` on the text file `path`.

    The whole file is tokenised without special tokens and cut into windows of `window` tokens that do not overlap;
    the incomplete tail is dropped, and at most `max_windows` windows, from the start of the file, are used. Every
    token of a window but its first is predicted from the tokens before it in that window; the perplexity is the
    exponential of the mean loss over all of them, in natural logarithms, summed in float64.

    `stepwise` reads the same windows through the decode path, one token per forward with the cache that the model
    returns. `batch_size` windows go together (4, or 16 if stepwise); prefill holds float32 logits
    [batch_size, window, V] while a batch runs, stepwise only [batch_size, V]. `ranks` share the batches: each has the
    whole model, all call this, and all return the same number, that of one process.

    Returns file, windows, tokens (the number predicted) and value (inf where float64 has no room for it).
    Raises UserError for a text that is missing, empty or shorter than a window, for counts out of range, for a model
    without a cache if stepwise, and where the loss is not a number.
    """
    check_windows(window, max_windows, batch_size)
    text = read_text(path)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    count = min(len(ids) // window, max_windows or len(ids))
    if count == 0:
        raise UserError(f"'{path}' has {len(ids)} tokens, fewer than one window of {window}.")
    batches = ids[: count * window].view(count, window).split(batch_size or (16 if stepwise else 4))

    own, losses, done, device = ranks.share(batches), [], 0, entry(model)
    with torch.inference_mode():
        for batch in own:
            report = _within(progress, done, len(batch), sum(map(len, own)))
            losses.append((_loss_stepwise if stepwise else _loss_prefill)(model, batch.to(device), report))
            done += len(batch)
    losses = ranks.gather(losses, len(batches))
    if any(map(math.isnan, losses)):
        raise UserError(
            f"the loss on '{path}' is not a number: activations of the model overflow {model.dtype}; "
            "give a wider --dtype, and if it is float32 look at the checkpoint's weights"
        )
    total = sum(losses)
    tokens = count * (window - 1)
    return {"file": str(path), "windows": count, "tokens": tokens, "value": _exponential(total / tokens)}


def _loss_prefill(model: PreTrainedModel, ids: torch.Tensor, report: Callable[[float], None]) -> float:
    """Return the summed loss of windows `ids` [B, T], int64, each read in one forward."""
    logits = model(ids, use_cache=False).logits
    total = sum(_loss(row[:-1], targets[1:]) for row, targets in zip(logits, ids, strict=True))
    report(1.0)
    return float(total)


def _loss_stepwise(model: PreTrainedModel, ids: torch.Tensor, report: Callable[[float], None]) -> float:
    """Return the summed loss of windows `ids` [B, T], int64, read one token per forward."""
    total = torch.zeros((), dtype=torch.float64, device=ids.device)
    decoder, steps = Decoder(model), ids.shape[1] - 1
    for step in range(steps):
        total += _loss(decoder.step(ids[:, step]), ids[:, step + 1])
        report((step + 1) / steps)
    return float(total)


def _loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the summed loss, float64 scalar, of `logits` [N, V] against `targets` [N], int64.

    In chunks, because log-softmax in float32 would otherwise double the memory of the logits.
    """
    rows = max(1, LOSS_CHUNK // logits.shape[-1])
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for part, wanted in zip(logits.split(rows), targets.split(rows), strict=True):
        total += cross_entropy(part.float(), wanted, reduction="none").double().sum()
    return total


def _within(progress: Progress | None, done: int, size: int, count: int) -> Callable[[float], None]:
    """Return a callback that takes the finished share, 0 to 1, of a batch of `size` windows after `done` others."""
    if progress is None:
        return lambda share: None
    return lambda share: progress("perplexity", done + int(share * size), count)


def _exponential(mean_loss: float) -> float:
    try:
        return math.exp(mean_loss)
    except OverflowError:  # a broken model, whose number should be reported rather than raised
        return math.inf
