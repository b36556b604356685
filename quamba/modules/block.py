"""A whole block: residual + mixer(norm(residual)), in the place of transformers' own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quamba.models.spec import BlockSpec, ModelSpec, Sublayer
from quamba.modules.conv import Conv
from quamba.modules.lowbit import LowBit
from quamba.modules.mixer import Mixer
from quamba.modules.norm import Norm
from quamba.modules.selective import SelectiveMixer
from quamba.modules.ssd import SSDMixer
from quamba.recipe import Recipe

MIXERS: dict[str, type[Mixer]] = {"selective": SelectiveMixer, "ssd": SSDMixer}


class RecurrentBlock(nn.Module):
    """One block of sublayers, its tensors under the names that the checkpoint gives them."""

    _is_hf_initialized: bool

    def __init__(
        self,
        model: ModelSpec,
        block: BlockSpec,
        recipe: Recipe,
        layer: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.layer_idx, self.block_spec = layer, block
        self.residual_dtype = torch.float32 if model.residual_fp32 else None
        for sub in block.sublayers:
            made: dict[str, Any] = {"dtype": dtype, "device": device}
            self.add_module(sub.norm, Norm(model.d_model, model.eps, folded=recipe.fold_norms, **made))
            mixer = MIXERS[sub.mixer.scan.family](sub.mixer, recipe, layer, model.eps, **made)
            self.add_module(sub.mixer.path, mixer)

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache_params: Any = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """hidden_states [B, T, D] -> the same; attention_mask [B, T], 0 for padding on the left."""
        hidden = hidden_states if self.residual_dtype is None else hidden_states.to(self.residual_dtype)
        for sub in self.block_spec.sublayers:
            hidden = self.run(sub, hidden, cache_params, attention_mask)
        return hidden

    def run(
        self, sub: Sublayer, hidden: torch.Tensor, cache: Any = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One sublayer: hidden [B, T, D] + mixer(norm(hidden))."""
        mixer, norm = self.parts(sub)
        site = mixer.linear(sub.mixer.projs[0].role).input
        return mixer(norm.into(hidden, site), cache, mask, hidden)

    def parts(self, sub: Sublayer) -> tuple[Mixer, Norm]:
        """The mixer and the norm of a sublayer."""
        return getattr(self, sub.mixer.path), getattr(self, sub.norm)

    def hold(self, sub: Sublayer, tensors: dict[str, torch.Tensor], kept_type: torch.dtype) -> None:
        """Take a sublayer's float tensors (by path below the block) to run on until they are quantised.

        What stays unquantised is rounded to the checkpoint's type now, so that what is calibrated is what is stored.
        """
        mixer, norm = self.parts(sub)
        if not norm.folded:
            norm.weight.copy_(tensors[f"{sub.norm}.weight"])
        held, device = set(), next(mixer.parameters()).device
        for proj in sub.mixer.projs:
            path = f"{sub.mixer.path}.{proj.path}"
            bias = tensors.get(f"{path}.bias")
            mixer.linear(proj.role).hold(
                tensors[f"{path}.weight"].to(device), None if bias is None else bias.to(device, kept_type)
            )
            held |= {f"{path}.weight", f"{path}.bias"}
        for param in sub.mixer.params:
            name = f"{sub.mixer.path}.{param.path}"
            if name not in held:
                owner, _, leaf = name.rpartition(".")
                module = self.get_submodule(owner)
                if leaf == "weight" and isinstance(module, Conv):
                    module.hold(tensors[name].to(device, kept_type))
                else:
                    getattr(module, leaf).copy_(tensors[name].to(kept_type))
        for module in self.modules():
            if isinstance(module, LowBit):
                module.unbind()
