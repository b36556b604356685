"""What the recurrent mixers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import logsigmoid, relu, sigmoid, silu
from transformers.cache_utils import Cache

from quamba.errors import UserError
from quamba.linear_attention.cache import LayerState, state_of
from quamba.linear_attention.conv import ShortConvolution
from quamba.modules.scan_inputs import ScanInputs
from quamba.modules.state import DTYPES
from quamba_kernels import Backend, Op, Setting, ops
from quamba_kernels.ops.state import load_state

FEATURE_MAPS: dict[str | None, Callable[[torch.Tensor], torch.Tensor]] = {
    None: lambda x: x, "relu": relu, "sigmoid": sigmoid, "logsigmoid": logsigmoid, "silu": silu, "swish": silu,
    "sqrelu": lambda x: relu(x).square(),
}  # fmt: skip


class Mixer(ScanInputs, ABC):
    """Subclasses define ``mix``; projections are modules that are called, so that they can be replaced in place.
    Those that ``project`` have the parts named below, the convolutions only with use_short_conv."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    use_short_conv: bool
    q_conv1d: ShortConvolution
    k_conv1d: ShortConvolution
    v_conv1d: ShortConvolution

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.layer_idx = layer
        self._bound: dict[tuple[str, str, torch.dtype], Backend] = {}

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        carry: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """hidden_states [B, T, D] -> the same; attention_mask [B, at least T], 0 for padding on the left.

        carry: what crosses layers within one pass, by name.
        """
        tokens = hidden_states.shape[1]
        mask = None
        if attention_mask is not None:
            mask = attention_mask[:, -tokens:].unsqueeze(-1).to(hidden_states.dtype)
        state = state_of(past_key_values, self.layer_idx)
        assert state is None or isinstance(state, LayerState)
        out = self.mix(hidden_states, mask, state, {} if carry is None else carry)
        if state is not None:
            state.advance(tokens)
        return out

    @abstractmethod
    def mix(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        state: LayerState | None,
        carry: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """x [B, T, D] -> the same; mask [B, T, 1] of x's type."""

    def project(
        self, x: torch.Tensor, mask: torch.Tensor | None, state: LayerState | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [B, T, C] of x, after their convolutions where there are any."""
        q, k, v = masked(self.q_proj(x), mask), masked(self.k_proj(x), mask), masked(self.v_proj(x), mask)
        if self.use_short_conv:
            q, k, v = self.q_conv1d(q, state, "q"), self.k_conv1d(k, state, "k"), self.v_conv1d(v, state, "v")
        return q, k, v

    def scan(
        self,
        operators: tuple[Op, Op],
        state: LayerState | None,
        *tokens: torch.Tensor | None,
        fixed: tuple[torch.Tensor | None, ...] = (),
        **options: Any,
    ) -> torch.Tensor:
        """Run (scan, update) over ``tokens`` [B, T, ...] from the state on, which is left behind in it."""
        scan, update = operators
        first = next(t for t in tokens if t is not None)
        before, scale = (None, None) if state is None else (state.get("recurrent"), state.get("recurrent_scale"))
        if state is not None and before is not None and first.shape[1] == 1:
            now = [None if t is None else t.squeeze(1) for t in tokens]
            y: torch.Tensor = self._bind(update, first)(before, scale, state.rng, *now, *fixed, **options).unsqueeze(1)
            return y
        before = None if before is None else load_state(before, scale)
        y, after = self._bind(scan, first)(*tokens, *fixed, before, **options)
        if state is not None:
            self._keep(state, after)
        return y

    def _keep(self, state: LayerState, after: torch.Tensor) -> None:
        """Store the state [B, ..., N] fp32 after a prefill as the recipe says."""
        spec = self.state_spec
        if state.get("recurrent") is None:
            state.put("recurrent", torch.zeros_like(after, dtype=DTYPES[spec.dtype]))
            if spec.dtype == "int8":
                state.put("recurrent_scale", torch.ones_like(after[..., 0]), empty=1.0)
            if spec.dtype == "int8" and spec.rounding == "stochastic":
                state.rng = torch.tensor([spec.seed * 65537 + self.layer_idx, 0], device=after.device)
        stored, scale = state.get("recurrent"), state.get("recurrent_scale")
        self._bind(ops.quantize_state, after)(after, stored, scale, state.rng)

    def _bind(self, op: Op, x: torch.Tensor) -> Backend:
        key = (op.name, x.device.type, x.dtype)
        if key not in self._bound:
            self._bound[key] = op.bind(Setting(x.device.type, x.dtype))
        return self._bound[key]


def heads(x: torch.Tensor, size: int) -> torch.Tensor:
    """[..., H * size] -> [..., H, size]."""
    return x.unflatten(-1, (-1, size))


def masked(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """x [B, T, C] with zeros at padded tokens."""
    return x if mask is None else x * mask


def activation(config: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The feature map of queries and keys. Raises UserError for an unknown one."""
    if config.feature_map not in FEATURE_MAPS:
        known = " or ".join(map(repr, FEATURE_MAPS))
        raise UserError(f"{config.model_type} config has feature_map={config.feature_map!r}; supported is {known}")
    return FEATURE_MAPS[config.feature_map]
