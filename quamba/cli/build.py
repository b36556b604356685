"""`quamba build`: compile the CUDA kernels ahead of time, for this machine or for another one."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from quamba.cli import console
from quamba.errors import UserError


def run(
    arch: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="The architectures, as in sm_80,sm_87,sm_90a: A100 is sm_80, A5000 and RTX 30 sm_86, Orin sm_87, L40 "
            "and RTX 40 sm_89, H100 and H200 sm_90a. By default $QUAMBA_CUDA_ARCH_LIST, else those of the GPUs here.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Also write the objects here, to take them to a machine without a compiler; there "
            "QUAMBA_CUDA_LIBRARY=DIR finds them.",
        ),
    ] = None,
) -> None:
    """Compile the CUDA kernels; otherwise the first use of a GPU does it, which takes minutes.

    Needs nvcc and the headers of CUTLASS (pip install nvidia-cutlass, or CUTLASS_HOME), but no GPU. Objects are kept
    in $QUAMBA_CACHE, by default ~/.cache/quamba, and are made again when sources or compiler change.

    Example: quamba build --arch sm_87 --output orin
    """
    if output is not None and output.exists() and not output.is_dir():
        raise UserError(f"The output '{output}' is a file; give a directory.")
    from quamba_kernels.cuda import build as kernels
    from quamba_kernels.cuda.objects import prebuilt_name
    from quamba_kernels.cuda.toolchain import CannotBuild

    table = console.table("object", "MB", "seconds")
    try:
        with console.progress() as progress:
            for name in architectures(arch):
                start = time.monotonic()
                made = kernels.build(name, progress=progress)
                seconds = time.monotonic() - start
                path = made if output is None else copy(made, output / prebuilt_name(name))
                table.add_row(str(path), console.megabytes(path.stat().st_size), f"{seconds:.1f}")
    except CannotBuild as error:
        raise UserError(f"The kernels cannot be compiled: {error}") from error
    except kernels.BuildFailed as error:
        console.err.print(f"Error: {error}", markup=False)
        raise typer.Exit(1) from None
    console.out.print(table)
    if output is not None:
        console.out.print(f"Use them with QUAMBA_CUDA_LIBRARY={output.resolve()}", markup=False)


def architectures(asked: str | None) -> list[str]:
    """The architectures asked for, else those of $QUAMBA_CUDA_ARCH_LIST, else those of the GPUs here."""
    from quamba_kernels.cuda import toolchain

    names = toolchain.asked_architectures() if asked is None else toolchain.architectures(asked)
    if names is not None:
        return names
    import torch

    found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if not found:
        raise UserError(f"There is no GPU here; name the architectures with --arch {','.join(toolchain.RUNS)}.")
    return list(dict.fromkeys(toolchain.of_device(capability) for capability in found))


def copy(source: Path, target: Path) -> Path:
    """Copy a file so that it appears whole, making its directory; returns ``target``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        os.replace(shutil.copy(source, scratch), target)
    return target
