"""`quamba eval`: perplexity on a text, and lm-eval tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quamba.cli import console, files
from quamba.cli.options import Device, DeviceMap, Dtype, Model, OffloadFolder, Tokenizer
from quamba.errors import UserError
from quamba.ranks import joined, launched
from quamba.windows import check_windows, read_text


def run(
    model: Model,
    perplexity: Annotated[
        Path | None,
        typer.Option(metavar="FILE.txt", help="Measure the perplexity on this UTF-8 text; by default not measured."),
    ] = None,
    window: Annotated[
        int, typer.Option(help="The length of a window, in tokens; every token but its first is predicted.")
    ] = 1024,
    max_windows: Annotated[
        int | None, typer.Option(help="Use this many windows from the start of the text; by default all of them.")
    ] = None,
    stepwise: Annotated[
        bool,
        typer.Option(
            "--stepwise", help="Read one token per step, as generation does; by default a window in one pass."
        ),
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="T1,T2", help="Run these lm-eval tasks or groups, separated by commas; by default none."),
    ] = None,
    tasks_path: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A directory of your own task YAMLs; by default only lm-eval's are known."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Use this many documents of each task; by default all of them.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="How many windows or documents run together; by default 4 windows, 16 if stepwise, 16 documents."
        ),
    ] = None,
    tokenizer: Tokenizer = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    device_map: DeviceMap = None,
    offload_folder: OffloadFolder = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write the results to this file; by default only printed."),
    ] = None,
) -> None:
    """Measure a model: perplexity on a text, accuracy on lm-eval tasks, or both.

    Perplexity is over windows that do not overlap, without special tokens; the incomplete last window is dropped. Under
    torchrun or accelerate launch several processes share windows and documents.

    Example: quamba eval mamba2-tiny --perplexity book.txt --window 512 --max-windows 20
    """
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if perplexity is None and not names:
        raise UserError("There is nothing to measure: give --perplexity FILE.txt, --tasks T1,T2 or both.")
    files.check_place(json_file)
    check_windows(window, max_windows, batch_size)
    if limit is not None and limit < 1:
        raise UserError(f"The limit of documents is at least 1, and {limit} was given.")
    if perplexity is not None:
        read_text(perplexity)
    if device_map is not None and launched():
        raise UserError("--device-map spreads the model of one process over the devices; here are several.")

    console.settle()
    import torch

    from quamba import evaluate
    from quamba.loading import load, pick_device

    # Before the model is loaded: a mistake should not cost minutes.
    manager = evaluate.find_tasks(names, tasks_path) if names else None

    results: dict[str, Any] = {"model": model}
    with joined(pick_device(device)) as ranks:
        network, opened = load(
            model, tokenizer=tokenizer, device=str(ranks.device), dtype=getattr(torch, dtype), device_map=device_map,
            offload_folder=offload_folder,
        )  # fmt: skip
        if perplexity is not None:
            with console.progress() as progress:
                results["perplexity"] = evaluate.perplexity(
                    network,
                    opened,
                    perplexity,
                    window=window,
                    max_windows=max_windows,
                    stepwise=stepwise,
                    batch_size=batch_size,
                    progress=progress,
                    ranks=ranks,
                )
        if names:
            results["tasks"] = evaluate.tasks(
                network, opened, names, limit=limit, batch_size=batch_size or 16, manager=manager, ranks=ranks
            )
        if json_file is not None and ranks.first:
            files.write_json(json_file, results)
    show(results)


def show(results: dict[str, Any]) -> None:
    """Print the perplexity in one line and the tasks in one table."""
    if "perplexity" in results:
        found = results["perplexity"]
        console.out.print(
            f"perplexity {found['value']:.4f} on {found['file']} "
            f"({found['windows']} windows, {found['tokens']} tokens predicted)"
        )
    if "tasks" in results:
        table = console.table("task", "metric", "value", "stderr")
        for name, metrics in results["tasks"].items():
            for metric, value in metrics.items():
                if "_stderr" not in metric:
                    stem, at, kept = metric.partition("@")
                    error = metrics.get(f"{stem}_stderr{at}{kept}")
                    table.add_row(name, metric, f"{value:.4f}", "-" if error is None else f"{error:.4f}")
        console.out.print(table)
