"""Which architectures a test goes through: all of them once, those whose blocks are quamba's own in every setting."""

from transformers import AutoConfig

from quamba.models import ARCHITECTURES, describe

HOSTED = [
    name
    for name, arch in ARCHITECTURES.items()
    if describe(AutoConfig.for_model(name, **arch.tiny[0])).hosted
]
PLAIN = [name for name in HOSTED if name not in ("recurrent_gemma", "rwkv", "xlstm")]
"""Hosted ones with transformers' common kind of cache; the others keep their state in a form or place of their own."""
OWN = [name for name in ARCHITECTURES if name not in HOSTED]
