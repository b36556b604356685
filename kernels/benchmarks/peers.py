"""Other people's linears behind one interface; a package that is missing says so instead of failing.

Every one is called with the activations as its kernel takes them: int8 codes come with their scales, as they come to
our operators, so that nobody's quantisation of activations is timed.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

import torch
from problems import FP16, GROUP, Inputs, Problem, Shape, inputs, problem
from torch.nn import functional

from quamba_kernels.ops.linear import unpack_int4

Packed = tuple[torch.Tensor, ...]
Call = Callable[[Packed, Inputs], torch.Tensor]


class Peer(ABC):
    """A linear of another library; ``tolerance`` is the relative Frobenius error that its own roundings may cause."""

    name: ClassVar[str]
    package: ClassVar[str] = "torch"
    ops: ClassVar[tuple[str, ...]]
    tolerance: ClassVar[float]

    def why_not(self, op: str, rows: int) -> str | None:
        """None where the peer can run, else the reason in a sentence."""
        return None if op in self.ops else f"has no {op}"

    def prepare(self, jobs: Sequence[tuple[Shape, str, int]]) -> None:
        """Compile ahead for (shape, op, rows), where that saves time."""
        return

    def pack(self, given: Problem) -> Packed:
        """One copy of the weights in the peer's layout, all of whose tensors may be cloned."""
        return given.weights

    @abstractmethod
    def call(self, given: Problem, rows: int) -> Call:
        """A function of packed weights and activations [rows, K] that gives [rows, O]."""

    def finish(self, y: torch.Tensor, given: Problem, x: Inputs) -> torch.Tensor:
        """The output as the op defines it, for the gate alone."""
        return y


class Cublas(Peer):
    """What stands in a model that is not quantised."""

    name, ops, tolerance = "cublas-fp16", (FP16,), 2e-3

    def call(self, given: Problem, rows: int) -> Call:
        return lambda packed, x: functional.linear(x.x, packed[0])


class IntMm(Peer):
    """cuBLASLt's int8 product: int32 accumulators without scales, so less work than the op."""

    name, ops, tolerance = "torch._int_mm", ("linear_w8a8",), 1e-6

    def why_not(self, op: str, rows: int) -> str | None:
        few = None if rows > 16 else f"takes more than 16 rows, got {rows}"
        return super().why_not(op, rows) or few

    def call(self, given: Problem, rows: int) -> Call:
        return lambda packed, x: torch._int_mm(x.x, packed[0].t())

    def finish(self, y: torch.Tensor, given: Problem, x: Inputs) -> torch.Tensor:
        assert x.scale is not None
        return y.float() * x.scale * given.weights[1]


