"""Bamba (transformers' ``bamba``): Mamba2 mixers and attention, an MLP after each. IBM, 2024."""

from __future__ import annotations

from typing import Any

from quamba.models.parts import attention, mamba2, mlp
from quamba.models.spec import Architecture, BlockSpec, MixerSpec, ModelSpec, Sublayer, require


def _mixer(config: Any, kind: str) -> MixerSpec:
    width, heads = config.hidden_size, config.num_attention_heads
    if kind == "full_attention":
        head_dim = getattr(config, "head_dim", None) or width // heads
        return attention(
            "self_attn", width, heads, config.num_key_value_heads, head_dim, rope=True, bias=config.attention_bias
        )
    return mamba2(config)


def describe(config: Any) -> ModelSpec:
    """Raises UserError for an activation other than SiLU."""
    require(config, "hidden_act", "silu")
    dense = mlp("feed_forward", config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
    blocks = tuple(
        BlockSpec(
            f"model.layers.{i}",
            (Sublayer("input_layernorm", _mixer(config, kind)), Sublayer("pre_ff_layernorm", dense)),
            hosted=True,
        )
        for i, kind in enumerate(config.layers_block_type)
    )
    return ModelSpec(
        config.hidden_size, config.vocab_size, config.rms_norm_eps, "model.embed_tokens", blocks,
        "model.final_layernorm", "lm_head", residual_fp32=False, returns=2,
    )  # fmt: skip


_TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2,
    "mamba_d_state": 16, "mamba_chunk_size": 32, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

ARCH = Architecture(model_type="bamba", describe=describe, tiny=(_TINY,))
