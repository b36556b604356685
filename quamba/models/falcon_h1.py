"""Falcon-H1 (transformers' ``falcon_h1``): Mamba2 and attention side by side, constants on every path. Zuo et al.,
2507.22448."""

from __future__ import annotations

from typing import Any

from quamba.models.parts import attention, mamba2, mlp
from quamba.models.spec import Architecture, BlockSpec, ModelSpec, Sublayer, require


def describe(config: Any) -> ModelSpec:
    """Raises UserError for an activation other than SiLU, and for a norm before the gate."""
    require(config, "hidden_act", "silu")
    if config.mamba_rms_norm:
        require(config, "mamba_norm_before_gate", False)
    width, heads = config.hidden_size, config.num_attention_heads
    if config.mamba_proj_bias and config.ssm_in_multiplier != 1:
        require(config, "mamba_proj_bias", False)  # its input is multiplied, and a bias would not be
    recurrent = mamba2(
        config, out_bias=config.projectors_bias, norm=config.mamba_rms_norm,
        factors=tuple(config.ssm_in_multiplier * m for m in config.ssm_multipliers),
    )  # fmt: skip
    head_dim = getattr(config, "head_dim", None) or width // heads
    beside = attention(
        "self_attn", width, heads, config.num_key_value_heads, head_dim, rope=True, bias=config.attention_bias
    )
    sublayers = (
        Sublayer("input_layernorm", recurrent),
        Sublayer("input_layernorm", beside),
        Sublayer("pre_ff_layernorm", mlp("feed_forward", width, config.intermediate_size, bias=config.mlp_bias)),
    )
    blocks = tuple(BlockSpec(f"model.layers.{i}", sublayers, hosted=True) for i in range(config.num_hidden_layers))
    return ModelSpec(
        width, config.vocab_size, config.rms_norm_eps, "model.embed_tokens", blocks, "model.final_layernorm", "lm_head",
        residual_fp32=False, returns=1,
    )  # fmt: skip


_TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1,
    "mamba_d_state": 16, "mamba_chunk_size": 32, "ssm_multipliers": [0.5, 1.5, 0.7, 1.2, 0.9],
    "ssm_in_multiplier": 1.3, "ssm_out_multiplier": 0.8, "attention_in_multiplier": 1.1, "key_multiplier": 0.9,
    "attention_out_multiplier": 0.7, "embedding_multiplier": 2.0, "lm_head_multiplier": 0.5,
    "mlp_multipliers": [0.8, 0.6], "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

ARCH = Architecture(
    model_type="falcon_h1",
    describe=describe,
    tiny=(_TINY, {**_TINY, "mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_n_groups": 2}),
)
