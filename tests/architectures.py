"""Which architectures a test goes through: all of them once, those whose blocks are quamba's own in every setting."""

from transformers import AutoConfig

from quamba.linear_attention.configs import CONFIGS
from quamba.models import ARCHITECTURES, describe

HOSTED = [
    name
    for name, arch in ARCHITECTURES.items()
    if describe(AutoConfig.for_model(name, **arch.tiny[0])).hosted
]
LINEAR = [config.model_type for config in CONFIGS]
"""flash-linear-attention's families, whose code is here."""
PLAIN = [name for name in HOSTED if name not in ("recurrent_gemma", "rwkv", "xlstm", *LINEAR)]
"""Hosted ones with transformers' common kind of cache; the others keep their state in a form or place of their own."""
OWN = [name for name in ARCHITECTURES if name not in HOSTED]
