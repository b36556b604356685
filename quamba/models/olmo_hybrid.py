"""OLMo Hybrid (transformers' ``olmo_hybrid``): gated delta rule with norms before, attention with norms after each
part; a norm that weighs what is added keeps the residual stream from being rotated. AI2, 2025."""

from __future__ import annotations

from typing import Any

from quamba.models.parts import attention, delta_net, mlp
from quamba.models.spec import Architecture, BlockSpec, ModelSpec, Sublayer, require

PROJS = (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("a_proj", "a"), ("b_proj", "b"), ("g_proj", "z"))


def describe(config: Any) -> ModelSpec:
    """Raises UserError for an activation other than SiLU."""
    require(config, "hidden_act", "silu")
    width, heads = config.hidden_size, config.num_attention_heads
    sizes = {
        "D": width, "W": config.linear_conv_kernel_dim, "K": config.linear_num_key_heads,
        "V": config.linear_num_value_heads, "k": config.linear_key_head_dim, "v": config.linear_value_head_dim,
    }  # fmt: skip
    full = attention(
        "self_attn", width, heads, config.num_key_value_heads, getattr(config, "head_dim", None) or width // heads,
        rope=config.rope_parameters is not None, bias=config.attention_bias, whole=True,
        norms=("q_norm.weight", "k_norm.weight"),
    )  # fmt: skip
    recurrent = delta_net("linear_attn", sizes, PROJS, out="o_proj", norm="o_norm.weight")
    dense = mlp("mlp", width, config.intermediate_size)
    before = (Sublayer("input_layernorm", recurrent), Sublayer("post_attention_layernorm", dense))
    after = tuple(Sublayer(None, part, residual_weighted=True) for part in (full, dense))
    weighing = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
    blocks = tuple(
        BlockSpec(f"model.layers.{i}", after, hosted=True, params=weighing)
        if kind == "full_attention"
        else BlockSpec(f"model.layers.{i}", before, hosted=True)
        for i, kind in enumerate(config.layer_types)
    )
    return ModelSpec(
        width, config.vocab_size, config.rms_norm_eps, "model.embed_tokens", blocks, "model.norm", "lm_head",
        residual_fp32=False,
    )  # fmt: skip


_TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 4,
    "linear_num_value_heads": 4, "linear_key_head_dim": 12, "linear_value_head_dim": 24, "pad_token_id": 0,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

ARCH = Architecture(model_type="olmo_hybrid", describe=describe, tiny=(_TINY,))
