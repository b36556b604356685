"""Shared objects of CUDA kernels: what they are compiled with, where they are kept, what happens when that fails."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from quamba.cli import app
from quamba.cli import build as command
from quamba_kernels import OPS, BackendUnavailable, Setting
from quamba_kernels.cuda import build as building
from quamba_kernels.cuda import objects, toolchain
from quamba_kernels.cuda.build import BuildFailed, build, expected, missing_symbols
from quamba_kernels.cuda.library import Library
from quamba_kernels.cuda.toolchain import RUNS, CannotBuild, Toolchain

KERNEL = """
__global__ void write(int* y) { *y = QUAMBA_SM; }
extern "C" int answer(int* y, void* stream) {
  write<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(y);
  return cudaGetLastError();
}
"""


def missing_tools() -> str | None:
    try:
        Toolchain.find()
    except CannotBuild as error:
        return str(error)
    return None


@pytest.fixture
def csrc(tmp_path) -> Path:
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "one.cu").write_text("int answer(void) { return QUAMBA_SM; }\n")
    (folder / "two.cu").write_text('#include "two.h"\nint two(void) { return TWO; }\n')
    (folder / "two.h").write_text("#define TWO 2\n")
    return folder


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """A machine with no compiler, no CUTLASS and an empty cache."""
    for name in ("CUDA_HOME", "CUTLASS_HOME", objects.PREBUILT, toolchain.ARCH_LIST):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("QUAMBA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(toolchain.shutil, "which", lambda name, path=None: None)
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)


def calls(folder: Path) -> list[str]:
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


def executable(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


# what it is compiled with


@pytest.mark.usefixtures("nothing")
def test_missing_tools_are_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CannotBuild, match=r"no nvcc in \$CUDA_HOME, .*pip install nvidia-cuda-nvcc"):
        toolchain.find_nvcc()
    with pytest.raises(CannotBuild, match="no headers of CUTLASS; `pip install nvidia-cutlass`, or set CUTLASS_HOME"):
        toolchain.find_cutlass()
    monkeypatch.setenv("CUTLASS_HOME", "/no/where")
    with pytest.raises(CannotBuild, match="no cutlass/version.h in /no/where/include"):
        toolchain.find_cutlass()
    assert "no nvcc" in str(objects.why_not("sm_80"))


def test_nvcc_is_looked_for_in_order(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, path = executable(tmp_path / "home/bin/nvcc"), executable(tmp_path / "path/nvcc")
    package = executable(tmp_path / "site/nvidia/cu99/bin/nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    for nvcc in (home, path, package):
        assert toolchain.find_nvcc() == nvcc
        nvcc.unlink()


def test_cutlass_is_looked_for_in_order(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, home = tmp_path / "site/cutlass_library", tmp_path / "home"
    for include in (package / "source/include", home / "include"):
        (include / "cutlass").mkdir(parents=True)
        (include / "cutlass/version.h").write_text("#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n")
    (package / "__init__.py").write_text("raise ImportError('only looked for')")
    monkeypatch.setenv("CUTLASS_HOME", str(home))
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert toolchain.find_cutlass() == package / "source/include"
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    assert toolchain.find_cutlass() == home / "include"
    assert toolchain.cutlass_version(home / "include") == "4.2"


def test_architectures_are_read() -> None:
    assert toolchain.architectures("80; sm_87,9.0a SM_80") == ["sm_80", "sm_87", "sm_90a"]
    assert toolchain.of_device((9, 0)) == "sm_90a" and toolchain.of_device((8, 7)) == "sm_87"
    with pytest.raises(CannotBuild, match="no architecture '90'; known are sm_80, .*; for Hopper say sm_90a"):
        toolchain.architectures("80,90")
    with pytest.raises(CannotBuild, match="is empty"):
        toolchain.architectures(" ;")
    for capability, name in (((7, 5), "sm_75"), ((12, 0), "sm_120")):
        with pytest.raises(CannotBuild, match=f"written for sm_80, .* and this device is {name}"):
            toolchain.of_device(capability)


def test_the_list_of_architectures_overrides_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(toolchain.ARCH_LIST, raising=False)
    assert [objects.chosen(arch) for arch in RUNS] == list(RUNS)
    monkeypatch.setenv(toolchain.ARCH_LIST, "80;90a")
    assert [objects.chosen(arch) for arch in ("sm_80", "sm_86", "sm_89", "sm_90a")] == ["sm_80"] * 3 + ["sm_90a"]
    with pytest.raises(CannotBuild, match=r"names sm_80, sm_90a, none of which runs on this device \(sm_87\)"):
        objects.chosen("sm_87")
    monkeypatch.setenv(toolchain.ARCH_LIST, "80;75")
    assert "QUAMBA_CUDA_ARCH_LIST='80;75': there is no architecture '75'" in str(objects.why_not("sm_80"))


def test_files_are_picked_by_architecture(csrc: Path) -> None:
    for name in ("gemm_sm80.cu", "gemm_sm90.cu", "gemm_sm90.cuh"):
        (csrc / name).write_text("")
    assert [p.name for p in building.sources("sm_90a", csrc)] == ["gemm_sm90.cu", "one.cu", "two.cu"]
    assert [p.name for p in building.sources("sm_87", csrc)] == ["gemm_sm80.cu", "one.cu", "two.cu"]


# where it is kept


def test_an_object_is_compiled_once(fake_nvcc: Path, csrc: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    made = build("sm_87", csrc, symbols=("answer", "two"), progress=lambda *step: seen.append(step))
    assert made.parent == fake_nvcc / "cache" and made.name.startswith("quamba-sm_87-")
    assert [done for _, done, _ in seen] == [0, 1, 2, 3] and {total for *_, total in seen} == {3}
    assert "sm_87" in seen[0][0] and "nvcc 99.0.1 and CUTLASS 9.8.7" in seen[0][0]
    assert len(calls(fake_nvcc)) == 3
    assert build("sm_87", csrc, symbols=("answer",)) == made and len(calls(fake_nvcc)) == 3
    assert missing_symbols(made, ("answer", "three")) == ["three"]
    flags = ("-gencode=arch=compute_87,code=sm_87", "-DQUAMBA_SM=87", "-O3", "-cudart static", "-Xcompiler -fPIC")
    assert all(flag in call for call in calls(fake_nvcc) for flag in flags)
    assert {p.suffix for p in made.parent.iterdir()} == {".so", ".lock"}


def test_the_key_covers_what_an_object_is_made_of(fake_nvcc: Path, csrc: Path) -> None:
    def made() -> str:
        return build("sm_90a", csrc, symbols=()).name

    names = [made()]
    (csrc / "two.h").write_text("#define TWO 3\n")
    names.append(made())
    (csrc / "more_sm80.cu").write_text("")
    assert made() == names[-1]  # not compiled for sm_90a
    nvcc = fake_nvcc / "toolkit/bin/nvcc"
    nvcc.write_text(nvcc.read_text().replace("V99.0.1", "V99.0.2"))
    names.append(made())
    version = fake_nvcc / "cutlass/include/cutlass/version.h"
    version.write_text(version.read_text().replace("8", "6"))
    names.append(made())
    assert len(set(names)) == 4
    assert build("sm_80", csrc, symbols=()).name not in names


def test_two_processes_compile_once(fake_nvcc: Path, csrc: Path) -> None:
    code = f"from pathlib import Path; from quamba_kernels.cuda.build import build; " \
           f"print(build('sm_80', Path({str(csrc)!r}), symbols=('two',)))"  # fmt: skip
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert printed[0] == printed[1] and Path(printed[0].strip()).is_file()
    assert len(calls(fake_nvcc)) == 3


def test_without_nvcc_any_object_of_the_same_sources_is_taken(
    fake_nvcc: Path, csrc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build("sm_80", csrc, symbols=())
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: (_ for _ in ()).throw(CannotBuild("no nvcc")))
    for name in ("cached", "build"):
        original = getattr(building, name)
        monkeypatch.setattr(objects, name, lambda arch, progress=None, original=original: original(arch, csrc))
    assert objects.find("sm_80") == made == objects.find("sm_80")
    assert objects.why_not("sm_80") is None
    (csrc / "two.h").write_text("#define TWO 4\n")
    with pytest.raises(CannotBuild, match="no nvcc"):
        objects.find("sm_80")
    assert objects.why_not("sm_80") == "no nvcc"


def test_the_cache_follows_the_environment(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUAMBA_CACHE", str(tmp_path / "mine"))
    assert building.cache() == tmp_path / "mine"
    monkeypatch.delenv("QUAMBA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert building.cache() == tmp_path / "quamba"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert building.cache() == tmp_path / ".cache/quamba"


def test_objects_made_elsewhere_are_found(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(objects.PREBUILT, str(tmp_path))
    with pytest.raises(CannotBuild, match="holds no quamba-sm_86.so or quamba-sm_80.so; make it with `quamba"):
        objects.find("sm_86")
    for name in ("quamba-sm_80.so", "quamba-sm_90a.so"):
        (tmp_path / name).write_text("")
    assert objects.find("sm_86").name == "quamba-sm_80.so" and objects.why_not("sm_86") is None
    assert "holds no quamba-sm_87.so" in str(objects.why_not("sm_87"))
    monkeypatch.setenv(objects.PREBUILT, str(tmp_path / "quamba-sm_90a.so"))
    assert objects.find("sm_90a").name == "quamba-sm_90a.so"


# what happens when it fails


def test_a_compiler_that_stops_is_quoted(fake_nvcc: Path, csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVCC_MOOD", "fails")
    with pytest.raises(BuildFailed) as failed:
        build("sm_80", csrc, symbols=())
    said = str(failed.value)
    assert "nvcc stopped with status 2" in said and "error: it does not compile" in said and "line 90" in said
    assert "line 5\n" not in said and f"The command was: {fake_nvcc}/toolkit/bin/nvcc -O3" in said
    assert {p.suffix for p in (fake_nvcc / "cache").iterdir()} == {".lock"}
    monkeypatch.delenv("NVCC_MOOD")
    assert build("sm_80", csrc, symbols=()).is_file()


def test_a_killed_compiler_leaves_nothing(fake_nvcc: Path, csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVCC_MOOD", "dies")
    with pytest.raises(BuildFailed, match=r"signal 9:\n\(it printed nothing\)"):
        build("sm_80", csrc, symbols=())
    assert {p.suffix for p in (fake_nvcc / "cache").iterdir()} == {".lock"}


def test_a_killed_build_is_taken_up_by_the_next(fake_nvcc: Path, csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"from pathlib import Path; from quamba_kernels.cuda.build import build; build('sm_80', Path({str(csrc)!r}))"
    environment = {**os.environ, "NVCC_MOOD": "hangs"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, start_new_session=True)
    while not calls(fake_nvcc):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list((fake_nvcc / "cache").glob("*.so")) and list((fake_nvcc / "cache").glob("*.part-*"))
    made = build("sm_80", csrc, symbols=("answer",))
    assert {p.name for p in made.parent.iterdir()} == {made.name, f"{made.stem}.lock"}


def test_an_object_without_a_kernel_is_not_kept(fake_nvcc: Path, csrc: Path) -> None:
    with pytest.raises(BuildFailed, match="lacks quamba_identity, .*quamba_linear_w8a8_skinny.*: no file in"):
        build("sm_80", csrc)
    (csrc / "two.cu").write_text("int nowhere(void); int two(void) { return nowhere(); }")
    with pytest.raises(BuildFailed, match="cannot be loaded: .*undefined symbol: nowhere"):
        build("sm_80", csrc, symbols=())
    assert not list((fake_nvcc / "cache").glob("*.so"))


def test_a_cache_that_cannot_be_written(fake_nvcc: Path, csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fake_nvcc / "file").write_text("")
    monkeypatch.setenv("QUAMBA_CACHE", str(fake_nvcc / "file" / "cache"))
    with pytest.raises(CannotBuild, match="cannot be written .*; set QUAMBA_CACHE"):
        build("sm_80", csrc)
    (csrc / "one.cu").unlink(), (csrc / "two.cu").unlink()
    with pytest.raises(CannotBuild, match="there are no CUDA sources in"):
        build("sm_80", csrc)


# the backend and the command


def test_the_backend_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(shape=None, dtype=torch.bfloat16, device="cuda", op="linear_w4a8") -> str:
        shape = {"K": 256, "O": 64, "S": 128} if shape is None else dict(zip("KOS", shape, strict=True))
        return str(OPS[op].explain(Setting(device, dtype, shape))["cuda"])

    assert "these are on cpu" in reason(device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason() == "torch finds no NVIDIA GPU here"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "this device is sm_75" in reason()
    assert reason((200, 64, 100)) == "takes K a multiple of 32 and O a multiple of 8, got K=200 and O=64"
    assert reason((256, 12, 128)) == "takes K a multiple of 32 and O a multiple of 8, got K=256 and O=12"
    assert reason((240, 64, 24)).endswith("got K=240 and O=64") and "S=48" in reason((192, 64, 48))
    assert reason(dtype=torch.float32, op="linear_w4a16") == "takes activations of float16 or bfloat16, got float32"
    monkeypatch.setenv("QUAMBA_BACKEND", "cuda")
    with pytest.raises(BackendUnavailable, match="asks for 'cuda', but .*sm_75. Usable here: .*torch"):
        OPS["linear_w8a8"].bind(Setting("cuda", torch.bfloat16, {"K": 64, "O": 64}))


@pytest.mark.usefixtures("nothing")
def test_the_backend_says_that_it_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for name in ("linear_w8a8", "linear_w4a8", "linear_w4a16"):
        assert str(OPS[name].explain(Setting("cuda", torch.bfloat16))["cuda"]).startswith("no nvcc in $CUDA_HOME")


def run(*arguments):
    return CliRunner().invoke(app, ["build", *map(str, arguments)])


@pytest.mark.usefixtures("nothing")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--arch", "sm_80"], "The kernels cannot be compiled: no nvcc in $CUDA_HOME"),
        (["--arch", "sm_12"], "there is no architecture 'sm_12'; known are sm_80, sm_86, sm_87, sm_89, sm_90a."),
        (["--arch", "sm_80", "--output", __file__], "test_cuda_build.py' is a file; give a directory."),
        ([], "There is no GPU here; name the architectures with --arch sm_80,sm_86,sm_87,sm_89,sm_90a."),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(arguments, sentence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    result = run(*arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.output
    assert sentence in result.stderr


def test_the_command_builds_and_copies(fake_nvcc: Path, csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build_trivial(arch, **options):
        return build(arch, csrc, symbols=(), **options)

    monkeypatch.setattr(building, "build", build_trivial)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    result = run("--output", fake_nvcc / "out")
    assert result.exit_code == 0, result.output
    assert [p.name for p in (fake_nvcc / "out").iterdir()] == ["quamba-sm_86.so"]
    assert "quamba-sm_86.so" in result.stdout and f"QUAMBA_CUDA_LIBRARY={fake_nvcc}/out" in result.stdout
    assert result.stderr == ""
    monkeypatch.setenv(toolchain.ARCH_LIST, "80")
    assert command.architectures(None) == ["sm_80"] and command.architectures("87") == ["sm_87"]
    assert run("--arch", "sm_80,sm_90a").exit_code == 0
    monkeypatch.setenv("NVCC_MOOD", "fails")
    result = run("--arch", "sm_87")
    assert result.exit_code == 1 and "error: it does not compile\nThe command was" in result.stderr


def test_doctor_knows_the_tools_and_the_objects(fake_nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quamba.cli import doctor

    versions = doctor.versions()
    assert versions["nvcc"].startswith("99.0.1 (") and versions["CUTLASS"].startswith("9.8.7 (")
    assert "none in" in doctor.objects()[0]
    path = fake_nvcc / "cache" / f"quamba-sm_89-{building.sources_hash('sm_89')}-01234567.so"
    path.parent.mkdir()
    path.write_text("")
    assert doctor.objects() == [f"sm_89   {path}"]
    monkeypatch.setenv(objects.PREBUILT, "orin")
    assert doctor.objects()[0] == "QUAMBA_CUDA_LIBRARY=orin takes precedence over the cache."


def test_progress_off_a_terminal_is_the_first_and_the_last_line(capsys) -> None:
    for done in range(4):
        building.say("compiling", done, 3)
    assert capsys.readouterr().err == "quamba: compiling, 0/3\nquamba: compiling, 3/3\n"


def test_jobs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAX_JOBS", raising=False)
    assert 1 <= building.jobs() <= (os.cpu_count() or 1)
    monkeypatch.setenv("MAX_JOBS", "1")
    assert building.jobs() == 1


# the real compiler


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_nvcc_compiles_what_loads_without_a_gpu(arch, tmp_path, csrc, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        nvcc = toolchain.find_nvcc()
    except CannotBuild as error:
        pytest.skip(str(error))
    for path in csrc.iterdir():
        path.unlink()
    (csrc / "kernel.cu").write_text(KERNEL)
    (csrc / f"other_sm{90 if arch == 'sm_80' else 80}.cu").write_text("#error not for this architecture")
    tools = Toolchain(nvcc, "13", "nvcc", (tmp_path,), "none")  # CUTLASS is not needed here
    monkeypatch.setattr(building.Toolchain, "find", lambda: tools)
    monkeypatch.setenv("QUAMBA_CACHE", str(tmp_path / "cache"))
    made = build(arch, csrc, symbols=("answer",))
    assert missing_symbols(made, ("answer", "cudaMalloc")) == ["cudaMalloc"]  # the runtime is inside, and hidden
    (csrc / "kernel.cu").write_text("nonsense")
    with pytest.raises(BuildFailed, match=r"kernel.cu\(1\): error: .*\n(.*\n)*The command was: "):
        build(arch, csrc, symbols=())


@pytest.mark.cuda_build
@pytest.mark.parametrize("arch", ["sm_80", "sm_87", "sm_90a"])
def test_every_kernel_is_in_the_object(arch: str) -> None:
    if reason := missing_tools():
        pytest.skip(reason)
    made = build(arch)
    assert missing_symbols(made, expected(arch)) == []
    assert Library(made, arch).arch == arch
