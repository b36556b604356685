"""The kernels between the linears of a prompt, at the sizes of three models, on one GPU: ours in CUDA and in Triton.

    python kernels/benchmarks/prefill.py --output prefill.json

Times are of CUDA graphs, as in linear.py, over copies of the inputs that together exceed L2 (from 512 tokens on; fewer
tokens live in L2 in a model too). "% of copy" is the bytes that the op must move once, inputs and outputs, per second,
over the bandwidth of a copy. Each implementation has to agree with the torch body on the first tokens before that.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from report import Row, add_options, header, write
from timing import copy_bandwidth, launches_needed, replay

from quamba_kernels import OPS, Setting
from quamba_kernels.testing import TOLERANCE, change, disagreement, flat

TOKENS = (1, 512, 2048, 8192)
CHECKED = 192
"""Tokens of a prompt that are compared with the torch body: no op looks ahead."""
MOST_COPIES, MOST_BYTES = 64, 12 << 30
ROTATING = 4
"""How many times L2 the copies of the inputs hold."""


class Model(NamedTuple):
    """Sizes of a layer; conv: channels of the convolution, which are columns of the projection from ``at`` on."""

    name: str
    D: int
    I: int
    conv: int
    at: int
    proj: int
    norm_groups: int
    N: int = 0
    heads: tuple[int, int, int, int] | None = None
    """Of the SSD scan: H, P, G, N."""
    R: int = 0


MODELS = (
    Model("mamba1-2.8b", 2560, 5120, 5120, 0, 10240, 0, N=16, R=160),
    Model("mamba2-2.7b", 2560, 5120, 5376, 5120, 10576, 1, heads=(80, 64, 1, 128)),
    Model("mamba2-8b", 4096, 8192, 10240, 8192, 18560, 8, heads=(128, 64, 8, 128)),
)


class Problem(NamedTuple):
    """One call: the op, what distinguishes it from others of that op, its arguments."""

    op: str
    variant: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: dict[str, int]


def problems(model: Model, tokens: int, rng: torch.Generator, device: str = "cuda") -> Iterator[Problem]:
    """What a layer runs between its linears, in order, with random inputs; activations are [1, T, C] and fp16."""

    def normal(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.randn(shape, generator=rng, device=device).to(dtype)

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(-127, 128, shape, generator=rng, device=device, dtype=torch.int8)

    def scales(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=rng, device=device) * 0.02 + 0.01

    one, fp32 = scales(1), torch.float32
    hidden, projected = normal(1, tokens, model.D, dtype=fp32), normal(1, tokens, model.proj)
    yield Problem("rms_norm", "static", (hidden, None, 1e-5), {"out_scale": one}, {})
    yield Problem("rms_norm", "per token", (hidden, None, 1e-5), {"per_token": True}, {})

    z = projected[..., : model.I] if model.at else projected[..., model.I :]
    x = projected[..., model.at : model.at + model.conv]
    weights = codes(model.conv, 4), normal(model.conv)
    options = {"weight_scale": scales(model.conv), "out_scale": scales(model.conv)}
    state = torch.zeros(1, 3, model.conv, dtype=torch.int8, device=device)
    shape = {"C": model.conv, "W": 4}
    rounded = {"in_scale": scales(model.conv), **options}
    yield Problem("causal_conv1d", "fp16 in", (x, *weights, state), rounded, shape)
    given = codes(1, tokens, model.conv), *weights, state
    yield Problem("causal_conv1d", "int8 in", given, {"x_scale": scales(model.conv), **options}, shape)

    if model.N:
        low_rank = normal(1, tokens, model.R + 2 * model.N)  # dt, B and C, from x_proj
        yield Problem("quantize", "dt", (low_rank[..., : model.R],), {}, {})
        yield Problem("quantize", "B and C", (low_rank[..., model.R :], scales(2 * model.N)), {}, {})
        A = -(torch.rand(model.I, model.N, generator=rng, device=device) * 15 + 1)
        inputs = (codes(1, tokens, model.I), normal(1, tokens, model.I) - 4, A, codes(1, tokens, model.N),
                  codes(1, tokens, model.N), normal(model.I, dtype=fp32))  # fmt: skip
        scan = {"x_scale": one, "B_scale": one, "C_scale": one, "out_dtype": torch.float16}
        yield Problem("selective_scan", "int8 in", inputs, scan, {"I": model.I, "N": model.N})

    if model.heads:
        H, P, G, N = model.heads
        A, D = -(torch.rand(H, generator=rng, device=device) * 15 + 1), normal(H, dtype=fp32)
        dt = normal(1, tokens, H + 16)[..., 16:] - 4
        for variant in ("int8 in", "fp16 in"):
            int8 = variant == "int8 in"
            mixed = codes(1, tokens, model.conv) if int8 else normal(1, tokens, model.conv)
            x, B, C = mixed.split([H * P, G * N, G * N], -1)
            given = (x.unflatten(-1, (H, P)), dt, A, B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N)), D)
            options = {"x_scale": scales(H, P), "B_scale": scales(G), "C_scale": scales(G)} if int8 else {}
            heads = {"H": H, "P": P, "G": G, "N": N}
            yield Problem("ssd_scan", variant, given, {**options, "out_dtype": torch.float16}, heads)
        outs = torch.cat([scales(H * P), *(scales(G).repeat_interleave(N) for _ in "BC")])
        codings = {
            "conv_in_scale": rounded["in_scale"], "conv_weight_scale": rounded["weight_scale"], "conv_out_scale": outs,
            "x_scale": outs[: H * P].view(H, P), "B_scale": outs[H * P : H * P + G * N : N].clone(),
            "C_scale": outs[H * P + G * N :: N].clone(), "out_dtype": torch.float16, "groups": G, "d_state": N,
        }  # fmt: skip
        given = projected[..., model.at : model.at + model.conv], dt, *weights, state, A, D
        yield Problem("ssd_prefill", "codes", given, codings, {**heads, "W": 4})

    weight = normal(model.I) if model.norm_groups else None
    gate = {"z_scale": scales(model.I), "norm_groups": model.norm_groups, "block": model.I, "out_scale": one}
    shape = {"I": model.I, "block": model.I}
    yield Problem("gate_output", "fp16 y and z", (normal(1, tokens, model.I), z, weight, 1e-5), gate, shape)
    given = normal(1, tokens, model.I, dtype=fp32), codes(1, tokens, model.I), weight, 1e-5
    yield Problem("gate_output", "fp32 y, int8 z", given, gate, shape)


def size(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of the elements."""
    return sum(t.numel() * t.element_size() for t in tensors)


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides between tokens."""
    if tensor.dim() < 3 or tensor.is_contiguous():
        return tensor.clone()
    wide = torch.empty(*tensor.shape[:2], tensor.stride(1), dtype=tensor.dtype, device=tensor.device)
    start = tensor.storage_offset() % tensor.stride(1)
    own = wide[..., start : start + tensor[0, 0].numel()]
    return own.unflatten(-1, tensor.shape[2:]).copy_(tensor)


def beginning(value: Any, tokens: int) -> Any:
    """The first tokens of every stream among nested arguments, in memory of their own."""
    return change(value, lambda t: (t[:, :CHECKED] if t.dim() >= 3 and t.shape[1] == tokens else t).clone())


def gate(call: Callable[..., Any], given: Problem, tokens: int) -> None:
    """Raises ValueError where an implementation disagrees with the torch body."""
    want = flat(OPS[given.op].reference(*beginning(given.args, tokens), **beginning(given.kwargs, tokens)))
    args = change(given.args, copied)
    got = flat(beginning(change(call(*args, **given.kwargs), torch.clone), tokens))
    if given.op in ("selective_scan", "ssd_scan", "ssd_prefill") and tokens > CHECKED:
        want, got = want[:1], got[:1]  # the last state is another token's
    types = TOLERANCE[given.op]
    difference = disagreement([t.cpu() for t in got], [t.cpu() for t in want], max(types.values()))
    if difference is not None:
        raise ValueError(difference)


def bytes_moved(call: Callable[..., Any], given: Problem) -> int:
    """Bytes of all inputs and outputs, each once."""
    outputs = flat(call(*change(given.args, copied), **given.kwargs))
    others = [t for t in flat(given.kwargs) if not any(t is o for o in outputs)]
    return size(flat(given.args)) + size(outputs) + size(others)


def measure(name: str, call: Callable[..., Any], given: Problem, tokens: int, replays: int, bandwidth: float) -> Row:
    """Gate, then time; a row with status "ok" or "failed"."""
    row: Row = {"op": given.op, "variant": given.variant, "tokens": tokens, "implementation": name}
    try:
        row["bytes"] = moved = bytes_moved(call, given)
        gate(call, given, tokens)
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        copies = min(MOST_COPIES, MOST_BYTES // moved, max(2, math.ceil(ROTATING * l2 / moved) + 1))
        inputs = [change(given.args, copied) for _ in range(copies)]
        launches = launches_needed(copies, tokens, moved)
        taken = replay(lambda i: call(*inputs[i % copies], **given.kwargs), launches, replays, warm=2)
    except (ValueError, TypeError, RuntimeError) as error:
        return {**row, "status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
    rate = moved / taken.median / 1000
    timed = {"us": taken.median, "us_p10": taken.p10, "us_p90": taken.p90, "launches": launches, "copies": copies,
             "gb_s": rate, "copy_share": rate / bandwidth}  # fmt: skip
    if given.op == "selective_scan":
        timed["gexp_s"] = given.args[2].numel() * tokens / taken.median / 1000
    return {**row, "status": "ok", **timed}


def implementations(given: Problem, variants: bool) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Ours that serve a problem, by name; the torch body and what repeats it in chunks are left out."""
    from quamba_kernels.cuda import scan

    setting = Setting("cuda", torch.float16, given.shape)
    for backend in OPS[given.op].candidates:
        if backend.name in ("torch", "chunked") or backend.why_not(setting) is not None:
            continue
        if given.op != "selective_scan" or backend.name != "cuda" or not variants:
            yield backend.name, backend
            continue
        kept = scan.LANES
        for scan.LANES in (4, 8, 24):
            yield f"cuda lanes={scan.LANES}", backend
        scan.LANES = kept


