"""Quantise the linears of a model that no file in quamba.models describes, and nothing else.

The model is held whole, unlike in the pipeline. Its layers are taken for a chain where one run shows that they are:
each is called once, on what the one before returned, with arguments that do not depend on the sample. Then samples move
from layer to layer; else every step runs the whole model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quamba import calibrate, calibration, card, memory
from quamba.checkpoint import Checkpoint, Writer
from quamba.errors import UserError
from quamba.loading import native, pick_device
from quamba.models import every, roles
from quamba.models.spec import BlockSpec, MixerSpec, Output, Proj, Sublayer
from quamba.modules.host import HostedBlock
from quamba.modules.linear import Linear
from quamba.modules.undescribed import blocks, linears, replace, ties
from quamba.recipe import Recipe
from quamba.report import Report

Progress = Callable[[str, int, int], None]


class Part(HostedBlock):
    """A layer, or the whole model, on its way from floats to codes. own: its linears by path below it, in the order of
    execution, each with a name of what it reads."""

    def __init__(
        self, module: nn.Module, own: dict[str, tuple[Linear, str]], arguments: calibrate.Arguments
    ) -> None:
        self.layer, self.arguments, self.own = module, arguments, {path: linear for path, (linear, _) in own.items()}
        self.beside, self.layer_idx, self.repeats = None, 0, True
        projs = tuple(Proj(path, path, reads, (), (Output(path, ()),)) for path, (_, reads) in own.items())
        self.block_spec = BlockSpec("", (Sublayer(None, MixerSpec("", {}, (), projs)),), hosted=True)

    def linears(self, sub: Sublayer, proj: Proj) -> list[Linear]:
        return [self.own[proj.path]]

    def run(
        self, sub: Sublayer, hidden: torch.Tensor, carry: dict[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        args, kwargs = self.arguments.get(len(hidden), ((), {"use_cache": False}))
        return first(self.layer(hidden, *args, **kwargs))


def first(output: Any) -> torch.Tensor:
    """What a layer returns beside nothing else, or first."""
    found: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return found


def quantize(
    checkpoint: Checkpoint,
    recipe: Recipe,
    output: str | Path,
    *,
    calibration_text: str | Path | None,
    samples: int,
    seqlen: int,
    seed: int,
    device: str,
    overwrite: bool,
    progress: Progress,
) -> Report:
    """As quamba.quantize does for models that are described; the directory opens with transformers just as well.

    Raises UserError where transformers cannot open the checkpoint, or calls none of its linears.
    """
    start, where = time.perf_counter(), pick_device(device)
    # a config that names no width is taken for a narrow model's
    recipe = recipe.for_width(getattr(checkpoint.config.get_text_config(), "hidden_size", 0))
    tokens = calibration.windows(
        calibration.read_text(calibration_text), checkpoint.tokenizer(), samples, seqlen, seed, checkpoint.spec
    )
    memory.release()
    with Writer(output, overwrite, checkpoint.path) as writer, memory.watch(where) as peak:
        model = native(checkpoint.path, checkpoint.config, None)
        check_roles(recipe, linears(model))
        types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        model = model.to(where, torch.float32).eval()
        batch = recipe.calibration.batch_size
        order = execution_order(model, tokens, batch, where)
        tied = ties(model)
        kept = [path for path in linears(model) if path not in order and path not in tied]
        if not order:
            raise UserError(f"{checkpoint.path} has no nn.Linear that its model calls; nothing can be quantised")
        chain = Chain.of(model, tokens, batch, where)
        floats = {path: (m.weight.detach(), m.bias) for path, m in linears(model).items()}
        made = replace(model, recipe, kept, tied, torch.float32, where)
        for path, linear in made.items():
            weight, bias = floats.pop(path)
            linear.hold(weight, bias)
        parts = chain.paths if chain is not None else []
        for i, path in enumerate(parts):
            progress("layers", i, len(parts) + 1)
            assert chain is not None
            part = Part(model.get_submodule(path), below(path, made, order), chain.arguments[path])
            quantise(part, chain.samples)
            calibrate.advance(part, part.block_spec.sublayers[0], chain.samples)
            chain.samples.check()
        progress("layers", len(parts), len(parts) + 1)
        rest = {p: linear for p, linear in made.items() if not any(p.startswith(f"{part}.") for part in parts)}
        quantise(Part(model, below("", rest, order), {}), calibrate.Samples(tokens, batch, where))
        progress("layers", len(parts) + 1, len(parts) + 1)
        writer.add(tensors(model, types, checkpoint.config.dtype or torch.float32))
        writer.finish(card.files(checkpoint, recipe, tokens, {"linears_only": {"kept": kept, "tied": tied}}))
    sizes = [linear.features * linear.outputs for linear in made.values()]
    share = 2 * sum(sizes) / max(sum(checkpoint.bytes().values()), 1)
    notes = [f"only linears are quantised, {share:.0%} of the parameters; a recurrence and its inputs stay as they are"]
    if kept:
        named = ", ".join(kept[:3] + ["..."] * (len(kept) > 3))
        notes.append(f"{len(kept)} linears that the samples never reached stay floats: {named}")
    largest = 4 * max(sizes, default=0)
    return Report(writer.output, writer.sizes, checkpoint, time.perf_counter() - start, peak.bytes, largest, notes)


def check_roles(recipe: Recipe, paths: Iterable[str]) -> None:
    """Raises UserError for a role of linears that neither this model nor any architecture has."""
    own = {"default", "lm_head", *(path.rpartition(".")[2] for path in paths)}
    known = roles(every())["linears"] | own
    for role in [*recipe.linears, *(role for override in recipe.layers for role in override.linears)]:
        if role not in known:
            raise UserError(f"recipe {recipe.name}: unknown role {role!r} in linears; known: {sorted(own)}")


def quantise(part: Part, samples: calibrate.Samples) -> None:
    """Calibrate the linears of a part and quantise them, each on what it sees once those before it are quantised."""
    if not part.own:
        return
    (sub,) = part.block_spec.sublayers
    calibrate.collect_ranges(part, sub, samples)
    for stage in calibrate.stages(part, sub):
        hessians, _ = calibrate.collect_inputs(part, sub, stage, samples, keep=False)
        for group, hessian in zip(stage, hessians, strict=True):
            for linear in group:
                linear.quantise(hessian)
    calibrate.rebind(part)


def below(path: str, made: dict[str, Linear], order: dict[str, str]) -> dict[str, tuple[Linear, str]]:
    """The linears below a path, by the rest of their paths, in the order of execution, each with what it reads."""
    prefix = f"{path}." if path else ""
    inside = (name for name in order if name in made and name.startswith(prefix))
    return {name.removeprefix(prefix): (made[name], order[name]) for name in inside}


def execution_order(model: Any, tokens: torch.Tensor, batch: int, device: torch.device) -> dict[str, str]:
    """Path -> a name of what it reads, in the order in which linears are first called; those never called are not
    there. Linears that are given one and the same tensor read the same."""
    order: dict[str, str] = {}
    inputs: list[torch.Tensor] = []  # held, so that no later one is mistaken for them

    def see(path: str, read: torch.Tensor) -> None:
        if path not in order:
            same = next((i for i, x in enumerate(inputs) if x is read), len(inputs))
            inputs.extend([read] if same == len(inputs) else [])
            order[path] = str(same)

    expected = linears(model)
    hooks = [
        module.register_forward_pre_hook(lambda module, args, path=path: see(path, args[0]))
        for path, module in expected.items()
    ]
    for part in tokens.split(batch):
        model(part.to(device), use_cache=False)
        if len(order) == len(expected):
            break
    for hook in hooks:
        hook.remove()
    return order


class _Entered(Exception):
    """What follows the first layer need not run."""


class Chain:
    """Layers that are a chain: their paths, the arguments of each beside the hidden states by batch size, and the
    samples as they enter the first."""

    def __init__(
        self, paths: list[str], arguments: dict[str, calibrate.Arguments], samples: calibrate.Samples
    ) -> None:
        self.paths, self.arguments, self.samples = paths, arguments, samples

    @classmethod
    def of(cls, model: Any, tokens: torch.Tensor, batch: int, device: torch.device) -> Chain | None:
        """The chain of a model; None where its layers are none."""
        paths = blocks(model)
        arguments: dict[str, calibrate.Arguments] = {path: {} for path in paths}
        parts = tokens.split(batch)
        for part in (*parts[:2], parts[-1]) if paths else ():
            calls = watched(model, paths, part.to(device))
            if calls is None:
                return None
            for path, (args, kwargs) in zip(paths, calls, strict=True):
                before = arguments[path].setdefault(len(part), (args, kwargs))
                if not alike(before, (args, kwargs)):
                    return None
        if not paths:
            return None
        entering: list[torch.Tensor] = []

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entering.append(given(args, kwargs)[0].cpu())
            raise _Entered

        hook = model.get_submodule(paths[0]).register_forward_pre_hook(see, with_kwargs=True)
        for part in parts:
            with suppress(_Entered):
                model(part.to(device), use_cache=False)
        hook.remove()
        return cls(paths, arguments, calibrate.Samples(torch.cat(entering), batch, device))


Call = tuple[tuple[Any, ...], dict[str, Any]]


def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, Call]:
    """The hidden states that a layer is called with, and the other arguments."""
    if args:
        return args[0], (args[1:], kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), ((), rest)


def watched(model: Any, paths: list[str], ids: torch.Tensor) -> list[Call] | None:
    """What each layer is called with beside the hidden states; None where the layers are no chain."""
    calls: list[tuple[str, torch.Tensor, Call]] = []
    returned: list[Any] = []
    hooks = []
    for path in paths:
        layer = model.get_submodule(path)

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
            if not args and "hidden_states" not in kwargs:
                raise _Entered
            calls.append((path, *given(args, kwargs)))

        hooks.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(layer.register_forward_hook(lambda module, args, output: returned.append(output)))
    try:
        model(ids, use_cache=False)
    except _Entered:
        return None
    finally:
        for hook in hooks:
            hook.remove()
    if [path for path, *_ in calls] != paths:
        return None
    for output, (_, hidden, _) in zip(returned, calls[1:], strict=False):
        if not torch.is_tensor(first(output)) or not torch.equal(first(output), hidden):
            return None
    return [call for *_, call in calls]


def alike(a: Any, b: Any) -> bool:
    """Whether two arguments are the same to a layer: tensors by value, the rest where it can be compared."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(alike, a, b))
    plain = isinstance(a, (bool, int, float, str))
    return a == b if plain else type(a) is type(b)


def tensors(model: Any, types: dict[str, torch.dtype], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every tensor of the model under its name; what is neither code nor scale in the checkpoint's type. Raises
    UserError for NaN or Inf."""
    found = {}
    for name, tensor in model.state_dict().items():
        plain = tensor.is_floating_point() and not name.endswith("scale")
        kept = tensor.detach().to(types.get(name, dtype)) if plain else tensor.detach()
        if not torch.isfinite(kept).all():
            raise UserError(f"tensor {name!r} holds NaN or Inf; look at the original's weights")
        found[name] = kept.clone()  # tied weights are written apart
    return found
