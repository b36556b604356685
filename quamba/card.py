"""The files beside the weights: config, recipe, tokenizer, model card."""

from __future__ import annotations

import json
from typing import Any

import torch
import yaml

from quamba.checkpoint import Checkpoint, generation_config
from quamba.layouts.layout import read_json
from quamba.recipe import FORMAT_VERSION, Recipe
from quamba.tokenizer import texts as tokenizer_texts


def files(
    checkpoint: Checkpoint, recipe: Recipe, tokens: torch.Tensor, notes: dict[str, Any] | None = None
) -> dict[str, str]:
    """Name -> text of everything in the directory that is not a tensor. tokens [samples, T] were calibrated on; notes
    stand beside the recipe in the config."""
    tokenizer = checkpoint.tokenizer()
    config = config_of(checkpoint)
    config |= dict(checkpoint.architecture.settings)
    config["tie_word_embeddings"] = False  # the last norm's gain lives in the head, so the two tables differ
    config["quantization_config"] = {
        "quant_method": "quamba",
        "format_version": FORMAT_VERSION,
        "recipe": recipe.model_dump(mode="json"),
        **(notes or {}),
    }
    return {
        "config.json": json.dumps(config, indent=2) + "\n",
        "generation_config.json": generation_config(checkpoint),
        "recipe.yaml": recipe.as_yaml(),
        "README.md": model_card(checkpoint, recipe, tokens),
        **tokenizer_texts(checkpoint.path, tokenizer),
    }


def config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What config.json should say of the original: what it does say, or what another layout, or the part of it that is
    a language model, stands for."""
    if checkpoint.layout.native:
        said = read_json(checkpoint.path / "config.json")
        if said["model_type"] == checkpoint.config.model_type:
            return said
    config: dict[str, Any] = json.loads(checkpoint.config.to_json_string())
    return config


def model_card(checkpoint: Checkpoint, recipe: Recipe, tokens: torch.Tensor) -> str:
    """A README that says what this is, what it came from, and how to open it."""
    on_hub = "/" in checkpoint.source and not checkpoint.source.startswith(("/", "."))
    base = checkpoint.source if on_hub else checkpoint.path.name
    head = {"base_model": base, "base_model_relation": "quantized", "library_name": "transformers",
            "tags": ["quamba", recipe.name, checkpoint.config.model_type]}  # fmt: skip
    return f"""---
{yaml.safe_dump(head, sort_keys=False)}---

# {base}, {recipe.name}

{recipe.summary} Quantised with quamba on {tokens.shape[0]} windows of {tokens.shape[1]} tokens;
`recipe.yaml` holds every setting.

```python
import quamba  # registers the format; without it transformers reports missing weights
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```
"""
