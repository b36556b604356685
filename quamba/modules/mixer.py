"""What every recurrent mixer here shares: its linears, its sites, its state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from quamba.models.spec import MixerSpec, OutSite
from quamba.modules.conv import Conv
from quamba.modules.linear import Linear
from quamba.modules.lowbit import LowBit
from quamba.modules.site import Site
from quamba.modules.state import HybridState, RecurrentState, deferred
from quamba.recipe import Recipe
from quamba.transforms.rotate import output_block
from quamba_kernels import Backend, Op, Setting, ops
from quamba_kernels.ops import Activation
from quamba_kernels.registry import forced_backend


class Mixer(LowBit, ABC):
    """in_proj -> conv + SiLU -> scan -> gate (+ norm) -> rotation -> out_proj.

    The same forward runs in floats while calibrating, and in int8 wherever a site has its scale. Subclasses split the
    projections and run their scan; ``conv_channels`` names the stretches of the convolution and their sizes.
    """

    # once bound: the op that decodes a token of the mixer, if any, and its rates, A first
    _decode: Backend | None
    _rates: tuple[torch.Tensor, ...]

    def __init__(
        self,
        spec: MixerSpec,
        recipe: Recipe,
        layer: int,
        eps: float,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(dtype)
        self.mixer_spec, self.layer_idx = spec, layer
        self.eps = eps if spec.eps is None else spec.eps
        self.state_spec = recipe.state_of(layer)
        self.block = output_block(spec, recipe.rotate.block) if recipe.rotate.output else 0
        sizes = spec.sizes
        made: dict[str, Any] = {"dtype": dtype, "device": device}
        for proj in spec.projs:
            features = spec.size(proj.input)
            outputs = sum(spec.size(output.segment) for output in proj.outputs)
            linear = Linear(features, outputs, bias=proj.bias, spec=recipe.linear(proj.role, layer), **made)
            self.add_module(proj.path, linear)
        channels = sum(self.conv_channels.values())
        self.conv1d = Conv(channels, sizes["W"], recipe.conv_of(layer), bias=spec.conv_bias, **made)
        self.conv_input = Site(recipe.activation("conv_input", layer), channels, **made)
        self.gate = Site(recipe.activation("gate", layer), sizes["I"], **made)
        self.sites: dict[str, Site] = {}
        for i in spec.inputs:
            if i.name in self.site_channels:
                site = self._site(recipe, i.role, layer, i.semantics == "value", self.site_channels[i.name], made)
                self.add_module(f"scan_{i.name}", site)
                self.sites[i.name] = site

    def _site(
        self, recipe: Recipe, role: str, layer: int, value: bool, channels: int, made: dict[str, Any]
    ) -> Site:
        sizes = self.mixer_spec.sizes
        clusters = None
        if value and "H" in sizes and recipe.cluster is not None:
            per_group = sizes["H"] // sizes["G"]
            wanted = min(recipe.cluster.heads, per_group), min(recipe.cluster.channels, sizes["P"])
            clusters = (sizes["H"], sizes["P"], *wanted)
        return Site(recipe.activation(role, layer), channels, groups=sizes["G"], clusters=clusters, **made)

    @property
    @abstractmethod
    def conv_channels(self) -> dict[str, int]:
        """Stretches of the convolution, in order, with their channels."""

    @property
    @abstractmethod
    def site_channels(self) -> dict[str, int]:
        """Scan inputs that may become int8, with their channels."""

    def _bind(self) -> None:
        shape = {**self.mixer_spec.sizes, "block": self.block}
        setting = Setting(self._any_device().type, self.dtype, shape)
        self._conv, self._gate_output = ops.causal_conv1d.bind(setting), ops.gate_output.bind(setting)
        self._quantize_state = ops.quantize_state.bind(setting)
        self._quantize_states = ops.quantize_states.bind(setting)
        self._conv_in_scale, self._z_scale = self.conv_input.per_channel(), self.gate.per_channel()
        parts = [self.sites[name].per_channel() for name in self.conv_channels]
        fused = all(p is not None for p in parts)
        self._conv_out_scale = torch.cat([p for p in parts if p is not None]) if fused else None

    def _fused(self, op: Op, *parts: str) -> Backend | None:
        """The backend of an op that stands for several (parts) of the mixer; None where only the torch body would.

        Then the mixer chains the ops that it has bound, as it does where a scale varies by token and so has no place
        in the op, and where a backend is forced that does not know the op, or another one for a part.
        """
        if forced_backend(op.name) not in (None, *(known.name for known in op.candidates)):
            return None
        shape = {**self.mixer_spec.sizes, "norm_groups": self.out.norm_groups, "block": self.block}
        backend = op.bind(Setting(self._any_device().type, self.dtype, shape))
        if any(forced_backend(part) not in (None, backend.name) for part in parts):
            return None
        static = all(site.ready or not site.quantised for site in (self.conv_input, self.gate, *self.sites.values()))
        return backend if backend.name != "torch" and static and self.out.gate is not None else None

    def decodes(self, state: RecurrentState | None, tokens: int, mask: torch.Tensor | None) -> bool:
        """Whether this call is one token of sequences under way, and nobody wants to see what lies in between."""
        if state is None or tokens > 1 or mask is not None or not state.filled:
            return False
        sites = self.conv_input, self.gate, *self.sites.values(), self.linear(self.out.role).input
        return not any(site.watched for site in sites)

    @property
    def out(self) -> OutSite:
        """What stands before out_proj."""
        assert self.mixer_spec.out is not None
        return self.mixer_spec.out

    def linear(self, role: str) -> Linear:
        """The linear of that role."""
        found = self.get_submodule(self.mixer_spec.proj(role).path)
        assert isinstance(found, Linear)
        return found

    def hold(self, tensors: dict[str, torch.Tensor], kept_type: torch.dtype) -> None:
        """Take float tensors (by path below the mixer) to run on until they are quantised.

        What stays unquantised is rounded to the checkpoint's type now, so that what is calibrated is what is stored.
        """
        held, device = set(), next(self.parameters()).device
        for proj in self.mixer_spec.projs:
            bias = tensors.get(f"{proj.path}.bias")
            weight = tensors[proj.weight].to(device)
            self.linear(proj.role).hold(weight, None if bias is None else bias.to(device, kept_type))
            held |= {proj.weight, f"{proj.path}.bias"}
        for param in self.mixer_spec.params:
            if param.path not in held:
                owner, _, leaf = param.path.rpartition(".")
                module = self.get_submodule(owner)
                if leaf == "weight" and isinstance(module, Conv):
                    module.hold(tensors[param.path].to(device, kept_type))
                else:
                    getattr(module, leaf).copy_(tensors[param.path].to(kept_type))
        for child in self.modules():
            if isinstance(child, LowBit):
                child.unbind()

    def new_state(self, batch: int, device: torch.device, beside: Any = None) -> RecurrentState:
        """Zeros for ``batch`` sequences, in the place of what transformers keeps for the layer (``beside``)."""
        width = self.mixer_spec.sizes["W"]
        dtype = torch.int8 if self.conv_input.ready else self.dtype
        conv = torch.zeros(batch, width - 1, sum(self.conv_channels.values()), dtype=dtype, device=device)
        kind = HybridState if isinstance(beside, DynamicLayer) else RecurrentState
        state = kind(conv, (batch, *self.state_shape), self.state_spec, self.layer_idx, device)
        if isinstance(state, HybridState):
            state.adopt(beside)
        return state

    @property
    @abstractmethod
    def state_shape(self) -> tuple[int, ...]:
        """Shape of one sequence's recurrent state."""

    def state_of(self, cache: Any, batch: int, device: torch.device) -> RecurrentState | None:
        """This layer's state inside a transformers cache, made when it is not there yet."""
        if cache is None:
            return None
        state = cache.layers[self.layer_idx]
        if not isinstance(state, RecurrentState):
            state = cache.layers[self.layer_idx] = self.new_state(batch, device, beside=state)
        return state

    def before(self, state: RecurrentState | None) -> torch.Tensor | None:
        """What stands before the first token of a prompt, None for zeros."""
        return state.value() if state is not None and state.filled else None

    def store(self, h: torch.Tensor, state: RecurrentState | None) -> None:
        """Keep the state h [B, ..., N] fp32 after a prompt, if anywhere: at once, or together with other layers'."""
        if state is None:
            return
        waiting = deferred()
        if waiting is not None and self._quantize_states.name == self._quantize_state.name != "torch":
            waiting.add(self._quantize_states, h, state)
        else:
            self._quantize_state(h, state.recurrent, state.scale, state.rng)
        state.seen()

    def convolve(self, x: torch.Tensor, state: RecurrentState | None, mask: torch.Tensor | None) -> torch.Tensor:
        """conv + SiLU over x [B, T, C]; padded tokens (mask [B, T] 0) enter and leave as zeros."""
        if self._conv_in_scale is None:
            x, x_scale = self.conv_input(x)
        else:  # the convolution rounds what it reads
            self.conv_input.watch(x)
            x_scale = None
        if mask is not None:
            x = x * mask.unsqueeze(-1).to(x.dtype)
        y = self._conv(
            x, self.conv1d.taps, self.conv1d.bias, None if state is None else state.conv,
            in_scale=self._conv_in_scale, x_scale=x_scale, weight_scale=self.conv1d.scale,
            out_scale=self._conv_out_scale, out_dtype=self.dtype,
        )  # fmt: skip
        if mask is not None:
            y = y * mask.unsqueeze(-1).to(y.dtype)
        return y

    def quantise_part(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """A scan input that the convolution did not quantise already: int8 where its site says so."""
        if x.dtype == torch.int8:
            return x
        return self.sites[name](x).data

    def entering(self, site: Site, x: torch.Tensor, scale: torch.Tensor | None) -> Activation:
        """x [..., C] for an op that rounds floats by a static scale itself; rounded here where the scale varies."""
        if scale is None:
            return site(x)
        site.watch(x)
        return Activation(x, scale)

    def output_options(self) -> dict[str, Any]:
        """What gate_output, and the ops that end in it, take beside their tensors."""
        site = self.linear(self.out.role).input
        return {"block": self.block, "out_scale": site.shared_scale, "per_token": site.per_token,
                "out_dtype": self.dtype}  # fmt: skip

    def leave(self, y: torch.Tensor, z: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """Gate, norm, rotate and project y [B, T, I] back into the residual stream."""
        gate = self.entering(self.gate, z, self._z_scale)
        norm = getattr(self, "norm", None)
        u = self._gate_output(
            y, gate.data, None if norm is None else norm.weight, self.eps, z_scale=gate.scale,
            norm_groups=self.out.norm_groups, **self.output_options(),
        )  # fmt: skip
        return self.project(u, residual)

    def project(self, u: Activation, residual: torch.Tensor | None) -> torch.Tensor:
        """out_proj of u [B, T, I], or of one token [B, I]."""
        if u.data.dim() == 2:
            by_token = u.scale is not None and u.scale.dim() == 2
            u = Activation(u.data.unsqueeze(1), u.scale.unsqueeze(1) if u.scale is not None and by_token else u.scale)
        out_proj = self.linear(self.out.role)
        out_proj.input.watch(u.data)
        return out_proj(u, residual, out_dtype=self.dtype if residual is None else residual.dtype)