class Gemlite(Peer):
    """gemlite's kernels with the configurations that it ships for H100, or tuned for each shape with ``tune``.

    For a shape that its file lacks the configuration of the nearest one is taken: tuning all compiles thousands.
    It has no int8 x int4 with groups (its A8W4 multiplies fp8), so no linear_w4a8. Its products of few rows add up in
    fp16, by atomics, which is what the tolerance allows for.
    """

    name, package, ops, tolerance = "gemlite", "gemlite", ("linear_w8a8", "linear_w4a16"), 1e-2

    def __init__(self, tune: bool = False) -> None:
        self.core = importlib.import_module("gemlite.core")
        self.helper = importlib.import_module("gemlite.helper")
        self.closest = importlib.import_module("gemlite.triton_kernels.utils").get_closest_m
        self.tune = tune
        self.meta: dict[str, list[int]] = {}
        self.core.GemLiteLinear.load_config(str(Path(str(self.core.__file__)).parent / "configs" / "h100.json"))

    def prepare(self, jobs: Sequence[tuple[Shape, str, int]]) -> None:
        """Compile in other processes: each shape and number of rows is a kernel of its own, and Triton is serial."""
        if self.tune:
            return
        wanted: dict[tuple[Shape, str], list[int]] = {}
        for shape, op, rows in jobs:
            if op in self.ops:
                wanted.setdefault((shape, op), []).append(rows)
        workers = min(8, os.cpu_count() or 1)
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for report in pool.map(compile_gemlite, wanted, wanted.values()):
                print(report, end="", flush=True)

    def pack(self, given: Problem) -> Packed:
        if given.op == "linear_w8a8":
            codes, scale = given.weights
            made = self.helper.A8W8_int8_dynamic("cuda", torch.float16).from_weights(codes, scales=scale[:, None])
        else:
            words, scale = given.weights
            codes = (unpack_int4(words) + 8).to(torch.uint8)
            made = self.helper.A16W4_HQQ_INT("cuda", torch.float16).from_weights(
                codes, scale, torch.full_like(scale, 8.0)
            )
        self.meta[given.op] = made.get_meta_args()
        return tuple(t.detach() for t in made.get_tensor_args())

    def borrow(self, given: Problem, rows: int, kind: str, meta: list[int]) -> None:
        """Enter a configuration for this shape: that of the nearest shape of the same format and kernel."""
        known: dict[str, Any] = self.core.GEMLITE_TRITON_CONFIG_CACHE.setdefault(kind, {})
        K, outputs, form = given.shape.K, given.shape.O, (meta[4], meta[5] * 100 + meta[1])
        mine = str((self.closest(rows), outputs, K, meta[2], *form))
        same = []
        for key in known:
            m, n, k, group, *other = json.loads(f"[{key.strip('()')}]")
            if tuple(other) == form and group == (k if meta[2] == K else meta[2]):
                far = 3 * abs(math.log2(m / rows)) + abs(math.log2(n / outputs)) + abs(math.log2(k / K))
                same.append((far, key))
        if mine not in known and same:
            known[mine] = known[min(same)[1]]

    def call(self, given: Problem, rows: int) -> Call:
        meta = self.meta[given.op]
        kind = self.core.get_matmul_type(rows, meta[1])
        if not self.tune:
            self.borrow(given, rows, kind, meta)
        kernel, form = self.core.GEMLITE_TRITON_MAPPING[kind], meta[5] * 100 + meta[1]
        # what its forward does after it has quantised the activations
        return lambda packed, x: kernel.forward(x.x, *packed[:3], x.scale, *meta[1:-1], True, form, meta_scale=0.0)


def compile_gemlite(place: tuple[Shape, str], rows: Sequence[int]) -> str:
    """Fill Triton's cache on disk for one shape; a sentence for each number of rows that fails."""
    shape, op = place
    peer, rng = Gemlite(), torch.Generator("cuda").manual_seed(0)
    given = problem(shape, op, "cuda", rng)
    packed, report = peer.pack(given), ""
    for m in rows:
        try:
            peer.call(given, m)(packed, inputs(shape.K, m, op, "cuda", rng))
            torch.cuda.synchronize()
        except Exception as error:
            report += f"gemlite: {shape.model} {shape.role} {op} M={m}: {error!r:.200}\n"
    return report


