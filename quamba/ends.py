"""The ends of a model, embedding, last norm and head, and what is stored of a part."""

from __future__ import annotations

import torch

from quamba import calibrate
from quamba.checkpoint import Checkpoint, Writer
from quamba.models.spec import ModelSpec
from quamba.modules.embedding import Embedding
from quamba.modules.host import HostedBlock, folds
from quamba.modules.linear import Linear
from quamba.modules.norm import Norm
from quamba.quantizers import Hessian
from quamba.recipe import Recipe
from quamba.skeleton import Skeleton
from quamba.transforms.rotate import ResidualRotation

Tensors = dict[str, torch.Tensor]
ROWS = 4096
"""Rows of the embedding and the head that are rotated at once in fp64."""


def embed(
    writer: Writer,
    model: ModelSpec,
    recipe: Recipe,
    table: torch.Tensor,
    rotation: ResidualRotation | None,
) -> Embedding:
    """Store the rotated, quantised embedding, and return it."""
    module = filled(model, recipe, table, rotation)
    writer.add(stored(module, model.embedding, table.dtype))
    embedding: Embedding = module.to(torch.float32)
    return embedding


def filled(model: ModelSpec, recipe: Recipe, table: torch.Tensor, rotation: ResidualRotation | None) -> Embedding:
    """The rotated, quantised embedding of a table [V, D]."""
    module = Embedding(model.vocab, model.d_model, recipe.embedding, dtype=table.dtype)
    for start in range(0, model.vocab, ROWS):
        part = table[start : start + ROWS]
        module.fill(rotation.columns(part) if rotation else part, start)
    return module


def last_norm(
    model: ModelSpec, recipe: Recipe, checkpoint: Checkpoint, skeleton: Skeleton | None, device: torch.device
) -> tuple[torch.nn.Module, torch.Tensor]:
    """The norm before the head, and the gain [D] that goes into the head: ones where the norm keeps its own."""
    gain = checkpoint.tensor(f"{model.final_norm}.weight")
    folded = folds(recipe, model.final_norm_kind)
    if folded or skeleton is None:
        norm = Norm(model.d_model, model.eps, folded=folded, dtype=gain.dtype, device=device).to(torch.float32)
        if not folded:
            norm.weight.copy_(gain)
        return norm, gain.double() + model.final_gain_offset if folded else torch.ones_like(gain).double()
    own = skeleton.layer(model.final_norm)
    tensors = {name: checkpoint.tensor(f"{model.final_norm}.{name}") for name in own.state_dict()}
    own.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return own.to(device), torch.ones_like(gain).double()


def fold_head(
    head: torch.Tensor, gain: torch.Tensor, rotation: ResidualRotation | None, device: torch.device
) -> torch.Tensor:
    """The head's weight, fp32 [V, D], with the last norm's gain [D] folded in and rotated."""
    weight = torch.empty(head.shape, device=device)
    for start in range(0, len(head), ROWS):
        part = head[start : start + ROWS].double() * gain
        weight[start : start + ROWS] = rotation.columns(part) if rotation is not None else part
    return weight


def quantise_head(
    model: ModelSpec,
    recipe: Recipe,
    head: torch.Tensor,
    norm: torch.nn.Module,
    gain: torch.Tensor,
    rotation: ResidualRotation | None,
    stream: calibrate.Samples,
) -> Tensors:
    """Fold the last norm's gain into the head, rotate it, and quantise it on what the quantised model gives."""
    weight = fold_head(head, gain, rotation, stream.device)
    linear = Linear(
        model.d_model, model.vocab, bias=False, spec=recipe.linear("lm_head"), dtype=head.dtype, device=stream.device
    ).to(torch.float32)
    linear.hold(weight, None)
    hessian = Hessian(model.d_model, stream.device, stream.ranks)
    linear.input.observe()
    for hidden in stream:
        linear.input.watch(norm(hidden[..., : model.d_model]))
    calibrate.settle(linear.input, stream.ranks)
    for batch in stream.rounds():
        if batch is not None:
            codes = linear.input(norm(batch[0][..., : model.d_model]))
            hessian.update(calibrate.dequantize(*codes))
        hessian.end_batch()
    hessian.unite()
    calibrate.quantise_together([(linear, hessian)], stream.ranks)
    return {**stored(norm, model.final_norm, head.dtype), **stored(linear, model.head, head.dtype)}


def stored(module: torch.nn.Module | HostedBlock, prefix: str, kept_type: torch.dtype) -> Tensors:
    """A module's tensors under their full names; whatever is neither code nor scale keeps the checkpoint's type.

    Raises FloatingPointError for NaN or Inf: what was finite may leave a type's range once gains are folded in.
    """
    tensors = {}
    for name, tensor in module.state_dict().items():
        tensors[f"{prefix}.{name}"] = kept = tensor.to(kept_type) if plain(name, tensor) else tensor
        if not torch.isfinite(kept).all():
            raise FloatingPointError(f"NaN or Inf in its {name}")
    return tensors


def plain(name: str, tensor: torch.Tensor) -> bool:
    """Whether a module's tensor is neither code nor scale."""
    return tensor.is_floating_point() and not name.endswith("scale")
