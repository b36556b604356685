"""AutoModelForCausalLM opens the checkpoints of flash-linear-attention once quamba is imported."""

from __future__ import annotations

from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from quamba.linear_attention.causal_lm import MODELS

for _model in MODELS:
    AutoModelForCausalLM.register(_model.config_class, _model, exist_ok=True)