class Humming(Peer):
    """humming's kernels as its heuristics choose them for each number of rows.

    Its tiles ask for a multiple of out features: 256 serves every kernel, and x_proj's 192 need no padding beside int8.

    Group scales beside int8 activations become integers of 10 bits, which is what the tolerance allows for.
    """

    name, package, ops, tolerance = "humming", "humming-kernels", ("linear_w8a8", "linear_w4a8", "linear_w4a16"), 2e-2

    def __init__(self) -> None:
        self.schema = importlib.import_module("humming.schema")
        self.dtypes = importlib.import_module("humming.dtypes")
        self.transform = importlib.import_module("humming.transform")
        self.forward = importlib.import_module("humming.forward")
        self.tuning = importlib.import_module("humming.tune")
        self.operators = importlib.import_module("humming.ops")
        self.kernel = importlib.import_module("humming.kernel.humming").HummingKernel

    def config(self, shape: Shape, op: str) -> Any:
        """Its description of a layer."""
        weight = self.schema.HummingWeightSchema(
            b_dtype="int8" if op == "linear_w8a8" else "int4",
            weight_scale_group_size=0 if op == "linear_w8a8" else GROUP,
        )
        narrow = shape.O < 256 and shape.O % 64 == 0 and op != "linear_w4a16"
        x = self.schema.HummingInputSchema(a_dtype="float16" if op == "linear_w4a16" else "int8")
        return self.transform.prepare_layer_config(
            shape.O, shape.K, weight, x, pad_n_to_multiple=64 if narrow else 256, torch_dtype=torch.float16,
            device=torch.cuda.current_device(),
        )  # fmt: skip

    def choice(self, config: Any, rows: int) -> str:
        """Its choice of a kernel for a number of rows, as it takes it in ``tuning_config``."""
        return json.dumps(self.tuning.get_heuristics_config(config, shape_m=rows))

    def prepare(self, jobs: Sequence[tuple[Shape, str, int]]) -> None:
        """Compile every kernel in parallel; one that fails is reported when its turn comes."""
        device = torch.cuda.current_device()

        def build(job: tuple[Shape, str, int]) -> None:
            shape, op, rows = job
            torch.cuda.set_device(device)
            try:
                config = self.config(shape, op)
                self.kernel.prepare_kernels(config.to_str(), None, self.choice(config, rows), device)
            except Exception as error:
                print(f"humming: {shape.model} {shape.role} {op} M={rows}: {error!r:.200}", flush=True)

        with ThreadPoolExecutor() as pool:
            list(pool.map(build, [job for job in jobs if job[1] in self.ops]))

    def pack(self, given: Problem) -> Packed:
        if given.op == "linear_w8a8":
            codes, scale = given.weights
            tensors = {
                "weight": self.operators.pack_weight(codes.to(torch.int32) + 128, 8), "weight_scale": scale[:, None]
            }  # fmt: skip
        else:
            words, factor, *channel = given.weights
            factor = factor.float() * channel[0][:, None] if channel else factor
            codes = unpack_int4(words).to(torch.int32) + 8
            tensors = {"weight": self.operators.pack_weight(codes, 4), "weight_scale": factor}
        tensors["weight_scale"] = tensors["weight_scale"].half()
        made = self.transform.transform_humming_tensors(self.config(given.shape, given.op), tensors)
        none = torch.empty(0, device="cuda")
        locks = torch.zeros(2048, dtype=torch.int32, device="cuda")
        return made["weight"], made["weight_scale"], made.get("weight_scale_2", none), locks

    def call(self, given: Problem, rows: int) -> Call:
        config = self.config(given.shape, given.op)
        tuning = self.choice(config, rows)

        def run(packed: Packed, x: Inputs) -> torch.Tensor:
            second = packed[2] if packed[2].numel() else None
            y: torch.Tensor = self.forward.humming_forward(
                config, x.x, packed[0], weight_scale=packed[1], weight_scale_2=second, input_scale=x.scale,
                locks=packed[3], tuning_config=tuning,
            )  # fmt: skip
            return y

        return run


NAMES = ("cublas-fp16", "torch._int_mm", "gemlite", "humming")


def installed(names: Sequence[str], tune: bool = False) -> tuple[list[Peer], dict[str, str]]:
    """The peers asked for that import here, and name -> version, or why it is missing."""
    makers: dict[str, tuple[str, Callable[[], Peer]]] = {
        "cublas-fp16": ("torch", Cublas), "torch._int_mm": ("torch", IntMm),
        "gemlite": ("gemlite", lambda: Gemlite(tune)), "humming": ("humming-kernels", Humming),
    }  # fmt: skip
    found, versions = [], {}
    for name in names:
        package, make = makers[name]
        try:
            versions[name] = version(package)
            found.append(make())
        except PackageNotFoundError:
            versions[name] = "not installed"
        except Exception as error:  # a peer that breaks on import must not take the others with it
            versions[name] = f"{versions[name]}, does not import: {error!r:.200}"
    return found, versions