def table(rows: Sequence[Row]) -> str:
    """Markdown: one line for each measurement."""
    lines = ["| model | op | variant | tokens | implementation | us | p10..p90 | GB/s | % of copy | Gexp/s |",
             "|---|---|---|---:|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    for r in rows:
        head = f"| {r['model']} | {r['op']} | {r['variant']} | {r['tokens']} | {r['implementation']} |"
        if r["status"] != "ok":
            lines.append(f"{head} - | {r['reason']} | - | - | - |")
            continue
        exps = f"{r['gexp_s']:.0f}" if "gexp_s" in r else "-"
        lines.append(
            f"{head} {r['us']:.2f} | {r['us_p10']:.2f}..{r['us_p90']:.2f} | {r['gb_s']:.0f} "
            f"| {100 * r['copy_share']:.0f} | {exps} |"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [model.name for model in MODELS]
    ops = ["rms_norm", "quantize", "causal_conv1d", "selective_scan", "ssd_scan", "ssd_prefill", "gate_output"]
    made.add_argument("--models", nargs="+", choices=names, default=names)
    made.add_argument("--ops", nargs="+", choices=ops, default=ops)
    made.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS), metavar="T")
    made.add_argument("--scan-variants", action="store_true", help="the selective scan in all its ways")
    add_options(made, replays=10, budget_s=240.0)
    return made


