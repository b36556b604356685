"""What enters a recurrence that its own module runs: floats, or int8 with static scales where a recipe asks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quamba.models.spec import MixerSpec
from quamba.modules.site import Site
from quamba.recipe import Recipe, StateSpec

BY_HEAD = "tensor", "state_group"
"""Granularities that a key may have: what is constant over its channels factors out of the product with a query."""


class ScanInputs(nn.Module):
    """A mixer whose queries, keys and values pass ``enter`` on their way into the scan. ``furnish`` gives those that a
    recipe quantises a site each; without, they stay floats. state_spec: how the state is stored between tokens."""

    state_spec = StateSpec()

    def furnish(
        self,
        spec: MixerSpec,
        recipe: Recipe,
        layer: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        """Make the sites. State groups are heads; of a state without heads, channels."""
        self.state_spec = recipe.linear_state_of(layer)
        for i in spec.inputs:
            asked = recipe.activation(i.role, layer)
            if i.semantics != "value" and asked.granularity not in BY_HEAD:
                asked = asked.model_copy(update={"granularity": "state_group"})
            groups = spec.size(i.axes[:-1] or i.axes)
            site = Site(asked, spec.size(i.axes), groups=groups, dtype=dtype, device=device)
            if site.static:
                self.add_module(f"scan_{i.name}", site)

    @property
    def sites(self) -> list[Site]:
        """Those that the recipe asked for."""
        return [module for module in self.children() if isinstance(module, Site)]

    def enter(self, **given: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        """Floats [..., H, C], by the names in the description -> the same in the order given, codes where they are
        quantised, and scales as operators take them: v_scale [H, C], q_scale and k_scale [H] or [1]."""
        taken: list[torch.Tensor] = []
        scales: dict[str, torch.Tensor] = {}
        for name, x in given.items():
            site = self._modules.get(f"scan_{name}")
            if isinstance(site, Site):
                heads, size = x.shape[-2:]
                codes = site(x.to(site.dtype).flatten(-2))
                if codes.scale is not None:
                    x, scale = codes.data.unflatten(-1, (heads, size)), site.scale
                    if name == "v":
                        scale = scale.view(heads if scale.numel() > 1 else 1, -1).expand(heads, size)
                    scales[f"{name}_scale"] = scale
            taken.append(x)
        return tuple(taken), scales
