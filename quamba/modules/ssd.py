"""The mixer of Mamba2 and its relatives: SSD with scalar decay per head."""

from __future__ import annotations

from typing import Any

import torch

from quamba.models.spec import MixerSpec
from quamba.modules.lowbit import LowBit
from quamba.modules.mixer import Mixer
from quamba.modules.norm import Pending
from quamba.modules.state import RecurrentState
from quamba.recipe import Recipe
from quamba_kernels import Setting, ops
from quamba_kernels.ops import Activation


class Gain(LowBit):
    """The weight of the gated norm, [I]."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device | str | None) -> None:
        super().__init__(dtype)
        self.plain("weight", size, device=device)


class SSDMixer(Mixer):
    """in_proj gives [z | x | B | C | dt]; x, B and C pass the convolution."""

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
        super().__init__(spec, recipe, layer, eps, dtype=dtype, device=device)
        heads = spec.sizes["H"]
        for name in ("A_log", "D", "dt_bias"):
            self.plain(name, heads, device=device)
        self.norm = Gain(spec.sizes["I"], dtype, device) if spec.out and spec.out.norm_weight else None

    @property
    def conv_channels(self) -> dict[str, int]:
        s = self.mixer_spec.sizes
        return {"x": s["I"], "B": s["G"] * s["N"], "C": s["G"] * s["N"]}

    @property
    def site_channels(self) -> dict[str, int]:
        return self.conv_channels

    @property
    def state_shape(self) -> tuple[int, ...]:
        s = self.mixer_spec.sizes
        return s["H"], s["P"], s["N"]

    def _bind(self) -> None:
        super()._bind()
        setting = Setting(self._any_device().type, self.dtype, dict(self.mixer_spec.sizes))
        self._scan, self._update = ops.ssd_scan.bind(setting), ops.ssd_update.bind(setting)
        s = self.mixer_spec.sizes
        x_scale = self.sites["x"].per_channel()
        self._A = -torch.exp(self.A_log.float())
        self._rates = (self._A, self.D.float(), self.dt_bias.float())
        self._scales = {
            "x_scale": None if x_scale is None else x_scale.view(s["H"], s["P"]),
            "B_scale": self._group_scale("B"),
            "C_scale": self._group_scale("C"),
        }
        alike = len({site.ready for site in self.sites.values()}) == 1
        decode = ops.ssd_decode, "causal_conv1d", "ssd_update", "gate_output"
        self._decode = self._fused(*decode) if alike else None
        self._prefill = self._fused(ops.ssd_prefill, "causal_conv1d", "ssd_scan") if alike else None

    def _group_scale(self, name: str) -> torch.Tensor | None:
        scale = self.sites[name].per_channel()
        return None if scale is None else scale.view(self.mixer_spec.sizes["G"], -1)[:, 0].contiguous()

    def prefills(self, state: RecurrentState | None, tokens: int, mask: torch.Tensor | None) -> bool:
        """Whether this call is a prompt without padding, and nobody wants to see what lies in between."""
        if self._prefill is None or mask is not None or (tokens == 1 and state is not None and state.filled):
            return False
        return not any(site.watched for site in (self.conv_input, *self.sites.values()))

    def forward(
        self,
        hidden_states: torch.Tensor | Activation | Pending,
        cache: Any = None,
        attention_mask: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """hidden_states [B, T, D] -> [B, T, D], with the residual added when given; attention_mask [B, T], 0 for
        padding on the left."""
        self.bind()
        s = self.mixer_spec.sizes
        projected = self.linear("in_proj")(hidden_states)
        batch, tokens, _ = projected.shape
        state = self.state_of(kwargs.get("cache_params", cache), batch, projected.device)
        if self._decode is not None and state is not None and self.decodes(state, tokens, attention_mask):
            return self.project(self.decode(projected[:, 0], state), residual)
        z, mixed, dt = projected.split([s["I"], sum(self.conv_channels.values()), s["H"]], -1)
        A, D, dt_bias = self._rates
        options = {**self._scales, "dt_limit": self.mixer_spec.dt_limit, "out_dtype": self.dtype}
        fused = self._prefill if self.prefills(state, tokens, attention_mask) else None
        if fused is None:
            mixed = self.convolve(mixed, state, attention_mask)
        with self.linear(self.out.role).ahead(batch * tokens):
            if fused is None:
                y = self.scan(mixed, dt, state, **options)
            else:
                y, last = fused(
                    mixed, dt, self.conv1d.taps, self.conv1d.bias, None if state is None else state.conv, A, D, dt_bias,
                    self.before(state), groups=s["G"], d_state=s["N"], conv_in_scale=self._conv_in_scale,
                    conv_weight_scale=self.conv1d.scale, conv_out_scale=self._conv_out_scale, **options,
                )  # fmt: skip
                self.store(last, state)
            return self.leave(y.reshape(batch, tokens, s["I"]), z, residual)

    def scan(
        self, mixed: torch.Tensor, dt: torch.Tensor, state: RecurrentState | None, **options: Any
    ) -> torch.Tensor:
        """The recurrence over what the convolution gives, mixed [B, T, ...] -> y [B, (T,) H, P]; leaves its state."""
        batch, tokens, _ = mixed.shape
        s, (A, D, dt_bias) = self.mixer_spec.sizes, self._rates
        parts = mixed.split(list(self.conv_channels.values()), -1)
        x, B, C = (self.quantise_part(name, part) for name, part in zip(self.conv_channels, parts, strict=True))
        if state is not None and tokens == 1 and state.filled:
            y: torch.Tensor = self._update(
                state.recurrent, state.scale, state.rng, x.view(batch, s["H"], s["P"]), dt[:, 0], A,
                B.view(batch, s["G"], s["N"]), C.view(batch, s["G"], s["N"]), D, dt_bias, **options,
            )  # fmt: skip
            return y
        y, last = self._scan(
            x.unflatten(-1, (s["H"], s["P"])), dt, A, B.unflatten(-1, (s["G"], s["N"])),
            C.unflatten(-1, (s["G"], s["N"])), D, dt_bias, self.before(state), **options,
        )  # fmt: skip
        self.store(last, state)
        return y

    def decode(self, projected: torch.Tensor, state: RecurrentState) -> Activation:
        """One token from in_proj's output [B, ...] to out_proj's input [B, I], in one op."""
        assert self._decode is not None
        A, D, dt_bias = self._rates
        u: Activation = self._decode(
            projected, state.conv, state.recurrent, state.scale, state.rng, self.conv1d.taps, self.conv1d.bias, A, D,
            dt_bias, None if self.norm is None else self.norm.weight, self.eps, conv_in_scale=self._conv_in_scale,
            conv_weight_scale=self.conv1d.scale, conv_out_scale=self._conv_out_scale, z_scale=self._z_scale,
            dt_limit=self.mixer_spec.dt_limit, norm_groups=self.out.norm_groups, **self._scales,
            **self.output_options(),
        )  # fmt: skip
        return u
