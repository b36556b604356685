"""Nemotron-H (transformers' ``nemotron_h``): one mixer a block, of Mamba2, attention without positions, an MLP with
squared ReLU, or experts beside a shared one. NVIDIA, 2504.03624."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quamba.models.parts import attention, experts, mlp, ssd
from quamba.models.spec import Architecture, BlockSpec, MixerSpec, ModelSpec, Sublayer, require


def _recurrent(config: Any) -> list[MixerSpec]:
    sizes = {
        "D": config.hidden_size, "H": config.mamba_num_heads, "P": config.mamba_head_dim, "G": config.n_groups,
        "N": config.ssm_state_size, "W": config.conv_kernel,
    }  # fmt: skip
    low, high = config.time_step_limit
    return [
        ssd("mixer", sizes, bias=config.use_bias, conv_bias=config.use_conv_bias, dt_limit=(float(low), float(high)))
    ]


def _attention(config: Any) -> list[MixerSpec]:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return [attention("mixer", config.hidden_size, heads, kv_heads, config.head_dim, rope=False)]


def _dense(config: Any) -> list[MixerSpec]:
    return [mlp("mixer", config.hidden_size, config.intermediate_size, up=("up_proj",), bias=config.mlp_bias)]


def _sparse(config: Any) -> list[MixerSpec]:
    width = config.hidden_size
    routed = experts(
        "mixer", width, config.moe_intermediate_size, config.n_routed_experts, gated=False,
        router_params=("gate.e_score_correction_bias",), ordered=config.n_group > 1, latent=config.moe_latent_size,
    )  # fmt: skip
    hidden = config.moe_shared_expert_intermediate_size
    return [
        routed,
        mlp("mixer.shared_experts", width, hidden, up=("up_proj",), bias=config.mlp_bias, role="shared_"),
    ]


_KINDS: dict[str, Callable[[Any], list[MixerSpec]]] = {
    "linear_attention": _recurrent, "full_attention": _attention, "mlp": _dense, "moe": _sparse,
}  # fmt: skip


def describe(config: Any) -> ModelSpec:
    """Raises UserError for an activation other than SiLU in the recurrence, and for latent experts with a bias."""
    require(config, "mamba_hidden_act", "silu")
    if config.moe_latent_size is not None:
        require(config, "mlp_bias", False)
    blocks = tuple(
        BlockSpec(f"model.layers.{i}", tuple(Sublayer("norm", mixer) for mixer in _KINDS[kind](config)), hosted=True)
        for i, kind in enumerate(config.layers_block_type)
    )
    return ModelSpec(
        config.hidden_size, config.vocab_size, config.layer_norm_epsilon, "model.embeddings", blocks, "model.norm_f",
        "lm_head", residual_fp32=False, logits_fp32=True,
    )  # fmt: skip


_TINY = {
    "hidden_size": 64, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "vocab_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96, "ssm_state_size": 16,
    "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "chunk_size": 32, "n_routed_experts": 4,
    "moe_intermediate_size": 48, "moe_shared_expert_intermediate_size": 64, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip

ARCH = Architecture(
    model_type="nemotron_h",
    describe=describe,
    tiny=(_TINY, {**_TINY, "layers_block_type": ["moe", "full_attention", "linear_attention"], "moe_latent_size": 32}),
)
