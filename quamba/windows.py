"""What a text and the windows cut from it have to be; free of torch, so that a mistake is told at once."""

from __future__ import annotations

from pathlib import Path

from quamba.errors import UserError


def read_text(path: str | Path) -> str:
    """Return the text of a UTF-8 file.

    Raises UserError if it is missing, not a file, not UTF-8 or has nothing but white space.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no text file '{path}'.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"'{path}' is not UTF-8 text.") from None
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}.") from None
    if not text.strip():
        raise UserError(f"'{path}' holds no text.")
    return text


def check_prompt(prompt: str) -> None:
    """Raise UserError for a prompt of nothing but white space, and for one that is not UTF-8."""
    if not prompt.strip():
        raise UserError("The prompt is empty; give at least one word to continue.")
    try:
        prompt.encode()
    except UnicodeEncodeError:  # Python stands in for such bytes of the command line
        raise UserError("The prompt is not UTF-8 text; give it in that encoding.") from None


def check_windows(window: int, max_windows: int | None = None, batch_size: int | None = None) -> None:
    """Raise UserError unless the window has a token to predict and the counts are positive."""
    if window < 2:
        raise UserError(f"A window needs at least 2 tokens, one to read and one to predict, and {window} was given.")
    if max_windows is not None and max_windows < 1:
        raise UserError(f"At least 1 window is needed, and at most {max_windows} was asked for.")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"The batch size is at least 1, and {batch_size} was given.")
