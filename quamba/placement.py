"""Where the parts of a model lie: on one device, or where a device map put them."""

from __future__ import annotations

from typing import Any

import torch


def entry(model: Any) -> torch.device:
    """The device that takes the model's tokens, whose parameters may wait elsewhere or on disk."""
    hook = getattr(model, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return model.device if device is None else torch.device(device)


def together(model: Any) -> bool:
    """Whether the whole model lies on one device, so that a step of it can be a CUDA graph."""
    return not hasattr(model, "hf_device_map")
