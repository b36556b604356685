"""`quamba inspect`: bits, bytes, errors and activations of every layer and role."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quamba.cli import console, files
from quamba.cli.options import Device, Dtype, Model
from quamba.cli.quantize import means_a_file
from quamba.errors import UserError

if TYPE_CHECKING:
    from quamba.inspection import Inspection, Row


def run(
    model: Model,
    original: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The checkpoint that a quantised MODEL was made of. With it the weight error is measured; by default "
            "only what rounding alone costs is told, from the stored scales.",
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.txt|DATASET",
            help="Text to measure activations on: a UTF-8 file or a Hub data set; by default the embedded text.",
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=0, help="How many pieces of that text to read; 0 measures no activations.")
    ] = 8,
    seqlen: Annotated[int, typer.Option(min=1, help="The length of a piece, in tokens.")] = 512,
    seed: Annotated[int, typer.Option(help="The seed that picks the pieces.")] = 0,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write everything to this file; by default only printed."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="Also draw outliers before and after rotation, error by layer, and size by part (needs matplotlib).",
        ),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(
            help="The layer whose outliers --plot shows; by default the one with the largest max/rms before rotation."
        ),
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Show what every layer and role of a model weighs, what quantisation did to it, and what it reads.

    "bits" are per weight, scales included. "error" is ||stored - exact|| / ||exact||, exact being the original weights
    after the recipe's exact transforms; "rounding" is step / sqrt(12) over the weights, both as root mean squares. GPTQ
    moves weights further than rounding does, to keep outputs right.

    Of the input of a linear: "max |x|" over all tokens and channels; its outlier ratio "max/rms", that maximum over
    the root mean square of all values; "outliers", the share of channels whose own maximum exceeds 3 times that of the
    median channel. A quantised model is measured as it runs, after its rotations.

    Example: quamba inspect mamba2-tiny-w4a8 --original mamba2-tiny --plot mamba2-tiny.png
    """
    for file in (json_file, plot):
        files.check_place(file)
    if calibration is not None and means_a_file(calibration) and not Path(calibration).is_file():
        raise UserError(f"There is no calibration file '{calibration}'.")
    if layer is not None and plot is None:
        raise UserError("--layer picks what a plot shows; give it together with --plot FILE.png.")
    if plot is not None and not samples:
        raise UserError("A plot shows activations; give --samples of at least 1 with --plot.")
    console.settle()
    import torch

    from quamba.inspection import inspect
    from quamba.inspection import plot as plots

    if plot is not None:
        plots.require()
    with console.progress() as progress:
        found = inspect(
            model,
            original,
            text=calibration,
            samples=samples,
            seqlen=seqlen,
            seed=seed,
            device=device,
            dtype=getattr(torch, dtype),
            progress=progress,
        )
    picture = None if plot is None else plots.draw(found, layer)
    if json_file is not None:
        files.write_json(json_file, found.as_dict())
    if plot is not None and picture is not None:
        files.write(plot, picture)
    show(found)


def show(found: Inspection) -> None:
    """Print a row for every layer and role and the totals."""
    measured = ("bits", "MB", "error", "rounding", "max |x|", "max/rms", "outliers")
    table = console.table("layer", "role", "stored as", *measured)
    table.columns[1].justify = table.columns[2].justify = "left"
    last: int | None = -1
    for row in found.rows:
        if row.layer != last:
            table.add_section()
        table.add_row(*cells(row))
        last = row.layer
    table.add_section()
    table.add_row("total", "", found.recipe, f"{found.bits:.2f}", console.megabytes(found.bytes),
                  percent(found.weight_error), percent(found.rounding), "", "", "")  # fmt: skip
    console.out.print(table)
    ran = f"activations on {found.tokens} tokens" if found.tokens else "no activations measured"
    console.out.print(f"{found.model}: {found.model_type}, {ran}", markup=False)


def cells(row: Row) -> list[str]:
    """A row of the table; a dash where there is nothing to tell."""
    seen = row.input
    return [
        "-" if row.layer is None else str(row.layer),
        row.role,
        row.stored_as or "-",
        "-" if row.bits is None else f"{row.bits:.2f}",
        console.megabytes(row.bytes),
        percent(row.weight_error),
        percent(row.rounding),
        *(("-", "-", "-") if seen is None else (f"{seen.peak:.4g}", f"{seen.outlier_ratio:.1f}",
                                                percent(seen.outlier_channels))),
    ]  # fmt: skip


def percent(value: float | None) -> str:
    """Return a share with two digits after the point, or a dash."""
    return "-" if value is None else f"{100 * value:.2f}%"
