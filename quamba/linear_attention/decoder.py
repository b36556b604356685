"""The skeleton of every family: embeddings, blocks, norm, head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import softmax
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from quamba.errors import UserError
from quamba.linear_attention.attention import Attention
from quamba.linear_attention.cache import LayerCache, furnish
from quamba.linear_attention.configs import LinearAttentionConfig
from quamba.linear_attention.mixer import Mixer
from quamba.linear_attention.mlp import GatedMLP

CACHE = next(f.name for f in fields(BaseModelOutputWithPast) if f.name in ("cache", "past_key_values"))
"""What transformers calls the cache in what a model takes and returns: ``cache`` from 5.24 on."""


def mixer_of(config: LinearAttentionConfig, layer: int, recurrent: type[Mixer]) -> nn.Module:
    """The softmax attention that the config asks for at this layer, else the family's own mixer."""
    spec = config.attention_of(layer)
    return recurrent(config, layer) if spec is None else Attention(config.hidden_size, spec, layer)


class DecoderBlock(nn.Module, ABC):
    """One block; ``attn`` holds either kind of mixer, as in fla."""

    def __init__(self, config: Any, layer: int, recurrent: type[Mixer]) -> None:
        super().__init__()

    @staticmethod
    @abstractmethod
    def norm(config: Any) -> nn.Module:
        """A norm over the residual stream."""

    @abstractmethod
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        carry: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """hidden_states [B, T, D] -> the same; attention_mask [B, seen + T], 0 for padding on the left.

        carry: what crosses layers within one pass, by name.
        """


class Block(DecoderBlock):
    """x + attn(attn_norm(x)), then x + mlp(mlp_norm(x)), with RMS norms."""

    def __init__(self, config: LinearAttentionConfig, layer: int, recurrent: type[Mixer]) -> None:
        super().__init__(config, layer, recurrent)
        self.attn_norm = self.norm(config)
        self.attn = mixer_of(config, layer, recurrent)
        self.mlp_norm = self.norm(config)
        self.mlp = GatedMLP(config)

    @staticmethod
    def norm(config: Any) -> nn.Module:
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        carry: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        mixed = self.attn(self.attn_norm(hidden_states), attention_mask, past_key_values, carry)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.mlp_norm(hidden_states))


class LinearAttentionPreTrainedModel(PreTrainedModel):
    """Loads strictly: transformers would fill what a checkpoint lacks with random numbers, and only warn."""

    config: LinearAttentionConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block", "RWKVBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = True
    _input_embed_layer = "embeddings"
    # published Gated DeltaNet checkpoints hold a tensor that no version of the layer reads any more
    _keys_to_ignore_on_load_unexpected = [r"\.attn\.D$"]

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As transformers'. Raises UserError for tensors that are missing, left over, or of another shape."""
        # what does not fit is then listed instead of ending in a traceback
        kwargs.setdefault("ignore_mismatched_sizes", True)
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        if getattr(model.config, "quantization_config", None) is None:
            for kind in ("missing", "unexpected", "mismatched"):
                if found := sorted(map(str, info.get(f"{kind}_keys") or ())):
                    raise UserError(
                        f"{model.name_or_path} has {len(found)} {kind} tensors, the first is {found[0]}; expected are "
                        f"names and shapes of a {model.config.model_type} checkpoint of fla 0.6.0"
                    )
        return (model, info) if output_loading_info else model


class LinearAttentionModel(LinearAttentionPreTrainedModel):
    """Embeddings, blocks and the last norm."""

    def __init__(self, config: LinearAttentionConfig, recurrent: type[Mixer], block: type[DecoderBlock]) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        if config.lower_bounds is not None:
            self.lower_bounds = nn.Parameter(torch.zeros(config.lower_bounds))
        self.layers = nn.ModuleList(block(config, layer, recurrent) for layer in range(config.num_hidden_layers))
        self.norm = block.norm(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids [B, T] or inputs_embeds [B, T, D]; attention_mask [B, seen + T], 0 for padding on the left.

        cache: past_key_values, as transformers calls it from 5.24 on.
        Raises ValueError for padding that is not on the left while a cache is kept: it would end in the states.
        """
        hidden = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        past_key_values = cache if past_key_values is None else past_key_values
        if past_key_values is None and use_cache:
            past_key_values = LayerCache(self.config.layer_types)
        elif past_key_values is not None:
            furnish(past_key_values, self.config.layer_types)
        attention_mask = needed(attention_mask, past_key_values is not None)
        carry = self.carry()
        kept = [hidden] if output_hidden_states else None
        for layer in self.layers:
            hidden = layer(hidden, attention_mask, past_key_values, carry=carry)
            if kept is not None:
                kept.append(hidden)
        hidden = self.norm(hidden)
        if kept is not None:
            kept[-1] = hidden
        states = None if kept is None else tuple(kept)
        kept_cache: Any = {CACHE: past_key_values}
        return BaseModelOutputWithPast(last_hidden_state=hidden, hidden_states=states, **kept_cache)

    def carry(self) -> dict[str, torch.Tensor]:
        """What every layer may read, and may add to for later layers."""
        if self.config.lower_bounds is None:
            return {}
        shares = softmax(self.lower_bounds.float(), 0)
        return {"lower_bounds": shares.cumsum(0) - shares[0]}


def needed(attention_mask: torch.Tensor | None, cached: bool) -> torch.Tensor | None:
    """The mask, or None when no token is padding. Raises ValueError for padding that is not on the left of a cache."""
    if attention_mask is None or bool((attention_mask != 0).all()):
        return None
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask has {attention_mask.dim()} axes; expected is [batch, tokens], 0 for padding")
    if cached and bool((attention_mask[:, 1:] < attention_mask[:, :-1]).any()):
        raise ValueError("attention_mask has padding after a token; with use_cache=True pad on the left")
    return attention_mask


class LinearAttentionForCausalLM(LinearAttentionPreTrainedModel, GenerationMixin):
    """A family is a subclass that names its config and its mixer."""

    mixer: ClassVar[type[Mixer]]
    block: ClassVar[type[DecoderBlock]] = Block
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config: LinearAttentionConfig) -> None:
        super().__init__(config)
        self.model = LinearAttentionModel(config, self.mixer, self.block)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first pass makes its own cache

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
        """Blocks take the mask as it is; transformers would make one for each kind of layer."""
        return attention_mask

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As LinearAttentionModel, with logits [B, T or logits_to_keep, V]; labels [B, T] give the mean loss.

        Raises ValueError as LinearAttentionModel does.
        """
        outputs = self.model(
            input_ids, attention_mask, inputs_embeds, past_key_values, use_cache, output_hidden_states, cache
        )
        logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        kept_cache: Any = {CACHE: outputs.get(CACHE)}
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=outputs.hidden_states, **kept_cache)
