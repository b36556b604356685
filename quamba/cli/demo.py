"""`quamba demo`: the whole toolkit on an embedded model, without a download or a GPU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from quamba.cli import console
from quamba.errors import UserError

# Sized for a minute and a half on two CPU cores; a model of 1.9 M parameters needs little calibration.
WINDOW, SAMPLES = 512, 16
FIRST = ("w8a8", "w4a8", "w4a16")
SPEAKER, PROMPT = "w4a8", "The first step is to"


def run(
    model: Annotated[
        str, typer.Option(metavar="NAME", help="The embedded checkpoint: mamba1-tiny or mamba2-tiny.")
    ] = "mamba2-tiny",
    windows: Annotated[
        int, typer.Option(min=1, help=f"How many windows of {WINDOW} tokens of validation text to measure on.")
    ] = 8,
) -> None:
    """Quantise an embedded model with every stock recipe and show what it costs and saves.

    Takes about 90 s on two CPU cores; writes only to a temporary directory.

    Example: quamba demo --model mamba1-tiny --windows 8
    """
    console.settle()
    from quamba import embedded
    from quamba.pipeline import quantize
    from quamba.recipe import load_recipe, stock_recipes

    if model not in embedded.names():
        raise UserError(f"No embedded checkpoint is called '{model}'; there are {', '.join(embedded.names())}.")
    source = embedded.checkpoint(model)
    recipes = sorted(stock_recipes(), key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))

    original = weight_bytes(source)
    table = console.table("model", "perplexity", "weights MB", "ratio", title=f"{model}, {windows} x {WINDOW} tokens")
    table.add_row("original", f"{measure(source, windows):.3f}", console.megabytes(original), "1.000")
    speech = ""
    with tempfile.TemporaryDirectory(prefix="quamba-demo-") as scratch:
        for recipe in recipes:
            output = Path(scratch) / recipe
            with console.progress() as progress:
                quantize(
                    source,
                    load_recipe(recipe),
                    output,
                    samples=SAMPLES,
                    seqlen=WINDOW,
                    progress=labelled(progress, recipe),
                )
            size = weight_bytes(output)
            value = f"{measure(output, windows):.3f}"
            table.add_row(recipe.upper(), value, console.megabytes(size), console.ratio(size, original))
            if recipe == SPEAKER or SPEAKER not in recipes:
                speech = f"{recipe.upper()} continues:\n{continuation(output)}"
    console.out.print(table)
    console.out.print(f"\n{speech}", markup=False)


def weight_bytes(directory: Path) -> int:
    """Return the size on disk, in bytes, of the weights of a checkpoint, without its tokenizer and configuration."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def measure(directory: Path, windows: int) -> float:
    """Return the perplexity of a checkpoint on the embedded validation text."""
    import torch

    from quamba import embedded, evaluate
    from quamba.loading import load

    model, tokenizer = load(directory, dtype=torch.float32)
    with console.progress() as progress:
        found = evaluate.perplexity(
            model,
            tokenizer,
            embedded.validation_text(),
            window=WINDOW,
            max_windows=windows,
            progress=labelled(progress, directory.name),
        )
    return found["value"]


def continuation(directory: Path) -> str:
    """Return what a checkpoint makes of the prompt, sampled with a fixed seed: greedy tiny models repeat themselves."""
    import torch

    from quamba.generation import generate
    from quamba.loading import load

    model, tokenizer = load(directory, dtype=torch.float32)
    return generate(model, tokenizer, PROMPT, max_new_tokens=48, temperature=0.7, top_p=0.9)


def labelled(progress: Callable[[str, int, int], None], label: str) -> Callable[[str, int, int], None]:
    """Return `progress` with `label` before the name of every phase."""
    return lambda phase, done, total: progress(f"{label}: {phase}", done, total)
