"""A whole block: residual + mixer(norm(residual)), in the place of transformers' own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quamba.models.spec import BlockSpec, ModelSpec, Proj, Sublayer
from quamba.modules.host import folds, mixer_class
from quamba.modules.linear import Linear
from quamba.modules.mixer import Mixer
from quamba.modules.norm import Norm
from quamba.recipe import Recipe

if TYPE_CHECKING:
    from quamba.modules.stack import Stack


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
        self.stack: Stack | None = None
        self.residual_dtype = torch.float32 if model.residual_fp32 else None
        for sub in block.sublayers:
            made: dict[str, Any] = {"dtype": dtype, "device": device}
            self.add_module(str(sub.norm), Norm(model.d_model, model.eps, folded=folds(recipe, sub.norm_kind), **made))
            own = mixer_class(sub.mixer)
            assert own is not None, "a block of other parts than recurrent mixers must be hosted"
            self.add_module(sub.mixer.path, own(sub.mixer, recipe, layer, model.eps, **made))

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache: Any = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """hidden_states [B, T, D] -> the same; attention_mask [B, T], 0 for padding on the left. The cache is called
        cache_params before transformers 5.24."""
        cache = kwargs.get("cache_params", cache)
        if self.stack is not None:
            return self.stack.step(self, hidden_states, cache, attention_mask)
        return self.alone(hidden_states, cache, attention_mask)

    def alone(self, hidden_states: torch.Tensor, cache: Any, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """The block by itself."""
        hidden = hidden_states if self.residual_dtype is None else hidden_states.to(self.residual_dtype)
        for sub in self.block_spec.sublayers:
            hidden = self.run(sub, hidden, cache=cache, mask=attention_mask)
        return hidden

    def run(
        self,
        sub: Sublayer,
        hidden: torch.Tensor,
        carry: dict[str, torch.Tensor] | None = None,
        cache: Any = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One sublayer: hidden [B, T, D] + mixer(norm(hidden)). Nothing is carried from one such block to another."""
        mixer, norm = self.part(sub), getattr(self, str(sub.norm))
        return mixer(norm.before(hidden, mixer.linear(sub.mixer.projs[0].role)), cache, mask, hidden)

    def part(self, sub: Sublayer) -> Mixer:
        """The mixer of a sublayer."""
        found = getattr(self, sub.mixer.path)
        assert isinstance(found, Mixer)
        return found

    def linears(self, sub: Sublayer, proj: Proj) -> list[Linear]:
        """The linears of one projection: one."""
        return [self.part(sub).linear(proj.role)]

    def hold(self, sub: Sublayer, tensors: dict[str, torch.Tensor], kept_type: torch.dtype) -> None:
        """Take a sublayer's float tensors (by path below the block) to run on until they are quantised."""
        prefix = f"{sub.mixer.path}."
        self.part(sub).hold({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}, kept_type)

    def keep(self, tensors: dict[str, torch.Tensor], kept_type: torch.dtype) -> None:
        """Take the gains of the norms that are not folded."""
        for path in self.block_spec.norms:
            norm = getattr(self, path)
            if not norm.folded:
                norm.weight.copy_(tensors[f"{path}.weight"].to(kept_type))
