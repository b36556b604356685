"""Two trained 1.9 M-parameter checkpoints and two texts, so that the demo and the tests need no network.

What they are and where they come from stands in the README.md beside this file.
"""

from importlib.resources import files
from pathlib import Path

_CHECKPOINTS = ("mamba1-tiny", "mamba2-tiny")


def _root() -> Path:
    return Path(str(files(__name__)))


def names() -> list[str]:
    """Names that `checkpoint` accepts."""
    return list(_CHECKPOINTS)


def checkpoint(name: str) -> Path:
    """Hugging Face directory (config, safetensors, tokenizer) of the embedded checkpoint `name`.

    Raises KeyError for an unknown name; the message lists the known ones.
    """
    if name not in _CHECKPOINTS:
        raise KeyError(f"no embedded checkpoint is called {name!r}; known: {', '.join(_CHECKPOINTS)}")
    return _root() / name


def calibration_text() -> Path:
    """UTF-8 text for calibration, about 300 KB, one paragraph per line; shares no page with `validation_text`."""
    return _root() / "calibration.txt"


def validation_text() -> Path:
    """UTF-8 text for perplexity, about 200 KB, one paragraph per line."""
    return _root() / "validation.txt"
