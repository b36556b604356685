"""Which architectures a test goes through: all of them once, those whose blocks are quamba's own in every setting."""

from typing import Any

from transformers import AutoConfig

from quamba.linear_attention.configs import CONFIGS
from quamba.models import ARCHITECTURES, describe


def config_of(model_type: str, which: int = 0) -> Any:
    """A tiny config of an architecture, one of those that it lists."""
    return AutoConfig.for_model(model_type, **ARCHITECTURES[model_type].tiny[which])


HOSTED = [name for name in ARCHITECTURES if describe(config_of(name)).hosted]
LINEAR = [config.model_type for config in CONFIGS]
"""flash-linear-attention's families, whose code is here."""
PLAIN = [name for name in HOSTED if name not in ("recurrent_gemma", "rwkv", "xlstm", *LINEAR)]
"""Hosted ones with transformers' common kind of cache; the others keep their state in a form or place of their own."""
OWN = [name for name in ARCHITECTURES if name not in HOSTED]
