"""The gated delta rule of hybrids on quamba's operators, in the place of transformers' module: its projections, norm
and parameters keep their names. Yang et al., 2412.06464; Moonshot AI, 2510.26692."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import softplus
from transformers.cache_utils import DynamicLayer

from quamba.models.spec import MixerSpec
from quamba.modules.scan_inputs import ScanInputs
from quamba.modules.state import HybridState, RecurrentState
from quamba.recipe import Recipe, StateSpec
from quamba_kernels import Setting, ops

L2_EPS = 1e-6


class DeltaRule(ScanInputs):
    """Projections -> conv + SiLU -> queries, keys and values (int8 where a recipe asks) -> delta rule -> gated norm ->
    projection. The decay is one number per head, or one per key channel; the state is fp32 unless a recipe asks."""

    conv1d: nn.Conv1d

    def __init__(self, old: Any, spec: MixerSpec) -> None:
        """old: transformers' module, whose parts are taken over."""
        super().__init__()
        for name, module in old.named_children():
            self.add_module(name, module)
        for name, parameter in old._parameters.items():
            self.register_parameter(name, parameter)
        self.layer_idx, self.mixer_spec = int(old.layer_idx), spec
        self.beta_range = 2.0 if getattr(old, "allow_neg_eigval", False) else 1.0
        segments = {i.name: i.axes for i in spec.inputs}
        self.key, self.value = (spec.axes[segments[name][-1]].size for name in ("k", "v"))
        self.heads = spec.size(segments["v"]) // self.value
        self.parts = {name: spec.size(segments[name]) for name in ("q", "k", "v")}
        self._A_log, self._dt_bias = (
            next(p.path for p in spec.params if p.path.endswith(leaf)) for leaf in ("A_log", "dt_bias")
        )
        self.state_spec = StateSpec()
        self._bound: tuple[Any, ...] = ()
        self._setting: Setting | None = None
        self._places: dict[tuple[str, torch.device], torch.Tensor] = {}

    def furnish(
        self,
        spec: MixerSpec,
        recipe: Recipe,
        layer: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        """Rates of writing and forgetting stay floats."""
        entering = replace(spec, inputs=tuple(i for i in spec.inputs if i.semantics != "rate"))
        super().furnish(entering, recipe, layer, dtype=dtype, device=device)
        asked = recipe.state_of(layer)
        self.state_spec = asked.model_copy(update={"dtype": asked.delta_rule})

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache: Any = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """hidden_states [B, T, D] -> [B, T, D]; attention_mask [B, T], 0 for padding on the left. The cache has other
        names before transformers 5.24."""
        cache = kwargs.get("cache_params", kwargs.get("past_key_values", cache))
        batch, tokens, _ = hidden_states.shape
        if attention_mask is not None:
            hidden_states = hidden_states * attention_mask[:, -tokens:, None].to(hidden_states.dtype)
        found = self.project(hidden_states)
        state = self.state_of(cache, batch, hidden_states)
        mixed = torch.cat([found[name] for name in self.parts], -1)
        conv, scan, update, store = self._operators(mixed)
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        mixed = conv(mixed, weight, bias, None if state is None else state.conv, out_dtype=mixed.dtype)
        sizes = {"q": self.key, "k": self.key, "v": self.value}
        parts = zip(sizes.items(), mixed.split(list(self.parts.values()), -1), strict=True)
        (q, k, v), scales = self.enter(**{name: part.unflatten(-1, (-1, size)) for (name, size), part in parts})
        beta = found["beta"].float().sigmoid() * self.beta_range
        taken = (q, k.unsqueeze(2), v.unsqueeze(2), beta.unsqueeze(2), self.log_decay(found["rate"]))
        options = {**scales, "scale": self.key**-0.5, "norm_eps": L2_EPS, "out_dtype": hidden_states.dtype}
        if state is not None and tokens == 1 and state.filled:
            now = [part.squeeze(1) for part in taken]
            o = update(state.recurrent, state.scale, state.rng, *now, **options).unsqueeze(1)
        else:
            o, last = scan(*taken, state.value() if state is not None and state.filled else None, **options)
            if state is not None:
                store(last, state.recurrent, state.scale, state.rng)
                state.seen()
        assert self.mixer_spec.out is not None and self.mixer_spec.out_proj is not None
        norm = self.get_submodule(str(self.mixer_spec.out.norm_weight).rpartition(".")[0])
        y = norm(o, found["z"].unflatten(-1, (-1, self.value)))
        projected: torch.Tensor = self.get_submodule(self.mixer_spec.out_proj.path)(y.flatten(2))
        return projected

    def project(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the projections give, [B, T, ...] by the names in the description."""
        found = {"residual": hidden}
        for proj in self.mixer_spec.projs[:-1]:
            y = self.get_submodule(proj.path)(found[proj.reads])
            for name in (part.name for part in proj.parts):
                rows = self.mixer_spec.rows(proj, name)
                together = rows == list(range(rows[0], rows[-1] + 1))
                if together:
                    found[name] = y[..., rows[0] : rows[-1] + 1]
                    continue
                if (name, y.device) not in self._places:
                    self._places[name, y.device] = torch.tensor(rows, device=y.device)
                found[name] = y.index_select(-1, self._places[name, y.device])
        return found

    def log_decay(self, rate: torch.Tensor) -> torch.Tensor:
        """-exp(A_log) softplus(rate + dt_bias), fp32 [B, T, H, 1] or [B, T, H, K]."""
        A_log, dt_bias = (self.get_parameter(path).float().flatten() for path in (self._A_log, self._dt_bias))
        return -torch.exp(A_log)[:, None] * softplus(rate.float() + dt_bias).unflatten(-1, (self.heads, -1))

    def state_of(self, cache: Any, batch: int, like: torch.Tensor) -> RecurrentState | None:
        """This layer's state inside a transformers cache, made when it is not there yet."""
        if cache is None:
            return None
        state = cache.layers[self.layer_idx]
        if not isinstance(state, RecurrentState):
            conv = like.new_zeros(batch, self.conv1d.weight.shape[-1] - 1, sum(self.parts.values()))
            kind, beside = HybridState if isinstance(state, DynamicLayer) else RecurrentState, state
            shape = (batch, self.heads, self.value, self.key)
            state = cache.layers[self.layer_idx] = kind(conv, shape, self.state_spec, self.layer_idx, like.device)
            if isinstance(state, HybridState):
                state.adopt(beside)
        return state

    def _operators(self, x: torch.Tensor) -> tuple[Any, ...]:
        setting = Setting(x.device.type, x.dtype)
        if self._setting != setting:
            self._setting = setting
            used = ops.causal_conv1d, ops.delta_scan, ops.delta_update, ops.quantize_state
            self._bound = tuple(op.bind(setting) for op in used)
        return self._bound
