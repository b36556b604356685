"""`quamba quantize`: a checkpoint in, a quantised directory out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quamba.cli import console
from quamba.cli.options import Device, Model, Tokenizer
from quamba.errors import UserError
from quamba.ranks import joined

if TYPE_CHECKING:
    from quamba.pipeline import Report


def run(
    model: Model,
    recipe: Annotated[
        str,
        typer.Option(
            metavar="RECIPE",
            help="What becomes how many bits: w8a8, w4a8 or w4a16 (weights, activations), or a recipe FILE.yaml.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(metavar="DIR", help="The directory to write; it appears only when complete.", show_default=False),
    ],
    tokenizer: Tokenizer = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.txt|DATASET",
            help="Text that shows the model typical activations: a UTF-8 file or a Hub data set; "
            "by default the embedded text.",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="How many pieces of calibration text to read; by default as the recipe says."),
    ] = None,
    seqlen: Annotated[
        int | None, typer.Option(min=2, help="The length of a piece, in tokens; by default as the recipe says.")
    ] = None,
    seed: Annotated[
        int,
        typer.Option(min=0, max=2**63 - 1, help="The seed that picks the pieces; the same seed gives the same bits."),
    ] = 0,
    device: Device = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the output directory if it exists; by default refuse.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Keep finished layers beside the output until it is complete, and go on after those that an "
            "interrupted run with --resume kept; by default nothing is kept.",
        ),
    ] = False,
    linears_only: Annotated[
        bool,
        typer.Option(
            "--linears-only",
            help="Quantise the linears of a model of any type, and nothing else; by default a type that is not known "
            "is an error.",
        ),
    ] = False,
) -> None:
    """Quantise a model and write it as a Hugging Face directory.

    Prints the sizes before and after, the time, and the peak memory above the start. Under torchrun several processes
    share the work, and write the same bytes.

    Example: quamba quantize mamba2-tiny --recipe w4a8 --output mamba2-tiny-w4a8
    """
    if calibration is not None and means_a_file(calibration) and not Path(calibration).is_file():
        raise UserError(f"There is no calibration file '{calibration}'.")
    console.settle()
    from quamba.loading import pick_device
    from quamba.pipeline import quantize
    from quamba.recipe import load_recipe

    with joined(pick_device(device)) as ranks, console.progress() as progress:
        report = quantize(
            model,
            load_recipe(recipe),
            output,
            tokenizer=tokenizer,
            calibration_text=calibration,
            samples=samples,
            seqlen=seqlen,
            seed=seed,
            device=device,
            overwrite=overwrite,
            resume=resume,
            linears_only=linears_only,
            progress=progress,
            say=lambda line: console.err.print(line, markup=False),
            ranks=ranks,
        )
    show(report)


def means_a_file(calibration: str) -> bool:
    """Tell `text.txt` and `./text` from `owner/dataset`."""
    return calibration.endswith(".txt") or calibration.startswith((".", "/", "~"))


def show(report: Report) -> None:
    """Print the sizes of a finished run in MB (10^6 bytes), its seconds and its peak memory."""
    sizes = report.sizes
    parts = [name for name in ("layers", "embedding", "lm_head") if sizes.get(f"{name}_original") or sizes.get(name)]
    rows = [(name, sizes.get(f"{name}_original", 0), sizes.get(name, 0)) for name in parts]
    rows.append(("total", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    table = console.table("part", "original MB", "quantised MB", "ratio")
    for name, before, after in rows:
        table.add_row(name, console.megabytes(before), console.megabytes(after), console.ratio(after, before))
    console.out.print(table)
    console.out.print(f"time: {report.seconds:.1f} s")
    console.out.print(
        f"peak memory above the start: {console.megabytes(report.peak_memory)} MB "
        f"(largest layer: {console.megabytes(report.largest_layer)} MB)"
    )
    for note in report.notes:
        console.out.print(note)
    console.out.print(f"written to {report.output}")
