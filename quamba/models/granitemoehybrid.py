"""Granite 4 (transformers' ``granitemoehybrid``): Mamba2 mixers and attention; after each, experts beside a shared MLP,
or the MLP alone. IBM, 2025."""

from __future__ import annotations

from typing import Any

from quamba.models.parts import attention, experts, mamba2, mlp
from quamba.models.spec import Architecture, BlockSpec, MixerSpec, ModelSpec, Sublayer, require


def _mixer(config: Any, kind: str) -> MixerSpec:
    width, heads = config.hidden_size, config.num_attention_heads
    if kind != "linear_attention":
        return attention(
            "self_attn", width, heads, config.num_key_value_heads, width // heads,
            rope=config.position_embedding_type == "rope", bias=config.attention_bias,
        )  # fmt: skip
    return mamba2(config)


def describe(config: Any) -> ModelSpec:
    """Raises UserError for an activation other than SiLU."""
    require(config, "hidden_act", "silu")
    width = config.hidden_size
    shared = mlp(
        "shared_mlp", width, config.shared_intermediate_size, up=("input_linear",), down="output_linear", fused=True,
        role="shared_",
    )  # fmt: skip
    after = [Sublayer("post_attention_layernorm", shared)]
    if config.num_local_experts:
        sparse = experts(
            "block_sparse_moe", width, config.intermediate_size, config.num_local_experts, router="router"
        )  # fmt: skip
        after.insert(0, Sublayer("post_attention_layernorm", sparse))
    blocks = tuple(
        BlockSpec(f"model.layers.{i}", (Sublayer("input_layernorm", _mixer(config, kind)), *after), hosted=True)
        for i, kind in enumerate(config.layer_types)
    )
    return ModelSpec(
        width, config.vocab_size, config.rms_norm_eps, "model.embed_tokens", blocks, "model.norm", "lm_head",
        residual_fp32=False,
    )  # fmt: skip


_TINY = {
    "hidden_size": 64, "intermediate_size": 48, "shared_intermediate_size": 96, "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "vocab_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_chunk_size": 32,
    "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0, "attention_multiplier": 0.25,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

ARCH = Architecture(
    model_type="granitemoehybrid",
    describe=describe,
    tiny=(_TINY, {**_TINY, "num_local_experts": 0, "position_embedding_type": "rope", "num_hidden_layers": 2,
                  "layer_types": ["linear_attention", "full_attention"]}),
)  # fmt: skip
