"""`quamba generate`: continue a text."""

from __future__ import annotations

from typing import Annotated

import typer

from quamba.cli import console
from quamba.cli.options import Device, Model, Tokenizer
from quamba.errors import UserError
from quamba.windows import check_prompt


def run(
    model: Model,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many new tokens.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="How much to vary: 0 always takes the likeliest token, 1 samples as trained.")
    ] = 0.0,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the likeliest tokens whose probabilities reach this sum, above 0 and at most 1; "
            "by default from all."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The seed of the sampling.")] = 0,
    tokenizer: Tokenizer = None,
    device: Device = "auto",
) -> None:
    """Continue a text and print it word by word, the prompt first.

    Example: quamba generate mamba2-tiny --prompt "The first step is" --max-new-tokens 40
    """
    check_prompt(prompt)
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"--top-p is above 0 and at most 1, and {top_p} was given.")
    if top_p is not None and temperature == 0:
        raise UserError("--top-p has an effect only with a --temperature above 0.")
    console.settle()
    from quamba.generation import generate
    from quamba.loading import load

    network, opened = load(model, tokenizer=tokenizer, device=device)
    generate(
        network,
        opened,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=1.0 if top_p is None else top_p,
        seed=seed,
        stream=True,
    )
