"""Mamba2 (transformers' ``mamba2``): SSD with scalar decay per head and a gated norm. Dao and Gu, 2405.21060."""

from __future__ import annotations

from typing import Any

from quamba.models.parts import ssd
from quamba.models.spec import Architecture, BlockSpec, ModelSpec, Sublayer, require


def describe(config: Any) -> ModelSpec:
    """Raises UserError for an activation other than SiLU."""
    require(config, "hidden_act", "silu")
    sizes = {
        "D": config.hidden_size, "H": config.num_heads, "P": config.head_dim, "G": config.n_groups,
        "N": config.state_size, "W": config.conv_kernel,
    }  # fmt: skip
    limit = (float(config.time_step_limit[0]), float(config.time_step_limit[1]))
    mixer = ssd("mixer", sizes, bias=config.use_bias, conv_bias=config.use_conv_bias, dt_limit=limit)
    blocks = tuple(
        BlockSpec(f"backbone.layers.{i}", (Sublayer("norm", mixer),)) for i in range(config.num_hidden_layers)
    )
    return ModelSpec(
        config.hidden_size, config.vocab_size, config.layer_norm_epsilon, "backbone.embeddings", blocks,
        "backbone.norm_f", "lm_head", config.residual_in_fp32, logits_fp32=True,
    )  # fmt: skip


_TINY = {
    "hidden_size": 64, "num_heads": 8, "head_dim": 16, "n_groups": 1, "num_hidden_layers": 2, "vocab_size": 96,
    "state_size": 16, "chunk_size": 32, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

ARCH = Architecture(
    model_type="mamba2",
    describe=describe,
    tiny=(_TINY, {**_TINY, "n_groups": 2, "use_bias": True, "tie_word_embeddings": False}),
    renames=(("backbone.embedding.", "backbone.embeddings."),),
)
