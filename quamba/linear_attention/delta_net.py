"""DeltaNet: the delta rule without decay. Yang et al., 2406.06484."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import elu, normalize, relu, sigmoid, silu

from quamba.errors import UserError
from quamba.linear_attention.cache import LayerState
from quamba.linear_attention.configs import DeltaNetConfig
from quamba.linear_attention.conv import ShortConvolution
from quamba.linear_attention.mixer import Mixer, heads, masked
from quamba.linear_attention.norm import GatedRMSNorm, RMSNorm
from quamba_kernels import ops

L2_EPS = L1_EPS = 1e-6
ACTIVATIONS = {"silu": silu, "relu": relu, "elu": lambda x: elu(x) + 1, "identity": lambda x: x}


class Leave(nn.Module):
    """What the delta rules share after the scan."""

    g_proj: nn.Linear
    o_proj: nn.Linear
    v_size: int

    def add_leave(self, config: Any, values: int, *, gated: bool, activation: str = "swish") -> None:
        """Add the output gate, the norm over each head and the projection."""
        self.gated = gated
        if gated:
            self.g_proj = nn.Linear(config.hidden_size, values, bias=False)
            self.o_norm: nn.Module = GatedRMSNorm(self.v_size, config.norm_eps, activation=activation)
        else:
            self.o_norm = RMSNorm(self.v_size, config.norm_eps)
        self.o_proj = nn.Linear(values, config.hidden_size, bias=False)

    def leave(self, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """o [B, T, H, P] of the scan -> [B, T, D]."""
        o = self.o_norm(o, heads(self.g_proj(x), self.v_size)) if self.gated else self.o_norm(o)
        out: torch.Tensor = self.o_proj(o.flatten(2))
        return out


class DeltaNet(Mixer, Leave):
    """q, k = norm(act(conv(proj(x)))), v = silu(conv(v_proj(x))), beta = sigmoid(b_proj(x)).

    Raises UserError for an activation or a norm of q and k that fla does not have either.
    """

    def __init__(self, config: DeltaNetConfig, layer: int) -> None:
        super().__init__(config, layer)
        for name, known in (("qk_activation", tuple(ACTIVATIONS)), ("qk_norm", ("l2", "sum"))):
            if getattr(config, name) not in known:
                wanted = " or ".join(map(repr, known))
                given = getattr(config, name)
                raise UserError(f"{config.model_type} config has {name}={given!r}; supported is {wanted}")
        size = config.hidden_size
        keys, values = config.whole("expand_k"), config.whole("expand_v")
        self.k_size, self.v_size = keys // config.num_heads, values // config.num_heads
        self.activation, self.l2 = ACTIVATIONS[config.qk_activation], config.qk_norm == "l2"
        self.beta_range = 2.0 if config.allow_neg_eigval else 1.0
        self.q_proj = nn.Linear(size, keys, bias=False)
        self.k_proj = nn.Linear(size, keys, bias=False)
        self.v_proj = nn.Linear(size, values, bias=False)
        self.use_beta, self.use_short_conv = config.use_beta, config.use_short_conv
        if self.use_beta:
            self.b_proj = nn.Linear(size, config.num_heads, bias=False)
        if self.use_short_conv:
            self.q_conv1d = ShortConvolution(keys, config.conv_size, activation=False)
            self.k_conv1d = ShortConvolution(keys, config.conv_size, activation=False)
            self.v_conv1d = ShortConvolution(values, config.conv_size)
        self.add_leave(config, values, gated=config.use_gate)

    def mix(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        state: LayerState | None,
        carry: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        q, k, v = self.project(x, mask, state)
        if not self.use_short_conv:
            v = silu(v)
        q, k = (heads(self.activation(t), self.k_size) for t in (q, k))
        if not self.l2:
            q, k = (normalize(t, p=1, dim=-1, eps=L1_EPS) for t in (q, k))
        beta = sigmoid(self.b_proj(x).float()) if self.use_beta else torch.ones_like(q[..., 0], dtype=torch.float32)
        (q, k, v), scales = self.enter(q=q, k=k, v=heads(masked(v, mask), self.v_size))
        o = self.scan(
            (ops.delta_scan, ops.delta_update), state, q, k.unsqueeze(2), v.unsqueeze(2),
            (beta * self.beta_range).unsqueeze(2), None, scale=self.k_size**-0.5,
            norm_eps=L2_EPS if self.l2 else None, out_dtype=x.dtype, **scales,
        )  # fmt: skip
        return self.leave(o, x)
