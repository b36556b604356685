"""`quamba compare`: how far two models lie apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quamba.cli import console, files
from quamba.cli.options import Device, Dtype
from quamba.windows import check_prompt, read_text

if TYPE_CHECKING:
    from quamba.inspection import Comparison

NAMED = "A Hub id, a directory (original or quantised), or the name of an embedded checkpoint"


def run(
    a: Annotated[str, typer.Argument(metavar="A", help=f"{NAMED}: the reference.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help=f"{NAMED}, of the same shape.", show_default=False)],
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE.txt", help="The UTF-8 text that both read; by default the embedded one."),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=2, help="How many tokens from the start of the text, in windows of 512.")
    ] = 2048,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What both continue greedily; by default the text's first 32 tokens."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=0, help="Compare this many new tokens; 0 leaves greedy decoding out.")
    ] = 64,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write the results to this file; by default only printed."),
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Compare two models on the same text, A being the reference: an original with a quantised one, or two quantised.

    Prints ||b - a|| / ||a|| of the hidden states after each block (rotations undone), the Kullback-Leibler divergence
    of the next token's distribution in nats, how often both find the same token likeliest, and where greedy decoding
    first differs.

    Example: quamba compare mamba2-tiny mamba2-tiny-w4a8 --tokens 1024 --prompt "The first step is"
    """
    files.check_place(json_file)
    if text is not None:
        read_text(text)
    if prompt is not None:
        check_prompt(prompt)
    console.settle()
    import torch

    from quamba.inspection import compare

    with console.progress() as progress:
        found = compare(
            a,
            b,
            text=text,
            tokens=tokens,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            device=device,
            dtype=getattr(torch, dtype),
            progress=progress,
        )
    if json_file is not None:
        files.write_json(json_file, found.as_dict())
    show(found)


def show(found: Comparison) -> None:
    """Print the errors in a table, the rest in sentences."""
    table = console.table("after block", "error")
    for layer, error in enumerate(found.layer_errors):
        table.add_row(str(layer), f"{100 * error:.3f}%")
    console.out.print(table)
    console.out.print(
        f"KL divergence per token: mean {found.kl_mean:.3g}, 99th percentile {found.kl_p99:.3g} nats\n"
        f"same likeliest token: {100 * found.top1_agreement:.2f}% of {found.tokens}"
    )
    if not found.new_tokens:
        return
    where = found.divergence
    if where is None:
        console.out.print(f"greedy decoding: all of {found.new_tokens} new tokens agree")
        return
    said = [f"{token!r}" if number is not None else "the end" for token, number in ((where.a, where.a_id),
                                                                                   (where.b, where.b_id))]  # fmt: skip
    console.out.print(
        f"greedy decoding: differs at new token {where.position + 1} of {found.new_tokens}: A says {said[0]}, "
        f"B {said[1]}, after {(found.prompt + where.common)[-60:]!r}",
        markup=False,
    )
