"""A loaded object: csrc/linear.h as ctypes, and calls that turn every status into an error."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from quamba_kernels.cuda.build import IDENTITY, expected, identity
from quamba_kernels.cuda.objects import find
from quamba_kernels.cuda.toolchain import RUNS, CannotBuild, of_device

UNSUPPORTED = -1
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}

_POINTERS = ("x", "x_scale", "w", "w_scale", "w_multiplier", "bias", "residual", "out_scale", "y", "workspace")
_INTEGERS = (
    "M", "O", "K", "S", "x_scale_count", "out_scale_count", "x_dtype", "y_dtype", "bias_dtype", "residual_dtype",
)  # fmt: skip


class QuambaLinear(ctypes.Structure):
    """The struct of csrc/linear.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("workspace_bytes", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in _INTEGERS),
    ]

    def __str__(self) -> str:
        names = {code: str(dtype).removeprefix("torch.") for dtype, code in DTYPES.items()}
        return f"M={self.M} O={self.O} K={self.K} S={self.S}, x {names[self.x_dtype]}, y {names[self.y_dtype]}"


class Library:
    """The kernels of one object; ``arch`` is what it was compiled for."""

    def __init__(self, path: Path, device_arch: str) -> None:
        """Raises CannotBuild when the object is made of other sources, for another device, or lacks a kernel."""
        try:
            self._loaded = ctypes.CDLL(str(path))
        except OSError as error:
            raise CannotBuild(f"{path} cannot be loaded: {error}") from error
        self.path, self.arch = path, self._checked(path, device_arch)
        self._loaded.quamba_error_string.restype = ctypes.c_char_p
        self._kernels = {name: self._kernel(name) for name in expected(self.arch) if name not in IDENTITY}

    def _checked(self, path: Path, device_arch: str) -> str:
        if not hasattr(self._loaded, "quamba_identity"):
            raise CannotBuild(f"{path} holds no kernels of quamba: it lacks quamba_identity")
        self._loaded.quamba_identity.restype = ctypes.c_char_p
        made_of = self._loaded.quamba_identity().decode()
        arch = made_of.rpartition("_")[0]
        again = f"make it again with `quamba build --arch {device_arch}`"
        if arch not in RUNS[device_arch]:
            raise CannotBuild(f"{path} is for {arch}, which does not run on this device ({device_arch}); {again}")
        if made_of != identity(arch):
            raise CannotBuild(f"{path} is of other sources ({made_of}) than those here ({identity(arch)}); {again}")
        if missing := [name for name in expected(arch) if not hasattr(self._loaded, name)]:
            raise CannotBuild(f"{path} lacks {', '.join(missing)}; {again}")
        return arch

    def _kernel(self, name: str) -> tuple[Any, Any]:
        """A kernel's entry point, and the function that says how many bytes of scratch it needs (or None)."""
        kernel, workspace = getattr(self._loaded, name), getattr(self._loaded, f"{name}_workspace", None)
        kernel.argtypes, kernel.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_int
        if workspace is not None:
            workspace.argtypes, workspace.restype = [ctypes.c_void_p], ctypes.c_longlong
        return kernel, workspace

    def serves(self, name: str, problem: Any) -> bool:
        """What an entry point that launches nothing says of a problem. Raises RuntimeError on an error of CUDA."""
        status = self._kernels[name][0](ctypes.byref(problem), None)
        if status not in (0, UNSUPPORTED):
            why = self._loaded.quamba_error_string(status).decode()
            raise RuntimeError(f"{name} on {self.arch} failed with {problem}: CUDA error {status}, {why}")
        return bool(status == 0)

    def call(self, name: str, problem: Any, device: torch.device) -> None:
        """Launch a kernel on the current stream of ``device``, which must be the current device; ``problem`` is the
        struct that it takes.

        Raises RuntimeError when the kernel does not take the problem or CUDA reports an error.
        """
        kernel, workspace = self._kernels[name]
        size = workspace(ctypes.byref(problem)) if workspace is not None else 0
        scratch = torch.empty(size, dtype=torch.uint8, device=device) if size > 0 else None
        problem.workspace, problem.workspace_bytes = (0, 0) if scratch is None else (scratch.data_ptr(), size)
        status = kernel(ctypes.byref(problem), torch.cuda.current_stream(device).cuda_stream)
        if status == UNSUPPORTED:
            raise RuntimeError(f"{name} on {self.arch} does not serve {problem}")
        if status:
            why = self._loaded.quamba_error_string(status).decode()
            raise RuntimeError(f"{name} on {self.arch} failed with {problem}: CUDA error {status}, {why}")


@functools.cache
def library(device_index: int) -> Library:
    """The kernels for a CUDA device, found or compiled on the first call. Raises CannotBuild, BuildFailed."""
    arch = of_device(torch.cuda.get_device_capability(device_index))
    return Library(find(arch), arch)
