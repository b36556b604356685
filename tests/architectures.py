"""Which architectures a test goes through: all of them once, those whose blocks are quamba's own in every setting."""

from transformers import AutoConfig

from quamba.models import ARCHITECTURES, describe

HOSTED = [
    name
    for name, arch in ARCHITECTURES.items()
    if describe(AutoConfig.for_model(name, **arch.tiny[0])).hosted
]
OWN = [name for name in ARCHITECTURES if name not in HOSTED]
