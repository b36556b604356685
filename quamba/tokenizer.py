"""The tokenizer of a checkpoint: the one given, its own, or the one that models of its layout use."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from quamba import embedded, sentencepiece
from quamba.errors import UserError
from quamba.layouts import Layout
from quamba.pretrained import sentence

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja",
)  # fmt: skip
PROBE = "the"
GIVE = "give one by --tokenizer: a directory, a Hub id or a SentencePiece FILE.model"


def open_tokenizer(path: Path, layout: Layout, given: str | Path | None = None) -> Any:
    """A transformers tokenizer for the checkpoint in ``path``.

    given: a directory, a Hub id, the name of an embedded checkpoint, or a SentencePiece file; such a file is also found
    beside the weights. Raises UserError when there is none, or when it cannot be read.
    """
    if given is not None:
        if str(given) in embedded.names():
            given = embedded.checkpoint(str(given))
        if Path(given).is_file():
            return sentencepiece.read(Path(given))
        return _read(given, f"tokenizer {str(given)!r} cannot be read")
    if layout.native or owned(path):
        return _read(path, f"{path} has no tokenizer that can be read")
    beside = sorted(path.glob("*.model"))
    if len(beside) == 1:
        return sentencepiece.read(beside[0])
    if layout.tokenizer is None:
        raise UserError(f"{path} has no tokenizer; {GIVE}")
    return _read(
        layout.tokenizer, f"{path} has no tokenizer, and {layout.tokenizer}, which such models use, cannot be had"
    )


def owned(path: Path) -> bool:
    """Whether a directory holds a tokenizer in transformers' own files."""
    return any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json"))


def _read(source: Any, why: str) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a tokenizer's files are parsed by several libraries, with errors of their own
        raise UserError(f"{why} ({sentence(error)}); {GIVE}") from None
    if not tokenizer(PROBE, add_special_tokens=False)["input_ids"]:
        # without its files a tokenizer's class makes an empty vocabulary and says nothing
        raise UserError(f"{why} (its vocabulary is empty); {GIVE}")
    return tokenizer


def texts(path: Path, tokenizer: Any) -> dict[str, str]:
    """Name -> text of the files from which transformers opens this tokenizer again: those of ``path`` as they are if
    it came from there, else written anew."""
    if (path / "tokenizer.json").is_file() and Path(tokenizer.name_or_path) == path:
        return {name: (path / name).read_text(encoding="utf-8") for name in FILES if (path / name).is_file()}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        written = sorted(Path(folder).iterdir())
        return {file.name: file.read_text(encoding="utf-8") for file in written if file.name in FILES}


def adopt(config: Any, tokenizer: Any) -> None:
    """Give a config that knows no special tokens those of its tokenizer; the end of text pads where nothing else does.

    Raises UserError for a tokenizer with more tokens than the model.
    """
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path} has {len(tokenizer)} tokens, the model {config.vocab_size}, "
            f"so the model was trained with another; {GIVE}"
        )
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
