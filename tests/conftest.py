"""Fixtures that more than one file of tests needs."""

import contextlib
import ctypes
import functools
import os
import shutil
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

# Read when torch is imported: OpenMP threads that wait by spinning slow the suite down many times on two shared cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import quamba
import quamba.decoding
from quamba import embedded
from quamba.models import ARCHITECTURES

torch.set_num_threads(1)


@pytest.fixture
def launches_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """(module of a stack's op, struct of its layers) -> a list that will have (kernel, struct, pointers of its first
    layer) of every launch; none happens."""

    def watch(module: Any, struct: type[ctypes.Structure]) -> list[tuple[str, Any, Any]]:
        seen: list[tuple[str, Any, Any]] = []

        def call(name, problem, device):
            layer = ctypes.cast(problem.layers, ctypes.POINTER(struct))[0]
            seen.append((name, problem, struct.from_buffer_copy(layer)))

        monkeypatch.setattr(module, "library", lambda index: SimpleNamespace(call=call))
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        return seen

    return watch


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that is handed out unwritten holds NaN (or a large integer), so that a result that lacks a write shows."""

    def poisoned(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
            elif tensor.dtype not in (torch.bool, torch.uint8):
                tensor.fill_(torch.iinfo(tensor.dtype).max)
            return tensor

        return made

    for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty",))):
        for name in names:
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    yield


@pytest.fixture(scope="session")
def build():
    """(model type, config, seed) -> a transformers model in fp32 whose every parameter is random but stable."""

    def scramble(name: str, tensor: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        noise = torch.randn(tensor.shape, generator=rng)
        if name.endswith("A_log"):
            return torch.log(1 + 7 * torch.rand(tensor.shape, generator=rng))
        if name.endswith(("dt_bias", "dt_proj.bias")):
            return 0.5 * noise - 1
        if tensor.dim() > 1:
            beside = "adapter" in name or name.endswith(".linear.weight")  # what adds to a path that is there already
            size = 0.25 if beside else 1.0
            return noise if "embedding" in name else size * noise / tensor[0].numel() ** 0.5
        gain = name.endswith(("norm.weight", "norm_f.weight"))
        return noise if name.endswith(".D") else 0.2 * noise + gain

    def made(model_type: str, config: dict[str, Any], seed: int = 0) -> Any:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config), dtype=torch.float32)
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                parameter.copy_(scramble(name, parameter, rng))
        return model.eval()

    return made


@pytest.fixture(scope="session")
def tiny_checkpoint(build, tmp_path_factory: pytest.TempPathFactory):
    """(model type, changes to its first tiny config, storage type) -> (directory with a tokenizer of 2048, model)."""

    @functools.cache
    def saved(model_type: str, changes: tuple[tuple[str, Any], ...] = (), dtype: torch.dtype = torch.float32):
        config = {**ARCHITECTURES[model_type].tiny[0], "vocab_size": 2048, **dict(changes)}
        model = build(model_type, config).to(dtype)
        folder = tmp_path_factory.mktemp(model_type)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(embedded.checkpoint(embedded.names()[0])).save_pretrained(folder)
        return folder, model

    return saved


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory):
    """A calibration file that is quick to tokenise."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(embedded.calibration_text().read_text(encoding="utf-8")[:6000], encoding="utf-8")
    return path


@pytest.fixture
def quantise(text, tmp_path):
    """(directory, recipe) -> the directory of the quantised model, calibrated on little."""

    def made(folder, recipe, name: str = "quantised", **options):
        options = {"samples": 4, "seqlen": 32, **options}
        return quamba.quantize(folder, recipe, tmp_path / name, calibration_text=text, device="cpu", **options).output

    return made


@pytest.fixture(scope="session")
def stock(tiny_checkpoint, text, tmp_path_factory: pytest.TempPathFactory):
    """(recipe, model type) -> the quantised directory of a tiny random model, made once."""

    @functools.cache
    def made(recipe: str, model_type: str):
        folder, _ = tiny_checkpoint(model_type)
        output = tmp_path_factory.mktemp("stock") / recipe
        return quamba.quantize(folder, recipe, output, calibration_text=text, samples=4, seqlen=32, device="cpu").output

    return made


