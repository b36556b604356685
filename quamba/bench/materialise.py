"""A model of drawn weights, made in place: codes and scales come into being on the device, a slab at a time.

Latency does not depend on values, but denormals, infinities and zeros would change it, so values are those of a fresh
model: normal weights of variance 1 / K rounded by the format's own grid, activations scaled for unit variance, decays
as the published initialisation draws them.
"""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import torch
from torch import nn

from quamba.arena import settle
from quamba.integrations.transformers import swap
from quamba.models import describe
from quamba.modules.block import RecurrentBlock
from quamba.modules.conv import Conv
from quamba.modules.embedding import Embedding
from quamba.modules.linear import Linear
from quamba.modules.lowbit import LowBit
from quamba.modules.site import Site
from quamba.observers import QMAX
from quamba.quantizers import rtn
from quamba.recipe import Recipe

SLAB = 2**24
"""Weights that are floats at the same time."""
CLIP = 4.0
"""Static scales saturate at so many standard deviations."""
DT = (1e-3, 1e-1)
"""Range of the time steps of a fresh model (2312.00752, section 3.6), log-uniform."""


def outline(config: Any, recipe: Recipe, dtype: torch.dtype) -> Any:
    """The model on the meta device: modules, shapes and types without memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    swap(model, recipe, dtype, "meta")
    tie(model, recipe)
    return model.eval()


def build(config: Any, recipe: Recipe, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Any:
    """The model on ``device`` with drawn weights. No float copy of it exists at any time, on no device."""
    model = outline(config, recipe, dtype)
    model.to_empty(device=device)
    tie(model, recipe)
    random = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            _fill(module, random)
            if not isinstance(module, LowBit | RecurrentBlock):
                model._init_weights(module)  # what stays transformers' own, computed buffers among it
    settle(model)
    return model


def tie(model: Any, recipe: Recipe) -> None:
    """Let head and embedding share one table where the checkpoint does and the recipe changes neither."""
    spec = describe(model.config)
    embedding, head = model.get_submodule(spec.embedding), model.get_submodule(spec.head)
    plain = all("weight" in module._parameters for module in (embedding, head))
    if model.config.tie_word_embeddings and plain and not recipe.fold_norms:
        head.weight = embedding.weight


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once: what the directory of the model holds."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _fill(module: nn.Module, random: torch.Generator) -> None:
    if isinstance(module, Linear):
        _fill_linear(module, random)
    elif isinstance(module, Embedding):
        vocab, size = next(t.shape for t in chain(module.parameters(), module.buffers()) if t.dim() == 2)
        rows = max(1, SLAB // size)
        for start in range(0, vocab, rows):
            module.fill(_normal((min(rows, vocab - start), size), random), start)
    elif isinstance(module, Conv):
        shape = module.taps.shape
        module.hold(_normal(shape, random).div_(shape[1] ** 0.5).unsqueeze(1))
        module.quantise()
    elif isinstance(module, Site):
        _fill_site(module)
    for name, parameter in module.named_parameters(recurse=False):
        if not (name == "weight" and isinstance(module, Linear | Embedding | Conv)) and parameter.is_floating_point():
            parameter.copy_(_plain(name, parameter, random))


def _fill_linear(linear: Linear, random: torch.Generator) -> None:
    spec = linear.spec.model_copy(update={"search": False})
    rows = max(1, SLAB // linear.features)
    for start in range(0, linear.outputs, rows):
        count = min(rows, linear.outputs - start)
        part = _normal((count, linear.features), random).div_(linear.features**0.5)
        if not linear.format.has_grid:
            linear.weight[start : start + count] = part
            continue
        grid = linear.format.grid(linear.features, count, spec)
        for name, tensor in grid.pack(rtn(part, grid, None)).items():
            getattr(linear, name)[start : start + count] = tensor


def _fill_site(site: Site) -> None:
    if not site.static:
        return
    site.scale.fill_(CLIP / QMAX)
    if site.clusters is not None and site.spec.granularity == "cluster":
        heads, headdim, head_clusters, channel_clusters = site.clusters
        site.head_end.copy_(_even(heads // site.groups, head_clusters))
        site.channel_end.copy_(_even(headdim, channel_clusters))


def _even(size: int, parts: int) -> torch.Tensor:
    """Ends of ``parts`` contiguous pieces of 0..size."""
    return (torch.arange(1, parts + 1) * size) // parts


def _plain(name: str, parameter: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Values of a tensor that is neither a linear's, an embedding's nor a convolution's weight."""
    if name == "A_log":
        return torch.empty(parameter.shape, device=random.device).uniform_(1, 16, generator=random).log_()
    if name == "dt_bias":
        low, high = (math.log(t) for t in DT)
        dt = torch.empty(parameter.shape, device=random.device).uniform_(low, high, generator=random).exp_()
        return dt + torch.log(-torch.expm1(-dt))  # softplus gives dt back
    if name == "bias":
        return torch.zeros_like(parameter)
    if parameter.dim() > 1:
        return _normal(parameter.shape, random).div_(parameter.shape[-1] ** 0.5)
    return torch.ones_like(parameter)  # gains, D


def _normal(shape: Any, random: torch.Generator) -> torch.Tensor:
    return torch.empty(shape, device=random.device).normal_(generator=random)
