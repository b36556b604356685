"""Falcon Mamba (transformers' ``falcon_mamba``): Mamba1 with RMS norms without gain of dt, B and C. Zuo et al.,
2410.05355."""

from __future__ import annotations

from typing import Any

from quamba.models.parts import selective
from quamba.models.spec import Architecture, BlockSpec, ModelSpec, Sublayer, require


def describe(config: Any) -> ModelSpec:
    """Raises UserError for an activation other than SiLU."""
    require(config, "hidden_act", "silu")
    sizes = {
        "D": config.hidden_size, "I": config.intermediate_size, "N": config.state_size, "W": config.conv_kernel,
        "R": int(config.time_step_rank),
    }  # fmt: skip
    mixer = selective(
        "mixer", sizes, bias=config.use_bias, conv_bias=config.use_conv_bias, norms=(None, None, None),
        eps=config.mixer_rms_eps,
    )  # fmt: skip
    blocks = tuple(
        BlockSpec(f"backbone.layers.{i}", (Sublayer("norm", mixer),)) for i in range(config.num_hidden_layers)
    )
    return ModelSpec(
        config.hidden_size, config.vocab_size, config.layer_norm_epsilon, "backbone.embeddings", blocks,
        "backbone.norm_f", "lm_head", config.residual_in_fp32, logits_fp32=True,
    )  # fmt: skip


_TINY = {
    "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96, "state_size": 8, "time_step_rank": 8,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

ARCH = Architecture(model_type="falcon_mamba", describe=describe, tiny=(_TINY,))
