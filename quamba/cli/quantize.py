"""`quamba quantize`: a checkpoint in, a quantised directory out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quamba.cli import console, files
from quamba.cli.options import Device, Model, Tokenizer
from quamba.errors import UserError
from quamba.ranks import joined

if TYPE_CHECKING:
    from quamba.budget import Found
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
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The directory to write; it appears only when complete. Needed unless --search-only is given.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="BITS|BYTES",
            help="Give each linear of each layer the scheme that serves it best within this size: bits per weight of "
            "the linears (4.5: codes and scales, the head included), or bytes of the whole model (30MB, 28MiB). By "
            "default the recipe decides.",
        ),
    ] = None,
    schemes: Annotated[
        str,
        typer.Option(
            metavar="SCHEMES",
            help="The schemes that --budget chooses from: same-inputs (the recipe's 8- or 16-bit inputs stay), cuda "
            "(of these what the CUDA kernels take: no groups below 32), any-inputs, or a FILE.yaml.",
        ),
    ] = "same-inputs",
    search_only: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml", help="Write the recipe that --budget finds to this file, and quantise nothing."
        ),
    ] = None,
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

    Prints the sizes before and after, the time, and the peak memory above the start; with --budget first what was
    chosen. The recipe that was found lies in the output as recipe.yaml, and --recipe takes it again, as it is or
    edited. Under torchrun several processes share the work, and write the same bytes.

    Example: quamba quantize mamba2-tiny --recipe w4a8 --output mamba2-tiny-w4a8

    Example: quamba quantize mamba2-tiny --recipe w4a8 --budget 4.5 --output mamba2-tiny-4.5
    """
    if calibration is not None and means_a_file(calibration) and not Path(calibration).is_file():
        raise UserError(f"There is no calibration file '{calibration}'.")
    if output is None and search_only is None:
        raise UserError("Nothing is to be written; give --output DIR.")
    if budget is None and search_only is not None:
        raise UserError("--search-only writes what --budget finds; give --budget too, as in --budget 4.5.")
    if budget is not None and linears_only:
        raise UserError("--budget chooses among the linears of a described model; leave --linears-only out.")
    files.check_place(search_only)
    console.settle()
    from quamba.loading import pick_device
    from quamba.pipeline import quantize
    from quamba.recipe import load_recipe, parse_recipe

    with joined(pick_device(device)) as ranks:
        chosen = load_recipe(recipe)
        given: dict[str, Any] = {
            "tokenizer": tokenizer, "calibration_text": calibration, "samples": samples, "seqlen": seqlen,
            "seed": seed, "device": str(ranks.device),
        }  # fmt: skip
        if budget is not None:
            from quamba.budget import search

            with console.progress() as progress:
                found = search(model, chosen, budget, schemes=schemes, progress=progress, **given)
            # every process has searched; where rounding let them find others, they take what the first one found
            chosen = parse_recipe(ranks.tell(found.recipe.model_dump(mode="json")), "searched")
            show_found(found)
        if search_only is not None:
            if ranks.first:
                files.write(search_only, chosen.as_yaml().encode())
            console.out.print(f"recipe written to {search_only}")
            return
        assert output is not None
        with console.progress() as progress:
            report = quantize(
                model, chosen, output, overwrite=overwrite, resume=resume, linears_only=linears_only,
                progress=progress, say=lambda line: console.err.print(line, markup=False), ranks=ranks, **given,
            )  # fmt: skip
    show(report)


def means_a_file(calibration: str) -> bool:
    """Tell `text.txt` and `./text` from `owner/dataset`."""
    return calibration.endswith(".txt") or calibration.startswith((".", "/", "~"))


def show_found(found: Found) -> None:
    """Print how many linears of each role got which scheme, the bits per weight and the bytes that it comes to."""
    counts = Counter((part.role, option.scheme) for part, option in zip(found.parts, found.choice, strict=True))
    schemes = [name for name in found.schemes if any(scheme == name for _, scheme in counts)]
    table = console.table("linears", *(name or "(recipe)" for name in schemes))
    for role in dict.fromkeys(part.role for part in found.parts):
        table.add_row(role, *(str(counts[role, name] or "-") for name in schemes))
    console.out.print(table)
    console.out.print(
        f"linears: {found.bits:.4f} bits per weight; model: {console.megabytes(found.linears + found.fixed)} MB; "
        f"sum of the measured losses: {found.expected:.3g} nats per token"
    )


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
