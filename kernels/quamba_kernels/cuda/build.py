"""Compiles csrc into one shared object per architecture, in a cache that several processes share.

An object is called quamba-ARCH-SOURCES-TOOLS.so, after hashes of the sources and of what compiled them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from filelock import FileLock, Timeout

from quamba_kernels.cuda.toolchain import CannotBuild, Toolchain

CSRC = Path(__file__).resolve().parents[1] / "csrc"
FLAGS = (
    "-O3", "-std=c++17", "-DNDEBUG", "--expt-relaxed-constexpr", "--expt-extended-lambda", "-Xcompiler", "-fPIC",
    "-cudart", "static",
)  # fmt: skip
JOB_MEMORY = 4 * 2**30
"""Bytes of free memory for each nvcc: one CUTLASS 3 kernel takes about 3 GB."""
LAST_LINES = 30

IDENTITY = ("quamba_identity", "quamba_error_string")
KERNELS = (
    "quamba_rms_norm", "quamba_quantize", "quamba_gate_output", "quamba_causal_conv1d", "quamba_selective_scan",
    "quamba_linear_w8a8_skinny", "quamba_linear_w4a8_skinny", "quamba_linear_w4a16_skinny", "quamba_linear_w8a8_gemm",
    "quamba_expand_w4a8", "quamba_expand_w4a16", "quamba_ssd_decode", "quamba_selective_decode", "quamba_conv_decode",
    "quamba_scan_codes", "quamba_scan_rates", "quamba_ssd_scan",
)  # fmt: skip
HOPPER = (
    "quamba_linear_w4a8_gemm", "quamba_linear_w4a16_gemm", "quamba_linear_w8a8_few", "quamba_linear_w4a8_few",
    "quamba_linear_w4a16_few", "quamba_ssd_stack_w8a8", "quamba_ssd_stack_w4a8", "quamba_ssd_stack_w4a16",
    "quamba_ssd_stack_w8a8_serves", "quamba_ssd_stack_w4a8_serves", "quamba_ssd_stack_w4a16_serves",
    "quamba_selective_stack_w8a8", "quamba_selective_stack_w4a8", "quamba_selective_stack_w4a16",
    "quamba_selective_stack_w8a8_serves", "quamba_selective_stack_w4a8_serves", "quamba_selective_stack_w4a16_serves",
    "quamba_ssd_prefill",
)  # fmt: skip

Progress = Callable[[str, int, int], None]
"""(what is being done, steps done, steps in all)"""


class BuildFailed(RuntimeError):
    """The compiler stopped, or what it made lacks a kernel."""


def expected(arch: str) -> tuple[str, ...]:
    """The C symbols that an object for this architecture holds."""
    return (*IDENTITY, *KERNELS, *(HOPPER if arch == "sm_90a" else ()))


def sources(arch: str, csrc: Path = CSRC) -> list[Path]:
    """The .cu files that are compiled for an architecture: *_sm90.cu for sm_90a alone, *_sm80.cu for the others."""
    other = "_sm80" if arch == "sm_90a" else "_sm90"
    return sorted(path for path in csrc.glob("*.cu") if not path.stem.endswith(other))


def sources_hash(arch: str, csrc: Path = CSRC) -> str:
    """16 hexadecimal digits over the names and contents of the sources and of all headers."""
    headers = [path for path in csrc.rglob("*") if path.suffix in (".h", ".cuh", ".hpp")]
    digest = hashlib.sha256()
    for name, path in sorted((path.relative_to(csrc).as_posix(), path) for path in [*sources(arch, csrc), *headers]):
        digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def identity(arch: str, csrc: Path = CSRC) -> str:
    """What ``quamba_identity()`` of an object says: sm_90a_0123456789abcdef."""
    return f"{arch}_{sources_hash(arch, csrc)}"


def cache() -> Path:
    """$QUAMBA_CACHE, else quamba in $XDG_CACHE_HOME or ~/.cache. Raises CannotBuild where there is no home."""
    if asked := os.environ.get("QUAMBA_CACHE"):
        return Path(asked)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quamba"
    except RuntimeError as error:
        raise CannotBuild("this user has no home directory; set QUAMBA_CACHE to a directory for objects") from error


def cached(arch: str, csrc: Path = CSRC) -> list[Path]:
    """The objects in the cache that were made of these sources by any compiler, newest first."""
    found = cache().glob(f"quamba-{arch}-{sources_hash(arch, csrc)}-*.so")
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def build(
    arch: str, csrc: Path = CSRC, *, symbols: Sequence[str] | None = None, progress: Progress | None = None
) -> Path:
    """The cached object for an architecture, compiled first if need be; ``symbols`` (by default ``expected``) must be
    in it. Of several processes that ask at once one compiles and the others wait; an object appears whole or not.

    Raises CannotBuild for want of nvcc, CUTLASS, sources or a writable cache, BuildFailed when the compiler stops.
    """
    report = progress or say
    tools, folder = Toolchain.find(), cache()
    if not sources(arch, csrc):
        raise CannotBuild(f"there are no CUDA sources in {csrc}")
    flags = [*FLAGS, f"-gencode=arch=compute_{arch[3:]},code={arch}", f"-DQUAMBA_SM={arch[3:].rstrip('a')}"]
    key = hashlib.sha256("\n".join([tools.identity, tools.cutlass, *flags]).encode()).hexdigest()[:8]
    name = f"quamba-{arch}-{sources_hash(arch, csrc)}-{key}"
    target = folder / f"{name}.so"
    if target.is_file():
        return target
    lock = FileLock(folder / f"{name}.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            report(f"waiting for another process that compiles for {arch}", 0, 1)
            lock.acquire()
    except OSError as error:
        raise CannotBuild(f"{folder} cannot be written ({error}); set QUAMBA_CACHE to a directory that can") from error
    try:
        if not target.is_file():
            for stale in folder.glob(f"{name}.part-*"):
                shutil.rmtree(stale)  # its process held this lock, so it is dead
            with tempfile.TemporaryDirectory(prefix=f"{name}.part-", dir=folder) as scratch:
                flags += [f"-DQUAMBA_IDENTITY={identity(arch, csrc)}", f"-I{csrc}"]
                made = _compile(tools, arch, sources(arch, csrc), flags, Path(scratch), report)
                if missing := missing_symbols(made, expected(arch) if symbols is None else symbols):
                    raise BuildFailed(f"the object for {arch} lacks {', '.join(missing)}: no file in {csrc} defines it")
                os.replace(made, target)
    finally:
        lock.release()
    return target


def _compile(tools: Toolchain, arch: str, files: list[Path], flags: list[str], scratch: Path, report: Progress) -> Path:
    """Compile every file, several at a time, and link them into an object in ``scratch``."""
    phase = f"compiling CUDA kernels for {arch} with nvcc {tools.release} and CUTLASS {tools.cutlass}"
    nvcc = [str(tools.nvcc), *flags, *(f"-I{include}" for include in tools.includes)]
    parts, made, steps = [scratch / f"{path.stem}.o" for path in files], scratch / "quamba.so", len(files) + 1
    report(phase, 0, steps)
    with ThreadPoolExecutor(jobs()) as pool:
        running = [pool.submit(_run, [*nvcc, "-c", str(a), "-o", str(b)]) for a, b in zip(files, parts, strict=True)]
        try:
            for done, finished in enumerate(as_completed(running), 1):
                finished.result()
                report(phase, done, steps)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    _run([*nvcc, "-shared", *map(str, parts), "-o", str(made), f"-L{tools.libraries}"])
    report(phase, steps, steps)
    return made


def _run(command: list[str]) -> None:
    """Run nvcc. Raises BuildFailed with its last lines and the command."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        how = f"status {done.returncode}" if done.returncode > 0 else f"signal {-done.returncode}"
        said = "\n".join(done.stdout.rstrip().splitlines()[-LAST_LINES:]) or "(it printed nothing)"
        raise BuildFailed(f"nvcc stopped with {how}:\n{said}\nThe command was: {shlex.join(command)}")


def missing_symbols(path: Path, symbols: Sequence[str]) -> list[str]:
    """Those of ``symbols`` that a shared object does not export. Needs no driver. Raises BuildFailed if it cannot be
    loaded."""
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildFailed(f"{path} cannot be loaded: {error}") from error
    return [symbol for symbol in symbols if not hasattr(loaded, symbol)]


def jobs() -> int:
    """Compilers at a time: as many as $MAX_JOBS, the cores and the free memory allow, at least one."""
    limits = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    if os.environ.get("MAX_JOBS", "").isdecimal():
        limits.append(int(os.environ["MAX_JOBS"]))
    if Path("/proc/meminfo").is_file():
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(int(lines["MemAvailable"].split()[0]) * 1024 // JOB_MEMORY)
    return max(1, min(limits))


def say(phase: str, done: int, total: int) -> None:
    """Progress on stderr: a line that is rewritten on a terminal, else the first and the last."""
    if sys.stderr.isatty():
        print(f"\rquamba: {phase}, {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done in (0, total):
        print(f"quamba: {phase}, {done}/{total}", file=sys.stderr, flush=True)
