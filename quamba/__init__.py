"""Post-training quantisation and deployment of recurrent language models."""

from quamba.integrations import transformers as _registration
from quamba.loading import load
from quamba.pipeline import quantize
from quamba.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["Recipe", "load", "quantize"]

_registration.register()
