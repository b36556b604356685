"""A mixture of experts: MLPs whose weights transformers stacks in one parameter, each of low-bit linears of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from quamba.models.spec import MixerSpec
from quamba.modules.linear import Linear
from quamba.recipe import Recipe


class Experts(nn.Module):
    """y[t] = sum_e weight[t, e] down_e(act(gate_e x) * up_e x), in the place of transformers' module of the same call.

    Experts without a gate compute down_e(act(up_e x)). act: transformers' activation of the module that this replaces.
    Tensors lie under ``<role>.<expert>.``.
    """

    def __init__(
        self,
        spec: MixerSpec,
        recipe: Recipe,
        layer: int,
        act: Callable[[torch.Tensor], torch.Tensor],
        block: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.act, self.projs = act, tuple(proj for proj in spec.projs if proj.stack)
        up, down = self.projs
        self.count, self.gated = spec.axes[str(up.stack)].size, len(up.outputs) > 1
        for proj in self.projs:
            features, outputs = spec.size(proj.input), sum(spec.size(output.segment) for output in proj.outputs)
            self.add_module(
                proj.role,
                nn.ModuleList(
                    Linear(
                        features, outputs, bias=False, spec=recipe.linear(proj.role, layer),
                        block=block if proj is down else 0, dtype=dtype, device=device,
                    )
                    for _ in range(self.count)
                ),
            )  # fmt: skip

    def linears(self, role: str) -> list[Linear]:
        """The linears of one role, by expert."""
        return cast(list[Linear], list(self.get_submodule(role).children()))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """hidden_states [tokens, D]; top_k_index int64 and top_k_weights [tokens, k] -> [tokens, D]."""
        up, down = (self.linears(proj.role) for proj in self.projs)
        out = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.count:
                continue  # transformers marks a choice that nobody serves so
            token, choice = (top_k_index == expert).nonzero(as_tuple=True)
            y = up[expert](hidden_states[token])
            if self.gated:
                gate, y = y.chunk(2, -1)
                y = self.act(gate) * y
            else:
                y = self.act(y)
            y = down[expert](y) * top_k_weights[token, choice].unsqueeze(-1).to(y.dtype)
            out.index_add_(0, token, y.to(out.dtype))
        return out
