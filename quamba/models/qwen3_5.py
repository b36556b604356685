"""Qwen3.5's language model (transformers' ``qwen3_5_text``): gated delta rule and gated attention, an MLP after
each."""

from __future__ import annotations

from typing import Any

from quamba.models.parts import attention, delta_net, mlp
from quamba.models.spec import Architecture, BlockSpec, MixerSpec, ModelSpec, Sublayer, require

PROJS = (("in_proj_qkv", "qkv"), ("in_proj_z", "z"), ("in_proj_b", "b"), ("in_proj_a", "a"))


def _mixer(config: Any, kind: str) -> MixerSpec:
    width = config.hidden_size
    if kind == "full_attention":
        return attention(
            "self_attn", width, config.num_attention_heads, config.num_key_value_heads, config.head_dim, rope=True,
            bias=config.attention_bias, gate=True, norms=("q_norm.weight", "k_norm.weight"),
        )  # fmt: skip
    sizes = {
        "D": width, "W": config.linear_conv_kernel_dim, "K": config.linear_num_key_heads,
        "V": config.linear_num_value_heads, "k": config.linear_key_head_dim, "v": config.linear_value_head_dim,
    }  # fmt: skip
    return delta_net("linear_attn", sizes, PROJS)


def describe(config: Any) -> ModelSpec:
    """Raises UserError for an activation other than SiLU."""
    require(config, "hidden_act", "silu")
    width = config.hidden_size
    dense = Sublayer("post_attention_layernorm", mlp("mlp", width, config.intermediate_size), gain_offset=1)
    blocks = tuple(
        BlockSpec(
            f"model.layers.{i}", (Sublayer("input_layernorm", _mixer(config, kind), gain_offset=1), dense), hosted=True
        )
        for i, kind in enumerate(config.layer_types)
    )
    return ModelSpec(
        width, config.vocab_size, config.rms_norm_eps, "model.embed_tokens", blocks, "model.norm",
        "lm_head", residual_fp32=False, final_gain_offset=1,
    )  # fmt: skip


_TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

ARCH = Architecture(model_type="qwen3_5_text", describe=describe, tiny=(_TINY,))
