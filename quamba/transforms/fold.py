"""Move the gain of a norm into the linears that read it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from quamba.models.spec import MixerSpec, Sublayer

Tensors = dict[str, torch.Tensor]


def folding_illegal(norm_kind: str) -> str | None:
    """Why a norm's gain stays where it is, or None."""
    return None if norm_kind == "rms" else f"a {norm_kind} norm has a shift beside its gain"


def fold_factors(tensors: Tensors, mixer: MixerSpec, prefix: str = "") -> Tensors:
    """Rows of the projections times the constants that the architecture multiplies their outputs with. tensors: by
    prefix and path below the mixer; returns a new dict."""
    out = dict(tensors)
    for proj in mixer.projs:
        if all(output.factor == 1 for output in proj.outputs):
            continue
        factor = torch.cat([torch.full((mixer.size(o.segment),), o.factor) for o in proj.outputs])
        weight, bias = f"{prefix}{proj.weight}", f"{prefix}{proj.path}.bias"
        out[weight] = out[weight] * factor.to(out[weight]).unsqueeze(-1)
        if bias in out:
            out[bias] = out[bias] * factor.to(out[bias])
    return out


def fold_norms(tensors: Tensors, sublayers: Iterable[Sublayer]) -> Tensors:
    """W <- W diag(g), g <- 1 for every projection that reads the residual stream through an RMS norm.

    tensors: of a block, by path below it, any float type; returns a new dict. Sublayers that share a norm must be given
    together.
    """
    out = dict(tensors)
    for sub in sublayers:
        if sub.norm is None or folding_illegal(sub.norm_kind):
            continue
        gain = tensors[f"{sub.norm}.weight"] + sub.gain_offset
        for proj in sub.mixer.projs:
            if proj.reads == "residual":
                name = sub.mixer.name(proj.weight)
                out[name] = out[name] * gain
        out[f"{sub.norm}.weight"] = torch.full_like(gain, 1 - sub.gain_offset)
    return out
