"""AutoConfig reads the configurations of flash-linear-attention once quamba is imported."""

from __future__ import annotations

from transformers.models.auto.configuration_auto import AutoConfig

from quamba.linear_attention.configs import CONFIGS

for _config in CONFIGS:
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
