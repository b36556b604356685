"""What compiling for an NVIDIA GPU takes: nvcc, the headers of CUTLASS, and the name of the architecture."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

RUNS = {
    "sm_80": ("sm_80",),
    "sm_86": ("sm_86", "sm_80"),
    "sm_87": ("sm_87",),
    "sm_89": ("sm_89", "sm_86", "sm_80"),
    "sm_90a": ("sm_90a",),
}
"""Architecture of a device -> those whose objects run on it, best first. Orin (sm_87) runs nothing but its own."""

ARCH_LIST = "QUAMBA_CUDA_ARCH_LIST"


class CannotBuild(RuntimeError):
    """Something is missing that the user can supply: a compiler, headers, a directory, a known architecture."""


@dataclass(frozen=True)
class Toolchain:
    """nvcc, its release ("13.0.88") and the text it identifies itself by, CUTLASS's include directories and version."""

    nvcc: Path
    release: str
    identity: str
    includes: tuple[Path, ...]
    cutlass: str

    @classmethod
    def find(cls) -> Toolchain:
        """Raises CannotBuild when nvcc or CUTLASS is not there."""
        nvcc, headers = find_nvcc(), find_cutlass()
        identity = nvcc_identity(nvcc)
        utilities = headers.parent / "tools" / "util" / "include"
        return cls(nvcc, release(identity), identity, (headers, utilities), cutlass_version(headers))

    @property
    def libraries(self) -> Path:
        """Where the CUDA of pip packages keeps libcudart_static.a, which its nvcc does not know."""
        return self.nvcc.resolve().parents[1] / "lib"


def find_nvcc() -> Path:
    """The compiler in $CUDA_HOME, on the PATH, in pip's nvidia-cuda-nvcc or in /usr/local/cuda, in that order."""
    home = os.environ.get("CUDA_HOME")
    folders = [Path(home) / "bin"] if home else []
    found = [shutil.which("nvcc", path=str(folder)) for folder in folders] + [shutil.which("nvcc")]
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        found += [shutil.which("nvcc", path=str(folder)) for folder in sorted(Path(place).glob("*/bin"))]
    found.append(shutil.which("nvcc", path="/usr/local/cuda/bin"))
    for path in found:
        if path is not None:
            return Path(path)
    raise CannotBuild(
        "no nvcc in $CUDA_HOME, on the PATH, in pip's nvidia-cuda-nvcc or in /usr/local/cuda; install the CUDA "
        "toolkit, or `pip install nvidia-cuda-nvcc nvidia-cuda-cccl`"
    )


def find_cutlass() -> Path:
    """The include directory of CUTLASS: of the package nvidia-cutlass, else of $CUTLASS_HOME."""
    places = []
    spec = importlib.util.find_spec("cutlass_library")
    if spec is not None and spec.origin:
        places.append(Path(spec.origin).parent / "source" / "include")
    if home := os.environ.get("CUTLASS_HOME"):
        places.append(Path(home) / "include")
    for place in places:
        if (place / "cutlass" / "version.h").is_file():
            return place
    looked = f" (no cutlass/version.h in {' or '.join(map(str, places))})" if places else ""
    raise CannotBuild(
        f"no headers of CUTLASS{looked}; `pip install nvidia-cutlass`, or set CUTLASS_HOME to a checkout of CUTLASS"
    )


def nvcc_identity(nvcc: Path) -> str:
    """What ``nvcc --version`` prints. Raises CannotBuild when it does not run."""
    try:
        return subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise CannotBuild(f"{nvcc} does not run: {error}") from error


def release(identity: str) -> str:
    """The release in what ``nvcc --version`` prints, as "13.0.88"."""
    found = re.search(r"release [\d.]+, V([\d.]+)", identity)
    return found.group(1) if found else "of unknown release"


def cutlass_version(headers: Path) -> str:
    """major.minor.patch from cutlass/version.h."""
    text = (headers / "cutlass" / "version.h").read_text(encoding="utf-8")
    return ".".join(re.findall(r"#define CUTLASS_(?:MAJOR|MINOR|PATCH)\s+(\d+)", text))


def architecture(name: str) -> str:
    """The full name of "80", "8.0" or "sm_80". Raises CannotBuild for one that the kernels are not written for."""
    full = "sm_" + name.strip().lower().removeprefix("sm_").replace(".", "")
    if full in RUNS:
        return full
    hint = "; for Hopper say sm_90a" if full == "sm_90" else ""
    raise CannotBuild(f"there is no architecture {name.strip()!r}; known are {', '.join(RUNS)}{hint}")


def architectures(text: str) -> list[str]:
    """The architectures of a list that is separated by commas, semicolons or blanks. Raises CannotBuild."""
    names = dict.fromkeys(architecture(part) for part in re.split(r"[,;\s]+", text.strip()) if part)
    if not names:
        raise CannotBuild(f"the list of architectures is empty; known are {', '.join(RUNS)}")
    return list(names)


def asked_architectures() -> list[str] | None:
    """Those of $QUAMBA_CUDA_ARCH_LIST, None where it is not set. Raises CannotBuild for a name that is not known."""
    text = os.environ.get(ARCH_LIST)
    if not text:
        return None
    try:
        return architectures(text)
    except CannotBuild as error:
        raise CannotBuild(f"{ARCH_LIST}={text!r}: {error}") from error


def of_device(capability: tuple[int, int]) -> str:
    """The architecture of a device from its compute capability. Raises CannotBuild when there are no kernels for it."""
    major, minor = capability
    name = f"sm_{major}{minor}" + ("a" if major == 9 else "")
    if name not in RUNS:
        raise CannotBuild(f"the kernels are written for {', '.join(RUNS)}, and this device is {name}")
    return name
