"""Which shared object serves a device: one built elsewhere, one from the cache, or one compiled now."""

from __future__ import annotations

import os
from pathlib import Path

from quamba_kernels.cuda.build import Progress, build, cached
from quamba_kernels.cuda.toolchain import ARCH_LIST, RUNS, CannotBuild, Toolchain, asked_architectures

PREBUILT = "QUAMBA_CUDA_LIBRARY"


def prebuilt_name(arch: str) -> str:
    """What `quamba build --output` calls the object of an architecture."""
    return f"quamba-{arch}.so"


def prebuilt(device_arch: str) -> Path | None:
    """The object that $QUAMBA_CUDA_LIBRARY names for a device: the file itself, or the best in that directory.

    None where the variable is not set. Raises CannotBuild when there is no such object: the variable is an order.
    """
    named = os.environ.get(PREBUILT)
    if not named:
        return None
    path = Path(named)
    if path.is_file():
        return path
    names = [prebuilt_name(arch) for arch in RUNS[device_arch]]
    for name in names:
        if (path / name).is_file():
            return path / name
    raise CannotBuild(
        f"{PREBUILT}={named} is no file and holds no {' or '.join(names)}; make it with "
        f"`quamba build --arch {device_arch} --output {named}`"
    )


def chosen(device_arch: str) -> str:
    """The architecture to compile for a device: its own, or the best of $QUAMBA_CUDA_ARCH_LIST. Raises CannotBuild."""
    asked = asked_architectures()
    if asked is None:
        return device_arch
    for arch in RUNS[device_arch]:
        if arch in asked:
            return arch
    raise CannotBuild(f"{ARCH_LIST} names {', '.join(asked)}, none of which runs on this device ({device_arch})")


def why_not(device_arch: str) -> str | None:
    """Why there is no object for a device and none can be compiled, in a sentence."""
    try:
        if prebuilt(device_arch) is None and not cached(chosen(device_arch)):
            Toolchain.find()
    except CannotBuild as error:
        return str(error)
    return None


def find(device_arch: str, progress: Progress | None = None) -> Path:
    """The object for a device. Without nvcc any object in the cache that was made of these sources will do.

    Raises CannotBuild, BuildFailed.
    """
    named = prebuilt(device_arch)
    if named is not None:
        return named
    arch = chosen(device_arch)
    try:
        return build(arch, progress=progress)
    except CannotBuild:
        if known := cached(arch):
            return known[0]
        raise
