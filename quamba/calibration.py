"""Text -> windows of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from quamba import embedded, memory
from quamba.errors import UserError
from quamba.models.spec import ModelSpec


def read_text(source: str | Path | None) -> str:
    """The text of a file, of a Hugging Face dataset's "text" column ("name" or "name:split"), or the embedded one.

    Raises UserError when it cannot be had or holds nothing.
    """
    path = embedded.calibration_text() if source is None else Path(source)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"calibration file {path} is not UTF-8 text") from None
        except OSError as error:
            raise UserError(f"calibration file {path} cannot be read: {error.strerror}") from None
    elif path.exists():
        raise UserError(f"calibration {path} is no file; give a UTF-8 text file or a dataset's name")
    elif path.suffix:
        raise UserError(f"calibration file {path} does not exist")
    else:
        text = _dataset_text(str(source))
    if not text.strip():
        raise UserError(f"calibration text {source or path} is empty")
    return text


def _dataset_text(name: str) -> str:
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"calibration {name!r} is no file, and datasets need pip install quamba[eval]") from None
    name, _, split = name.partition(":")
    try:
        rows = load_dataset(name, split=split or "train")
    except Exception as error:  # datasets raises a family of its own, and network errors of several libraries
        raise UserError(f"calibration {name!r} is neither a file nor a dataset that can be loaded: {error}") from None
    if "text" not in rows.column_names:
        raise UserError(f'dataset {name!r} has no "text" column, only {", ".join(rows.column_names)}')
    return "\n".join(rows["text"])


def windows(
    text: str, tokenizer: Any, samples: int, seqlen: int, seed: int, model: ModelSpec | None = None
) -> torch.Tensor:
    """Random windows of the tokenised text, int64 [samples, seqlen], the same for the same seed.

    Raises UserError when the text has fewer than seqlen tokens and, of a model, when it has no embedding for one of
    them or its hidden states, fp32 [samples, seqlen, d_model], exceed the memory of this machine.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) < seqlen:
        raise UserError(f"calibration text has {len(ids)} tokens, a sample {seqlen}; give more text or less --seqlen")
    if model is not None:
        _check_fit(model, int(ids.max()), samples, seqlen)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - seqlen + 1, (samples,), generator=generator)
    return ids[starts[:, None] + torch.arange(seqlen)]


def _check_fit(model: ModelSpec, largest: int, samples: int, seqlen: int) -> None:
    if largest >= model.vocab:
        raise UserError(
            f"the tokenizer gives token {largest}, and the model embeds {model.vocab}; give the model's own tokenizer"
        )
    needed, total = 4 * samples * seqlen * model.d_model * model.streams, memory.installed()
    if needed > total:
        raise UserError(
            f"{samples} samples of {seqlen} tokens take {needed / 1e9:.0f} GB, and this machine has "
            f"{total / 1e9:.0f} GB; give fewer --samples"
        )