class FakeGraph:
    """A CUDA graph on the CPU: recording changes no tensor, a replay repeats every operation on the recorded tensors.

    What a real capture forbids, reading a value on the host, raises.
    """

    def __init__(self):
        self.calls = []

    def replay(self):
        for func, args, kwargs, out in self.calls:
            new = func(*args, **kwargs)
            writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
            if not writes:
                for old, value in zip(_tensors(out), _tensors(new), strict=True):
                    if old.data_ptr() != value.data_ptr():
                        old.copy_(value)


def _tensors(tree):
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


class Recorder(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph, self.before = graph, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value was read on the host while a graph was recorded")
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in _tensors(given[argument.name]):
                    storage = tensor.untyped_storage()
                    self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        out = func(*args, **kwargs)
        self.graph.calls.append((func, args, kwargs, out))
        return out


@contextlib.contextmanager
def record(graph):
    with Recorder(graph) as recorder:
        yield
    for storage, value in recorder.before.values():
        storage.copy_(value)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch):
    """CUDA graphs as FakeGraph, and capture allowed on the CPU; the list of graphs that were made."""
    made = []

    class Counted(FakeGraph):
        def __init__(self):
            super().__init__()
            made.append(self)

    class Captures(quamba.decoding.Captured):
        def __init__(self, run, *, capture, eager=quamba.decoding.EAGER_STEPS):
            super().__init__(run, capture=True, eager=eager)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Counted)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(quamba.decoding, "Captured", Captures)
    return made


@pytest.fixture(scope="module")
def kernel_benchmark():
    """What imports a file of kernels/benchmarks by its name; these import one another so, as they do when they run."""
    folder = Path(__file__).resolve().parents[1] / "kernels" / "benchmarks"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield import_module
    for file in folder.glob("*.py"):
        sys.modules.pop(file.stem, None)


FAKE_NVCC = """#!{python}
import os, signal, subprocess, sys, time
given = sys.argv[1:]
if "--version" in given:
    sys.exit(print("Cuda compilation tools, release 99.0, V99.0.1"))
with open("{folder}/calls", "a") as calls:
    print(*given, file=calls)
output = given[given.index("-o") + 1]
mood = os.environ.get("NVCC_MOOD", "")
if mood == "fails":
    sys.exit(print(*(f"line {{i}}" for i in range(100)), "error: it does not compile", sep="\\n") or 2)
if mood:
    open(output, "w").write("half of")
    time.sleep(120) if mood == "hangs" else os.kill(os.getpid(), signal.SIGKILL)
given.remove(output)
kept = [a for a in given if a.startswith(("-D", "-I")) or a in ("-c", "-shared") or a.endswith((".o", ".cu"))]
sys.exit(subprocess.call(["cc", "-x", "c", "-fPIC", *kept, "-o", output] if "-c" in given else
                         ["cc", *kept, "-o", output]))
"""


@pytest.fixture
def fake_nvcc(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """An nvcc that compiles .cu files as C, with an empty cache: the folder whose file ``calls`` lists what it did.

    NVCC_MOOD in the environment makes it fail, hang or die.
    """
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    nvcc = tmp_path / "toolkit" / "bin" / "nvcc"
    version = tmp_path / "cutlass" / "include" / "cutlass" / "version.h"
    for path in (nvcc, version):
        path.parent.mkdir(parents=True)
    nvcc.write_text(FAKE_NVCC.format(python=sys.executable, folder=tmp_path))
    nvcc.chmod(0o755)
    version.write_text("#define CUTLASS_MAJOR 9\n#define CUTLASS_MINOR 8\n#define CUTLASS_PATCH 7\n")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    # a package comes before $CUTLASS_HOME, and one may be installed; child processes must find this one too
    package = tmp_path / "site" / "cutlass_library"
    (package / "source").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "source" / "include").symlink_to(tmp_path / "cutlass" / "include")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    monkeypatch.setenv("QUAMBA_CACHE", str(tmp_path / "cache"))
    for name in ("QUAMBA_CUDA_LIBRARY", "QUAMBA_CUDA_ARCH_LIST", "NVCC_MOOD"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path
