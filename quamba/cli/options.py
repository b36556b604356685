"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face Hub id, a directory (original or quantised), or the name of an embedded checkpoint "
        "such as mamba2-tiny.",
        show_default=False,
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="DIR|ID|FILE.model",
        help="The tokenizer of a model that comes without one: a directory, a Hub id or a SentencePiece file; by "
        "default the model's own, or the one that models of its kind use.",
    ),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"],
    typer.Option("--dtype", help="The type of activations and of unquantised weights."),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option("--device", help="Where to run; auto takes the GPU if there is one."),
]
DeviceMap = Annotated[
    Literal["auto", "balanced", "balanced_low_0", "sequential"] | None,
    typer.Option(
        "--device-map",
        help="Spread a model larger than one device over the GPUs, the memory of the host and the disk, in "
        "accelerate's way; by default it lies on one device.",
    ),
]
OffloadFolder = Annotated[
    Path | None,
    typer.Option(
        "--offload-folder",
        metavar="DIR",
        help="Where --device-map puts weights that must be converted before they wait on disk; by default nowhere.",
    ),
]
