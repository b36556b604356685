"""What a backend must agree with: fresh cases for every op, the error metric, and the tolerance beside each op.

``cases(name)`` draws inputs of awkward sizes; ``outcome(backend, case)`` runs one of them; ``disagreement(got, want,
tolerance)`` says in a sentence where two outcomes differ. A new op adds a generator and a tolerance here.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

import quamba_kernels
from quamba_kernels.registry import Backend, Setting

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

TOLERANCE: dict[str, dict[torch.dtype, float]] = {
    # relative Frobenius norm by type of the activations; one rounding to bf16 is up to 2^-9 = 2e-3
    "quantize": {F32: 0.0, BF16: 0.0},  # codes and scales only
    "quantize_state": {F32: 0.0, BF16: 0.0},
    "quantize_states": {F32: 0.0, BF16: 0.0},
    "embedding": {F32: 0.0, BF16: 0.0},  # one product and one rounding
    "likeliest": {F32: 0.0, F16: 0.0, BF16: 0.0},  # indices
    "rms_norm": {F32: 1e-6, BF16: 2e-3},
    "gate_output": {F32: 2e-6, BF16: 2e-3},
    "rotate_input": {F32: 2e-6, BF16: 2e-3},
    "causal_conv1d": {F32: 1e-6, BF16: 2e-3},
    # a backend may round the sum and the output, the body rounds once
    "linear_w8a8": {F32: 1e-6, F16: 8e-4, BF16: 6e-3},
    "linear_w4a8": {F32: 1e-6, F16: 8e-4, BF16: 6e-3},
    "linear_w4a16": {F32: 2e-6, F16: 1e-3, BF16: 8e-3},  # and the scales of the weights
    "norm_linear": {F32: 2e-3, F16: 2e-3, BF16: 8e-3},  # a code of the input may round the other way
    "ssd_scan": {F32: 5e-6, BF16: 2e-3},
    "ssd_prefill": {F32: 5e-6, BF16: 4e-3},  # a code of x, B or C may round the other way
    "ssd_update": {F32: 2e-6, BF16: 2e-3},
    "selective_scan": {F32: 5e-6, BF16: 2e-3},
    "selective_prefill": {F32: 5e-6, BF16: 2e-3},
    "selective_update": {F32: 2e-6, BF16: 2e-3},
    "conv_decode": {F32: 1e-6, BF16: 2e-3},
    # elements of an fp16 state may round the other way; B, C and x are rounded to bf16 on the way
    "ssd_decode": {F32: 2e-5, BF16: 4e-3},
    "selective_decode": {F32: 2e-5, BF16: 2e-3},
    "ssd_stack": {F16: 2e-3, BF16: 8e-3},  # a code of an input may round the other way
    "selective_stack": {F16: 2e-3, BF16: 8e-3},
    "gla_scan": {F32: 5e-6, BF16: 2e-3},
    "gla_update": {F32: 2e-6, BF16: 2e-3},
    "delta_scan": {F32: 5e-6, BF16: 2e-3},
    "delta_update": {F32: 2e-6, BF16: 2e-3},
    "dplr_scan": {F32: 5e-6, BF16: 2e-3},
    "dplr_update": {F32: 2e-6, BF16: 2e-3},
    "elementwise_scan": {F32: 5e-6, BF16: 2e-3},
    "elementwise_update": {F32: 2e-6, BF16: 2e-3},
}
PER_TOKEN: dict[str, tuple[str, ...]] = {
    # what a scan takes for every token, [B, T, ...]
    "ssd_scan": ("x", "dt", "B", "C"),
    "selective_scan": ("x", "dt", "B", "C"),
    "gla_scan": ("q", "k", "v", "g"),
    "delta_scan": ("q", "k", "v", "beta", "g"),
    "dplr_scan": ("q", "k", "v", "g", "a", "b"),
    "elementwise_scan": ("x", "g"),
}
FLIPS = 1e-3
"""Share of int8 codes that may be off by one: where x / scale lies on a tie, the last bit of x decides."""
TOKENS = ((1, 1), (2, 3), (3, 63), (1, 130))
"""Batch and tokens."""
LENGTHS = (0, 1, 3, 63, 0, 255, 257, 1000, 0)
"""Tokens of the sequences that share a batch."""


@dataclass(frozen=True)
class Case:
    """Arguments of one call; ``weights`` is the position of a linear's weights, or of a stack's blocks, which a backend
    may prepack; ``flips``: share of int8 codes that may be off by one."""

    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    shape: dict[str, int] = field(default_factory=dict)
    dtype: torch.dtype = F32
    weights: int | None = None
    flips: float = FLIPS

    def setting(self, device: str) -> Setting:
        """Where the case would run."""
        return Setting(device, self.dtype, self.shape)


def cases(name: str, seed: int = 0) -> list[Case]:
    """The cases of one op, for each type of activations. Raises KeyError for an op without a generator."""
    rng = torch.Generator().manual_seed(seed)
    return [case for dtype in TOLERANCE[name] for case in _GENERATORS[name](name, rng, dtype)]


def change(value: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``fn`` of every tensor inside nested tuples and dicts."""
    if isinstance(value, torch.Tensor):
        return fn(value)
    if isinstance(value, dict):
        return {k: change(v, fn) for k, v in value.items()}
    if not isinstance(value, tuple):
        return value
    parts = [change(v, fn) for v in value]
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def flat(value: Any) -> list[torch.Tensor]:
    """The tensors inside nested tuples and dicts."""
    if isinstance(value, torch.Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return [tensor for part in inside for tensor in flat(part)]


def followed(tensor: torch.Tensor, behind: int = 1 << 18) -> torch.Tensor:
    """The same values, and behind them elements that no kernel may use: NaN, or the largest integer."""
    unusable = math.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
    rest = torch.full((behind,), unusable, dtype=tensor.dtype, device=tensor.device)
    return torch.cat([tensor.flatten(), rest])[: tensor.numel()].view(tensor.shape)


def outcome(
    backend: Backend, case: Case, device: str = "cpu", view: Callable[[torch.Tensor], torch.Tensor] = torch.clone
) -> list[torch.Tensor]:
    """What a call returns and what it leaves in its arguments (states are updated in place), on the CPU.

    ``view`` makes the copy of each argument, so that it may lay it out differently.
    """
    args, kwargs = change((case.args, case.kwargs), lambda t: view(t.to(device)))
    given = list(args)
    if case.weights is not None:
        given[case.weights] = backend.prepack(args[case.weights])
    return [t.cpu() for t in flat((backend(*given, **kwargs), args, kwargs))]


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative Frobenius norm of the difference; infinite when either holds NaN."""
    distance = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)
    return math.inf if distance.isnan() else float(distance)


def disagreement(
    got: list[torch.Tensor], want: list[torch.Tensor], tolerance: float, flips: float = FLIPS
) -> str | None:
    """None when two outcomes agree: floats within ``tolerance``, int8 codes but for rare ties, other integers fully."""
    if len(got) != len(want):
        return f"{len(got)} tensors, not {len(want)}"
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"tensor {i} is {a.dtype} {list(a.shape)}, not {b.dtype} {list(b.shape)}"
        if a.dtype == torch.int8:
            gap = (a.int() - b.int()).abs()
            if gap.numel() and (gap.max() > 1 or int((gap > 0).sum()) > math.ceil(flips * gap.numel())):
                return f"tensor {i}: {int((gap > 0).sum())} of {gap.numel()} codes differ, by up to {int(gap.max())}"
        elif not a.is_floating_point():
            if not torch.equal(a, b):
                return f"tensor {i}: integers differ"
        elif (e := error(a, b)) > tolerance:
            return f"tensor {i}: relative error {e:.2e} above {tolerance:.0e}"
    return None


_Generator = Callable[[str, torch.Generator, torch.dtype], Iterator[Case]]
_GENERATORS: dict[str, _Generator] = {}


def _for(*names: str) -> Callable[[_Generator], _Generator]:
    def register(generator: _Generator) -> _Generator:
        _GENERATORS.update(dict.fromkeys(names, generator))
        return generator

    return register


def _normal(rng: torch.Generator, *shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(shape, generator=rng).to(dtype)


def _codes(rng: torch.Generator, *shape: int, low: int = -127, high: int = 127) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, generator=rng, dtype=torch.int8)


def _scale(rng: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=rng) * 0.02 + 0.005


def _bounds(lengths: tuple[int, ...]) -> torch.Tensor:
    """cu_seqlens of sequences of these lengths."""
    return torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)


@_for("quantize")
def _quantize(name: str, rng: torch.Generator, dtype: torch.dtype) -> Iterator[Case]:
    for batch, tokens in TOKENS:
        x = _normal(rng, batch, tokens, 48, dtype=dtype)
        x[0, 0] = 0
        x[-1, -1, ::3] *= 1e4  # far beyond the scale: must saturate
        for scale in (None, torch.tensor([0.01]), _scale(rng, 48)):
            label = "token" if scale is None else f"static {scale.numel()}"
            yield Case(f"{label} {batch}x{tokens} {dtype}", (x, scale), dtype=dtype)
    ties = (torch.arange(-300, 300) * 0.5).view(4, 150).to(dtype)
    yield Case(f"ties {dtype}", (ties, torch.ones(1)), dtype=dtype)


@_for("quantize_state")
def _quantize_state(name: str, rng: torch.Generator, dtype: torch.dtype) -> Iterator[Case]:
    for batch, n in ((1, 8), (3, 16)):
        h = _normal(rng, batch, 5, 7, n) * 10
        h[0, 0, 0] = 0
        for kind in (F32, torch.float16):
            yield Case(f"{kind} N={n}", (h, torch.full(h.shape, -3).to(kind)), dtype=dtype)
        for noise in (None, torch.tensor([7, 3])):
            codes, scale = torch.full(h.shape, 5, dtype=torch.int8), torch.full(h.shape[:-1], 9.0)
            yield Case(f"int8 N={n} rng={noise is not None}", (h, codes, scale, noise), dtype=dtype)


@_for("quantize_states")
def _quantize_states(name: str, rng: torch.Generator, dtype: torch.dtype) -> Iterator[Case]:
    for layers in (1, 3, 18):
        for alike in zip(*(_quantize_state(name, rng, dtype) for _ in range(layers)), strict=True):
            h, state, *rest = zip(*(case.args for case in alike), strict=True)
            scale, noise = rest or (None, None)
            drawn = None if noise is None or noise[0] is None else tuple(n + i for i, n in enumerate(noise))
            args = (h, state, scale, drawn)
            yield Case(f"{layers} layers {alike[0].label}", args, dtype=dtype)


@_for("embedding")
def _embedding(name: str, rng: torch.Generator, dtype: torch.dtype) -> Iterator[Case]:
    for shape in ((1,), (2, 3), (3, 63)):
        ids = torch.randint(0, 96, shape, generator=rng)
        yield Case(f"{shape} {dtype}", (ids, _codes(rng, 96, 40), _scale(rng, 96)), {"out_dtype": dtype}, dtype=dtype)


@_for("likeliest")
def _likeliest(name: str, rng: torch.Generator, dtype: torch.dtype) -> Iterator[Case]:
    for shape in ((1, 96), (3, 503), (2, 2, 20011)):
        logits = _normal(rng, *shape, dtype=dtype).mul_(8).round_()  # so that many are the largest
        yield Case(f"{shape} {dtype}", (logits,), dtype=dtype)
    for row in ([0.0, -0.0, -1.0], [-0.0, 0.0, 0.0]):
        yield Case(f"{row} {dtype}", (torch.tensor([row], dtype=dtype),), dtype=dtype)


@_for("rms_norm")
def _rms_norm(name: str, rng: torch.Generator, dtype: torch.dtype) -> Iterator[Case]:
    for batch, tokens in TOKENS:
        x = _normal(rng, batch, tokens, 192, dtype=dtype) * 5
        x[0, 0] = 0
        for weight in (None, _normal(rng, 192, dtype=dtype)):
            for out in ({}, {"out_scale": torch.tensor([0.01])}, {"per_token": True}):
                label = f"{batch}x{tokens} gain={weight is not None} {next(iter(out), 'float')} {dtype}"
                yield Case(label, (x, weight, 1e-5), {"out_dtype": dtype, **out}, dtype=dtype)


@_for("gate_output")
def _gate_output(name: str, rng: torch.Generator, dtype: torch.dtype) -> Iterator[Case]:
    outs: list[dict[str, Any]] = [{}, {"out_scale": torch.tensor([0.02])}, {"per_token": True}]
    settings = ((0, 0), (1, 192), (2, 64), (1, 0), (0, 12))
    for i, ((batch, tokens), (groups, block)) in enumerate(zip((*TOKENS, (2, 5)), settings, strict=True)):
        y = _normal(rng, batch, tokens, 192, dtype=dtype)
        weight = _normal(rng, 192, dtype=dtype) if groups else None
        z, z_scale = _normal(rng, batch, tokens, 192, dtype=dtype), None
        shared, by_channel = torch.tensor([0.03]), _scale(rng, 192)
        for static, rounds in ((None, False), (shared, False), (by_channel, False), (shared, True), (by_channel, True)):
            if static is not None:
                z_scale = static
                z = _normal(rng, batch, tokens, 192, dtype=dtype) if rounds else _codes(rng, batch, tokens, 192)
            options = {"norm_groups": groups, "block": block, "z_scale": z_scale, "out_dtype": dtype}
            out = outs[(i + (0 if static is None else static.numel())) % 3]
            label = f"{batch}x{tokens} groups={groups} block={block} z={z.dtype} {next(iter(out), 'float')} {dtype}"
            yield Case(label, (y, z, weight, 1e-5), {**options, **out}, {"I": 192, "block": block}, dtype)


@_for("rotate_input")
def _rotate_input(name: str, rng: torch.Generator, dtype: torch.dtype) -> Iterator[Case]:
    for (batch, tokens), block in zip(TOKENS, (192, 64, 12, 1), strict=True):
        x = _normal(rng, batch, tokens, 192, dtype=dtype)
        for out in ({}, {"out_scale": torch.tensor([0.02])}, {"per_token": True}):
            label = f"{batch}x{tokens} block={block} {next(iter(out), 'float')} {dtype}"
            yield Case(label, (x, block), {"out_dtype": dtype, **out}, {"I": 192}, dtype)


@_for("causal_conv1d")
def _conv(name: str, rng: torch.Generator, dtype: torch.dtype) -> Iterator[Case]:
    for batch, tokens in TOKENS:
        for stateful in (False, True):
            bias = _normal(rng, 40, dtype=dtype) if stateful else None
            x, weight = _normal(rng, batch, tokens, 40, dtype=dtype), _normal(rng, 40, 4, dtype=dtype)
            state = _normal(rng, batch, 3, 40, dtype=dtype) if stateful else None
            label = f"{batch}x{tokens} state={stateful} {dtype}"
            yield Case(f"float {label}", (x, weight, bias, state), {"out_dtype": dtype}, dtype=dtype)
            state = _codes(rng, batch, 3, 40) if stateful else None
            rounded = {"in_scale": _scale(rng, 40), "out_scale": _scale(rng, 40)}
            yield Case(f"rounds {label}", (x, weight, bias, state), rounded, dtype=dtype)
            scales = {"x_scale": _scale(rng, 40), "weight_scale": _scale(rng, 40)}
            codes = (_codes(rng, batch, tokens, 40), _codes(rng, 40, 4), bias, state)
            yield Case(f"int8 {label}", codes, {**scales, "out_dtype": dtype}, dtype=dtype)
            yield Case(f"int8 out {label}", codes, {**scales, "out_scale": _scale(rng, 40)}, dtype=dtype)
    tokens = sum(LENGTHS)
    for lengths, stateful in ((LENGTHS, True), (LENGTHS, False), ((tokens,), True)):
        scales = {"x_scale": _scale(rng, 24), "weight_scale": _scale(rng, 24), "cu_seqlens": _bounds(lengths)}
        state = _codes(rng, len(lengths), 3, 24) if stateful else None
        codes = (_codes(rng, 1, tokens, 24), _codes(rng, 24, 4), _normal(rng, 24, dtype=dtype), state)
        label = f"{len(lengths)} sequences state={stateful} {dtype}"
        yield Case(label, codes, {**scales, "out_dtype": dtype}, dtype=dtype)


def _scan_inputs(
    rng: torch.Generator,
    dtype: torch.dtype,
    int8: bool,
    x: tuple[int, ...],
    bc: tuple[int, ...],
    static: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
    if int8:
        return _codes(rng, *x), _codes(rng, *bc), _codes(rng, *bc), static
    return _normal(rng, *x, dtype=dtype), _normal(rng, *bc, dtype=dtype), _normal(rng, *bc, dtype=dtype), {}


def _stored(rng: torch.Generator, kind: torch.dtype, *shape: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    if kind == torch.int8:
        return _codes(rng, *shape), _scale(rng, *shape[:-1])
    return _normal(rng, *shape).to(kind), None


STATES = ((F32, False), (torch.float16, False), (torch.int8, False), (torch.int8, True))


@_for("ssd_scan", "ssd_update")
def _ssd(name: str, rng: torch.Generator, dtype: torch.dtype) -> Iterator[Case]:
    sizes = ((4, 16, 1, 8), (4, 32, 2, 16), (6, 16, 2, 8), (4, 16, 1, 16))  # H P G N
    for i, ((batch, tokens), (H, P, G, N)) in enumerate(zip(TOKENS, sizes, strict=True)):
        T = (tokens,) if name == "ssd_scan" else ()
        A, D, bias = -torch.rand(H, generator=rng) * 2 - 0.1, _normal(rng, H), _normal(rng, H)
        for j, (kind, noisy) in enumerate(STATES):
            static = {"x_scale": _scale(rng, H, P), "B_scale": _scale(rng, G), "C_scale": _scale(rng, G)}
            x, B, C, scales = _scan_inputs(rng, dtype, j > 1, (batch, *T, H, P), (batch, *T, G, N), static)
            rest = (x, _normal(rng, batch, *T, H, dtype=dtype), A, B, C, D, bias if i else None)
            options = {**scales, "out_dtype": dtype, **({"dt_limit": (0.1, 0.8)} if (i + j) % 2 else {})}
            label = f"{batch}x{tokens if T else 1} H={H} P={P} G={G} N={N} int8={j > 1} {dtype}"
            shape = {"H": H, "P": P, "G": G, "N": N}
            if T:
                state = _normal(rng, batch, H, P, N) if j % 2 else None
                yield Case(f"{label} state={j % 2} {j}", (*rest, state), options, shape, dtype)
            else:
                state, scale = _stored(rng, kind, batch, H, P, N)
                noise = torch.tensor([11, 4]) if noisy else None
                yield Case(f"{label} {kind} rng={noisy}", (state, scale, noise, *rest), options, shape, dtype)
    if name == "ssd_scan":
        long, H, P, G, N = sum(LENGTHS), 4, 16, 2, 8
        static = {"x_scale": _scale(rng, H, P), "B_scale": _scale(rng, G), "C_scale": _scale(rng, G)}
        x, B, C, scales = _scan_inputs(rng, dtype, dtype == F32, (1, long, H, P), (1, long, G, N), static)
        state = _normal(rng, len(LENGTHS), H, P, N) if dtype == F32 else None
        A, D = -torch.rand(H, generator=rng) * 2 - 0.1, _normal(rng, H)
        args = (x, _normal(rng, 1, long, H, dtype=dtype), A, B, C, D, None, state)
        options = {**scales, "out_dtype": dtype, "cu_seqlens": _bounds(LENGTHS)}
        yield Case(f"{len(LENGTHS)} sequences {dtype}", args, options, {"H": H, "P": P, "G": G, "N": N}, dtype)


@_for("selective_scan", "selective_update")
def _selective(name: str, rng: torch.Generator, dtype: torch.dtype) -> Iterator[Case]:
    for i, ((batch, tokens), (inner, N)) in enumerate(zip(TOKENS, ((48, 8), (64, 16), (24, 8), (96, 16)), strict=True)):
        T = (tokens,) if name == "selective_scan" else ()
        A, D, bias = -torch.rand(inner, N, generator=rng) * 2 - 0.1, _normal(rng, inner), _normal(rng, inner)
        for j, (kind, noisy) in enumerate(STATES):
            x_scale = _scale(rng, inner if i % 2 else 1)
            static = {"x_scale": x_scale, "B_scale": _scale(rng, 1), "C_scale": _scale(rng, 1)}
            x, B, C, scales = _scan_inputs(rng, dtype, j > 1, (batch, *T, inner), (batch, *T, N), static)
            rest = (x, _normal(rng, batch, *T, inner, dtype=dtype), A, B, C, D, bias if i else None)
            label = f"{batch}x{tokens if T else 1} I={inner} N={N} int8={j > 1} {dtype}"
            options, shape = {**scales, "out_dtype": dtype}, {"I": inner, "N": N}
            if T:
                state = _normal(rng, batch, inner, N) if j % 2 else None
                yield Case(f"{label} state={j % 2} {j}", (*rest, state), options, shape, dtype)
            else:
                state, scale = _stored(rng, kind, batch, inner, N)
                noise = torch.tensor([11, 4]) if noisy else None
                yield Case(f"{label} {kind} rng={noisy}", (state, scale, noise, *rest), options, shape, dtype)
    if name == "selective_scan":
        long, inner, N = sum(LENGTHS), 24, 8
        static = {"x_scale": _scale(rng, 1), "B_scale": _scale(rng, 1), "C_scale": _scale(rng, 1)}
        x, B, C, scales = _scan_inputs(rng, dtype, dtype == F32, (1, long, inner), (1, long, N), static)
        state = _normal(rng, len(LENGTHS), inner, N) if dtype == F32 else None
        A, D = -torch.rand(inner, N, generator=rng) * 2 - 0.1, _normal(rng, inner)
        args = (x, _normal(rng, 1, long, inner, dtype=dtype), A, B, C, D, None, state)
        options = {**scales, "out_dtype": dtype, "cu_seqlens": _bounds(LENGTHS)}
        yield Case(f"{len(LENGTHS)} sequences {dtype}", args, options, {"I": inner, "N": N}, dtype)


for _module in pkgutil.iter_modules(quamba_kernels.__path__, "quamba_kernels."):
    if _module.name.startswith(f"{__name__}_"):  # testing_*.py add generators because they are there
        importlib.import_module(_module.name)
