"""transformers' own layers with quamba's parts inside: attention, routers and masks stay transformers' code, norms,
linears, experts and recurrent mixers become quamba's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from quamba.models.spec import BlockSpec, MixerSpec, ModelSpec, Proj, Sublayer
from quamba.modules.borrowed import Borrowed
from quamba.modules.delta_rule import DeltaRule
from quamba.modules.experts import Experts
from quamba.modules.linear import Linear
from quamba.modules.mixer import Mixer
from quamba.modules.norm import Norm
from quamba.modules.scan_inputs import ScanInputs
from quamba.modules.selective import SelectiveMixer
from quamba.modules.ssd import SSDMixer
from quamba.modules.watched_inputs import WatchedInputs
from quamba.recipe import LinearSpec, Recipe
from quamba.transforms.fold import folding_illegal
from quamba.transforms.legality import value_rotation_illegal
from quamba.transforms.rotate import output_block

Arguments = dict[int, tuple[tuple[Any, ...], dict[str, Any]]]
"""What a model passes a layer beside the hidden states, by place and by keyword, for each batch size."""
DELTA_RULE = "delta"
MIXERS: dict[str, type[Mixer]] = {"selective": SelectiveMixer, "ssd": SSDMixer}


def mixer_class(spec: MixerSpec) -> type[Mixer] | None:
    """The module that runs a recurrence itself; None for a part that stays transformers'."""
    return None if spec.scan is None else MIXERS.get(spec.scan.family)


def becomes_delta_rule(part: nn.Module, spec: MixerSpec) -> bool:
    """Whether DeltaRule takes a mixer's place: that of a gated delta rule in transformers' code."""
    return spec.scan is not None and spec.scan.family == DELTA_RULE and not isinstance(part, ScanInputs)


def folds(recipe: Recipe, norm_kind: str) -> bool:
    """Whether the gain of a norm of that kind lives in the linears that read it."""
    return recipe.fold_norms and folding_illegal(norm_kind) is None


def linear_spec(recipe: Recipe, proj: Proj, layer: int) -> LinearSpec:
    """How a projection is stored: one that should be kept is floats, unless the recipe names its role."""
    named = proj.role in recipe.linears or any(proj.role in o.linears for o in recipe.layers if o.covers(layer))
    return LinearSpec() if proj.keep and not named else recipe.linear(proj.role, layer)