def main(arguments: argparse.Namespace) -> int:
    """Measure what the command line asks for; 1 when an implementation fails its gate."""
    if not torch.cuda.is_available():
        print("needs a CUDA device, and torch sees none here", file=sys.stderr)
        return 2
    started = time.monotonic()
    seed = torch.seed() % (1 << 32) if arguments.seed is None else arguments.seed
    rng, bandwidth = torch.Generator("cuda").manual_seed(seed), copy_bandwidth()
    head = header(seed, bandwidth)
    print(json.dumps(head), flush=True)
    rows: list[Row] = []
    for model in MODELS:
        for tokens in arguments.tokens if model.name in arguments.models else ():
            for given in problems(model, tokens, rng):
                if given.op not in arguments.ops:
                    continue
                for name, call in implementations(given, arguments.scan_variants):
                    if time.monotonic() - started > arguments.budget_s:
                        break
                    row = measure(name, call, given, tokens, arguments.replays, bandwidth)
                    rows.append({"model": model.name, **row})
                    print(table(rows[-1:]).splitlines()[-1], flush=True)
            torch.cuda.empty_cache()
            write(arguments.output, head, rows, table(rows))
    head["complete"] = time.monotonic() - started <= arguments.budget_s
    write(arguments.output, head, rows, table(rows))
    return int(any(r["status"] == "failed" for r in rows))


if __name__ == "__main__":
    sys.exit(main(parser().parse_args()))
