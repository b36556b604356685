"""`quamba doctor`: what is installed, what is plugged in, and which backend serves which operator."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from typing import Any

from quamba.cli import console

PACKAGES = ("torch", "transformers", "triton", "safetensors")


def run() -> None:
    """Report versions, devices, and for every operator the backend that serves it and why the others cannot.

    Paste its output into a bug report.

    Example: quamba doctor
    """
    console.settle()
    from quamba_kernels.registry import doctor

    console.out.print("[bold]Versions[/bold]")
    for name, found in versions().items():
        console.out.print(f"  {name:<13} {found}")
    console.out.print("\n[bold]Devices[/bold]")
    for line in devices():
        console.out.print(f"  {line}")
    console.out.print("\n[bold]Compiled CUDA kernels[/bold]")
    for line in objects():
        console.out.print(f"  {line}", markup=False)
    console.out.print("\n[bold]Operators[/bold]")
    if forced := os.environ.get("QUAMBA_BACKEND"):
        console.out.print(f"  QUAMBA_BACKEND={forced} takes precedence over the choices below.")
    for line in operators(doctor()):
        console.out.print(line, markup=False)


def versions() -> dict[str, str]:
    """Return name -> version of everything that a result depends on, or in words why there is none."""
    import torch

    from quamba import __version__

    found = {"quamba": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["CUDA"] = torch.version.cuda or "none: this torch is built for the CPU"
    found["nvcc"] = _nvcc()
    found["CUTLASS"] = _cutlass()
    return found


def _nvcc() -> str:
    """Return the release of the CUDA compiler that kernels are compiled with, and where it is."""
    from quamba_kernels.cuda import toolchain

    try:
        nvcc = toolchain.find_nvcc()
        return f"{toolchain.release(toolchain.nvcc_identity(nvcc))} ({nvcc})"
    except toolchain.CannotBuild as error:
        return str(error)


def _cutlass() -> str:
    """Return the version of CUTLASS that kernels are compiled with, and where it is."""
    from quamba_kernels.cuda import toolchain

    try:
        headers = toolchain.find_cutlass()
        return f"{toolchain.cutlass_version(headers)} ({headers})"
    except toolchain.CannotBuild as error:
        return str(error)


def objects() -> list[str]:
    """Return one line per compiled object that is of the present sources: in the cache or named by the user."""
    from quamba_kernels.cuda.build import cache, cached
    from quamba_kernels.cuda.objects import PREBUILT
    from quamba_kernels.cuda.toolchain import RUNS, CannotBuild

    named = os.environ.get(PREBUILT)
    lines = [f"{PREBUILT}={named} takes precedence over the cache."] if named else []
    try:
        lines += [f"{arch:<7} {path}" for arch in RUNS for path in cached(arch)]
    except CannotBuild as error:
        return [*lines, str(error)]
    return lines or [f"none in {cache()}; `quamba build` makes them, or else the first use of a GPU"]


def devices() -> list[str]:
    """Return one line per device: the CPU with its vector instructions, each GPU with its memory and capability."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    lines = [f"cpu     {platform.machine()}, {capability}, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = gpu.total_memory / 2**30
        lines.append(f"cuda:{index}  {gpu.name}, {memory:.1f} GiB, compute capability {gpu.major}.{gpu.minor}")
    return lines if len(lines) > 1 else [*lines, "cuda    no GPU that torch can use"]


def operators(rows: list[dict[str, Any]]) -> list[str]:
    """Return lines that explain `rows` of the registry: op, device, backend, usable, reason, chosen."""
    lines = []
    for (device, name), group in groupby(rows, key=lambda row: (row["device"], row["op"])):
        backends = list(group)
        lines.append(f"  {name} on {device}: {', '.join(row['backend'] for row in backends if row['chosen'])}")
        for row in backends:
            if not row["chosen"]:
                why = "usable, but a faster one is chosen" if row["usable"] else row["reason"]
                lines.append(f"    not {row['backend']}: {why}")
    return lines