def fit(
    layer: nn.Module,
    model: ModelSpec,
    block: BlockSpec,
    recipe: Recipe,
    index: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> None:
    """Put quamba's modules, with empty tensors, in the places of a transformers layer's parts; what the recipe leaves
    in floats and unrotated stays transformers'."""
    made: dict[str, Any] = {"dtype": dtype, "device": device}
    for path, sub in block.norms.items():
        if folds(recipe, sub.norm_kind):
            put(layer, path, Norm(sub.width, model.eps, folded=True, **made))
    for sub in block.sublayers:
        spec = sub.mixer
        own = mixer_class(spec)
        if own is not None:
            mixer, old = own(spec, recipe, index, model.eps, **made), layer.get_submodule(spec.path)
            for name in old._non_persistent_buffers_set:
                # some models fill in what they compute from the config when weights have been loaded
                mixer.register_buffer(name, old._buffers[name], persistent=False)
            put(layer, spec.path, mixer)
            continue
        part = layer.get_submodule(spec.path)
        if isinstance(part, ScanInputs):
            part.furnish(spec, recipe, index, **made)
        elif becomes_delta_rule(part, spec):
            part = DeltaRule(part, spec)
            put(layer, spec.path, part)
            part.furnish(spec, recipe, index, **made)
        elif any(i.at is not None for i in spec.inputs):
            WatchedInputs().attach(part, spec, recipe, index, **made)
        rotated = output_block(spec, recipe.rotate.block) if rotates(spec, recipe, index) else 0
        if any(proj.stack and recipe.linear(proj.role, index).format != "float" for proj in spec.projs):
            path = next(spec.name(proj.path).rpartition(".")[0] for proj in spec.projs if proj.stack)
            act: Any = layer.get_submodule(path).act_fn
            put(layer, path, Experts(spec, recipe, index, act, rotated, **made))
        for proj in spec.projs:
            chosen, size = linear_spec(recipe, proj, index), rotated if proj is spec.out_proj else 0
            if proj.stack is None and (chosen.format != "float" or size):
                outputs = sum(spec.size(output.segment) for output in proj.outputs)
                linear = Linear(spec.size(proj.input), outputs, bias=proj.bias, spec=chosen, block=size, **made)
                put(layer, spec.name(proj.path), linear)


def turns_values(spec: MixerSpec) -> bool:
    """Whether the values of a recurrence are rotated offline, where that is exact, instead of what out_proj reads.

    Softmax attention is rotated at run time all the same: across heads, and its values stay floats.
    """
    return spec.scan is not None and spec.scan.recurrent and value_rotation_illegal(spec) is None


def rotates(spec: MixerSpec, recipe: Recipe, layer: int) -> bool:
    """Whether something rotates the input of out_proj at run time: stacked weights in floats stay transformers'."""
    proj = spec.out_proj
    if proj is None or not recipe.rotate.output or turns_values(spec):
        return False
    stacked = [p for p in spec.projs if p.stack]
    return proj.stack is None or any(recipe.linear(p.role, layer).format != "float" for p in stacked)


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Set a submodule by its dotted path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


class HostedBlock:
    """A transformers layer on its way from floats to codes. arguments: what its model passes it beside the hidden
    states, for each batch size; lent: modules of earlier blocks by their full paths, where it borrows one.
    repeats: a linear may be called several times in a run."""

    repeats = False

    def __init__(
        self,
        layer: nn.Module,
        model: ModelSpec,
        block: BlockSpec,
        recipe: Recipe,
        index: int,
        arguments: Arguments,
        *,
        lent: dict[str, nn.Module],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_spec, self.layer_idx, self.carry = block, index, model.carry
        self.beside = model.d_model if model.passes_embedding else None
        self.device = device
        self.arguments = self.placed(arguments)
        if block.borrows is not None:
            path, lender = block.borrows
            put(layer, path, Borrowed(lent[lender]))
        fit(layer, model, block, recipe, index, dtype=dtype, device=device)
        for module in layer.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    empty = torch.empty(parameter.shape, dtype=dtype, device=device)
                    module._parameters[name] = nn.Parameter(empty, requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
        self.layer = layer.to(device=device, dtype=torch.float32).eval()

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take what was stored of this block when it was finished, by full name."""
        prefix = f"{self.block_spec.path}."
        self.layer.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})

    def lend(self, paths: Iterable[str]) -> dict[str, nn.Module]:
        """The modules of these full paths."""
        prefix = f"{self.block_spec.path}."
        return {path: self.layer.get_submodule(path.removeprefix(prefix)) for path in paths}

    def modules(self) -> Any:
        """Every module of the layer."""
        return self.layer.modules()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The layer's tensors, by path below it."""
        return self.layer.state_dict()

    def placed(self, arguments: Arguments) -> Arguments:
        """Arguments with their tensors where the layer is."""
        moved: Arguments = tree_map_only(torch.Tensor, lambda tensor: tensor.to(self.device), arguments)
        return moved

    def run(
        self, sub: Sublayer, hidden: torch.Tensor, carry: dict[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """The whole layer: hidden [B, T, D] -> [B, T, D]; its sublayers cannot run apart. Where layers take the
        embedding too, it lies beside the stream, [B, T, 2 D], and is handed on.

        carry: what earlier layers left for this one, by name; what it leaves for later ones is added.
        """
        args, kwargs = self.arguments[len(hidden)]
        if self.beside is not None:
            hidden, embedded = hidden.split(self.beside, -1)
            args = (embedded, *args[1:])
        passed = {} if self.carry is None else kwargs[self.carry]
        if self.carry is not None:
            kwargs = {**kwargs, self.carry: {**passed, **(carry or {})}}
        out = self.layer(hidden, *args, **kwargs)
        if self.carry is not None and carry is not None:
            carry |= {name: t for name, t in kwargs[self.carry].items() if name not in passed}
        out = out[0] if isinstance(out, tuple) else out
        return out if self.beside is None else torch.cat([out, embedded], -1)

    def part(self, sub: Sublayer) -> nn.Module:
        """The module of a sublayer."""
        return self.layer.get_submodule(sub.mixer.path)

    def linears(self, sub: Sublayer, proj: Proj) -> list[Linear]:
        """The low-bit linears of one projection: one, or one for each expert; none where it stays transformers'."""
        if proj.stack:
            module = self.layer.get_submodule(sub.mixer.name(proj.path).rpartition(".")[0])
            return module.linears(proj.role) if isinstance(module, Experts) else []
        linear = self.layer.get_submodule(sub.mixer.name(proj.path))
        return [linear] if isinstance(linear, Linear) else []

    def hold(self, sub: Sublayer, tensors: dict[str, torch.Tensor], kept_type: torch.dtype) -> None:
        """Take a sublayer's float tensors (by path below the block) to run on until they are quantised."""
        mixer, held = sub.mixer, set()
        own = self.part(sub)
        if isinstance(own, Mixer):
            own.hold({name.removeprefix(f"{mixer.path}."): t for name, t in tensors.items()}, kept_type)
            return
        for proj in mixer.projs:
            linears = self.linears(sub, proj)
            weight, bias = tensors[mixer.name(proj.weight)], tensors.get(mixer.name(f"{proj.path}.bias"))
            for i, linear in enumerate(linears):
                part, device = weight[i] if proj.stack else weight, linear._any_device()
                linear.hold(part.to(device), None if bias is None else bias.to(device, kept_type))
            if linears:
                held |= {mixer.name(proj.weight), mixer.name(f"{proj.path}.bias")}
        names = [mixer.name(param.path) for param in mixer.params]
        self._copy({name: tensors[name].to(kept_type) for name in names if name not in held})

    def keep(self, tensors: dict[str, torch.Tensor], kept_type: torch.dtype) -> None:
        """Take what belongs to no mixer: norms that stay, and the block's other tensors."""
        names = [f"{path}.{leaf}" for path in self.block_spec.norms for leaf in ("weight", "bias")]
        own = self.layer.state_dict()
        self._copy({n: tensors[n].to(kept_type) for n in (*names, *self.block_spec.params) if n in own})

    def _copy(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            getattr(self.layer.get_submodule(owner), leaf).copy_(tensor)
