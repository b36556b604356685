"""Jamba (transformers' ``jamba``): Mamba1 mixers with norms of dt, B and C, attention without positions, MLPs and
experts. Lieber et al., 2403.19887."""

from __future__ import annotations

from typing import Any

from quamba.models.parts import attention, experts, mlp, selective
from quamba.models.spec import Architecture, BlockSpec, MixerSpec, ModelSpec, Sublayer, require


def _mixer(config: Any, kind: str) -> MixerSpec:
    width, heads = config.hidden_size, config.num_attention_heads
    if kind == "attention":
        head_dim = getattr(config, "head_dim", None) or width // heads
        return attention("self_attn", width, heads, config.num_key_value_heads, head_dim, rope=False)
    sizes = {
        "D": width, "I": config.mamba_expand * width, "N": config.mamba_d_state, "W": config.mamba_d_conv,
        "R": config.mamba_dt_rank,
    }  # fmt: skip
    norms = tuple(f"{name}_layernorm.weight" for name in ("dt", "b", "c"))
    return selective("mamba", sizes, bias=config.mamba_proj_bias, conv_bias=config.mamba_conv_bias, norms=norms)


def describe(config: Any) -> ModelSpec:
    """Raises UserError for an activation other than SiLU."""
    require(config, "hidden_act", "silu")
    dense = mlp("feed_forward", config.hidden_size, config.intermediate_size)
    sparse = experts(
        "feed_forward", config.hidden_size, config.intermediate_size, config.num_experts, router="router"
    )  # fmt: skip
    blocks = []
    for i, (kind, count) in enumerate(zip(config.layers_block_type, config.layers_num_experts, strict=True)):
        sublayers = (
            Sublayer("input_layernorm", _mixer(config, kind)),
            Sublayer("pre_ff_layernorm", sparse if count > 1 else dense),
        )
        blocks.append(BlockSpec(f"model.layers.{i}", sublayers, hosted=True))
    return ModelSpec(
        config.hidden_size, config.vocab_size, config.rms_norm_eps, "model.embed_tokens", tuple(blocks),
        "model.final_layernorm", "lm_head", residual_fp32=False,
    )  # fmt: skip


_TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 96, "mamba_d_state": 8,
    "mamba_dt_rank": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2,
    "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 4, "attn_layer_offset": 2,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

ARCH = Architecture(model_type="jamba", describe=describe, tiny=(_TINY,))
