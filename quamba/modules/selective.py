"""The mixer of Mamba1 and its relatives: a diagonal selective scan."""

from __future__ import annotations

from typing import Any

import torch

from quamba.errors import UserError
from quamba.models.spec import MixerSpec
from quamba.modules.mixer import Mixer
from quamba.modules.norm import Norm, Pending
from quamba.recipe import Recipe
from quamba_kernels import Setting, ops
from quamba_kernels.ops import Activation


class SelectiveMixer(Mixer):
    """in_proj gives [x | z]; x passes the convolution, then x_proj gives [dt | B | C] and dt_proj the rates."""

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
        if self.sites["x"].spec.granularity == "channel":
            raise UserError("scan_x cannot have a scale per channel in a selective scan: x_proj sums over its channels")
        inner, d_state = spec.sizes["I"], spec.sizes["N"]
        self.plain("A_log", inner, d_state, device=device)
        self.plain("D", inner, device=device)
        self.norms: dict[str, Norm] = {}
        for output in spec.proj("x_proj").outputs:
            if "rms" in output.post:
                size, gain = spec.size(output.segment), output.gain
                self.norms[output.name] = Norm(size, self.eps, folded=gain is None, dtype=dtype, device=device)
                path = f"{output.name}_norm" if gain is None else gain.removesuffix(".weight")
                self.add_module(path, self.norms[output.name])

    @property
    def conv_channels(self) -> dict[str, int]:
        return {"x": self.mixer_spec.sizes["I"]}

    @property
    def site_channels(self) -> dict[str, int]:
        s = self.mixer_spec.sizes
        return {"x": s["I"], "B": s["N"], "C": s["N"]}

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.mixer_spec.sizes["I"], self.mixer_spec.sizes["N"]

    def _bind(self) -> None:
        super()._bind()
        setting = Setting(self._any_device().type, self.dtype, dict(self.mixer_spec.sizes))
        self._scan, self._update = ops.selective_scan.bind(setting), ops.selective_update.bind(setting)
        self._rates = (-torch.exp(self.A_log.float()), self.D.float())
        sites = self.sites
        self._scales = {f"{name}_scale": sites[name].shared_scale for name in ("B", "C")}
        self._scales["x_scale"] = sites["x"].per_channel()
        columns = [scale for scale in (self._scales["B_scale"], self._scales["C_scale"]) if scale is not None]
        together = len(columns) == 2 and not self.norms
        self._column_scale = torch.cat([s.expand(self.mixer_spec.sizes["N"]) for s in columns]) if together else None
        self._quantize = ops.quantize.bind(setting)
        self._prefill = self._rotate = self._decode = None
        if self._has_prefill():
            parts = "quantize", "linear_w8a8", "selective_scan", "gate_output"
            self._prefill = self._fused(ops.selective_prefill, *parts)
        if self._prefill is not None:
            shape = {**self.mixer_spec.sizes, "block": self.block}
            self._rotate = ops.rotate_input.bind(Setting(setting.device, self.dtype, shape))
        if self._has_decode():
            self._decode = self._fused(ops.selective_decode, "selective_update", "gate_output")
        self._conv_decode = None if self._decode is None else ops.conv_decode.bind(setting)

    def _has_decode(self) -> bool:
        """Whether selective_decode can say what stands between this scan and out_proj: a gate, and B and C with a
        scale each."""
        return self._has_shared_columns() and self._has_bare_gate()

    def _has_bare_gate(self) -> bool:
        """Whether nothing stands between the gate and the rotation."""
        return not self.out.norm_groups and self.out.norm_weight is None

    def _has_shared_columns(self) -> bool:
        """Whether B and C have a scale each, or none."""
        return all(scale is None or scale.numel() == 1 for name, scale in self._scales.items() if name != "x_scale")

    def _has_prefill(self) -> bool:
        """Whether selective_prefill can say what stands between x_proj and the rotation: nothing but codes, dt_proj
        with a scale per token, the scan and the gate."""
        rates, together = self.linear("dt_proj"), (self._scales["B_scale"] is None) == (self._scales["C_scale"] is None)
        dynamic = rates.format.int8_input and rates.format.op is ops.linear_w8a8 and rates.input.per_token
        return dynamic and together and not self.norms and self._has_shared_columns() and self._has_bare_gate()

    def prefills(self, tokens: int) -> bool:
        """Whether this call is a prompt, and nobody wants to see what lies in between."""
        rates = self.linear("dt_proj")
        seen = rates.capture or rates.held is not None or rates._forward_hooks or rates._forward_pre_hooks
        sites = rates.input, self.sites["B"], self.sites["C"], self.gate
        return tokens > 1 and not seen and not any(site.watched for site in sites)

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
        x, z = self.linear("in_proj")(hidden_states).chunk(2, -1)
        batch, tokens, _ = x.shape
        state = self.state_of(kwargs.get("cache_params", cache), batch, x.device)
        decode = self._decode if self.decodes(state, tokens, attention_mask) else None
        with self.linear("x_proj").ahead(batch * tokens):
            if decode is not None and self._conv_decode is not None and state is not None:
                x = self._conv_decode(
                    x[:, 0], state.conv, self.conv1d.taps, self.conv1d.bias, in_scale=self._conv_in_scale,
                    weight_scale=self.conv1d.scale, out_scale=self._conv_out_scale, out_dtype=self.dtype,
                ).unsqueeze(1)  # fmt: skip
            else:
                x = self.quantise_part("x", self.convolve(x, state, attention_mask))
            x_in = Activation(x, self.sites["x"].shared_scale) if x.dtype == torch.int8 else x
            projected = self.x_proj(x_in)
        if self._prefill is not None and self._rotate is not None and self.prefills(tokens):
            rates, (A, D) = self.linear("dt_proj"), self._rates
            rates.bind()
            with self.linear(self.out.role).ahead(batch * tokens):
                u, last = self._prefill(
                    x, projected, rates._weights, rates.bias, A, D, z, self.before(state), **self._scales,
                    z_scale=self._z_scale, out_dtype=self.dtype,
                )  # fmt: skip
                self.store(last, state)
                return self.project(self._rotate(u, **self.output_options()), residual)
        rank, columns = projected.split([s["R"], 2 * s["N"]], -1)
        B, C = columns.chunk(2, -1)
        if self.norms:
            rank, B, C = (self.norms[name](part) for name, part in (("dt", rank), ("B", B), ("C", C)))
        dt = self.dt_proj(rank)
        A, D = self._rates
        if decode is not None and state is not None:
            u = decode(
                z[:, 0], state.recurrent, state.scale, state.rng, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D,
                z_scale=self._z_scale, **self._scales, **self.output_options(),
            )  # fmt: skip
            return self.project(u, residual)
        B, C = self.quantise_columns(columns, B, C)
        if state is not None and tokens == 1 and state.filled:
            y = self._update(
                state.recurrent, state.scale, state.rng, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, **self._scales
            ).unsqueeze(1)
        else:
            y, last = self._scan(x, dt, A, B, C, D, None, self.before(state), **self._scales, out_dtype=self.dtype)
            self.store(last, state)
        return self.leave(y, z, residual)

    def quantise_columns(
        self, columns: torch.Tensor, B: torch.Tensor, C: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """B and C [B, T, N], int8 where their sites say so; with static scales in one pass over both, [B, T, 2 N]."""
        if self._column_scale is None:
            return self.quantise_part("B", B), self.quantise_part("C", C)
        self.sites["B"].watch(B)
        self.sites["C"].watch(C)
        B, C = self._quantize(columns, self._column_scale).data.chunk(2, -1)
        return B, C
