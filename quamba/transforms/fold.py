"""Move the gain of a norm into the linears that read it."""

from __future__ import annotations

import torch

from quamba.models.spec import Sublayer

Tensors = dict[str, torch.Tensor]


def fold_norm(tensors: Tensors, sublayer: Sublayer) -> Tensors:
    """W <- W diag(g), g <- 1 for every projection that reads the residual stream.

    tensors: by path below the block, any float type; returns a new dict.
    """
    gain = tensors[f"{sublayer.norm}.weight"]
    out = dict(tensors)
    for proj in sublayer.mixer.projs:
        if proj.reads == "residual":
            name = f"{sublayer.mixer.path}.{proj.path}.weight"
            out[name] = tensors[name] * gain
    out[f"{sublayer.norm}.weight"] = torch.ones_like(gain)
    return out
