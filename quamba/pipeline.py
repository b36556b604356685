"""load -> fold -> rotate -> cluster -> calibrate -> quantise -> pack -> save, one sublayer in memory at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from quamba import calibrate, calibration, card, memory
from quamba.checkpoint import Checkpoint, Writer
from quamba.errors import UserError
from quamba.loading import pick_device
from quamba.models import check_recipe
from quamba.models.spec import BlockSpec, ModelSpec, Sublayer
from quamba.modules.block import RecurrentBlock
from quamba.modules.embedding import Embedding
from quamba.modules.linear import Linear
from quamba.modules.norm import Norm
from quamba.quantizers import Hessian
from quamba.recipe import Recipe, load_recipe
from quamba.report import Report
from quamba.transforms import (
    fold_norm,
    output_block,
    permute,
    residual_rotation,
    rotate_output,
    rotate_residual,
    sort_and_cluster,
)
from quamba.transforms.rotate import ResidualRotation

Tensors = dict[str, torch.Tensor]
Progress = Callable[[str, int, int], None]
ROWS = 4096
"""Rows of the embedding and the head that are rotated at once in fp64."""


@torch.inference_mode()
def quantize(
    source: str | Path,
    recipe: str | Path | Recipe,
    output: str | Path,
    *,
    calibration_text: str | Path | None = None,
    samples: int | None = None,
    seqlen: int | None = None,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Quantise a checkpoint (Hub id, directory or embedded name) as a recipe says, into a Hugging Face directory.

    calibration_text: a text file, a dataset's name, or None for the embedded text; samples windows of seqlen tokens
    (None: as the recipe says) drawn with the seed. Raises UserError for what the user got wrong; a killed or failed run
    leaves ``output`` as it was.
    """
    start, tell = time.perf_counter(), progress or (lambda phase, done, total: None)
    recipe, checkpoint, where = load_recipe(recipe), Checkpoint(source), pick_device(device)
    if checkpoint.quantised:
        raise UserError(f"{checkpoint.path} is quantised already; give the original checkpoint")
    model, plan = checkpoint.spec, recipe.calibration
    check_recipe(recipe, model)
    tokens = calibration.windows(
        calibration.read_text(calibration_text), checkpoint.tokenizer(),
        samples or plan.samples, seqlen or plan.seqlen, seed,
    )  # fmt: skip
    memory.release()
    with Writer(output, overwrite) as writer, memory.watch(where) as peak:
        rotation = residual_rotation(model.d_model, recipe.rotate.seed) if recipe.rotate.residual else None
        table = checkpoint.tensor(f"{model.embedding}.weight")
        hidden = embed(writer, model, recipe, table, rotation, tokens)
        stream = calibrate.Samples(hidden, plan.batch_size, where)
        largest = 0
        for layer, block in enumerate(model.blocks):
            tell("layers", layer, len(model.blocks) + 1)
            tensors = {k: v for sub in block.sublayers for k, v in checkpoint.sublayer(block.path, sub).items()}
            largest = max(largest, sum(4 * t.numel() for t in tensors.values()))
            try:
                writer.add(quantise_block(model, block, recipe, layer, tensors, rotation, stream))
            except FloatingPointError as error:
                raise UserError(f"layer {layer} ({block.path}): {error} in its activations or Hessian") from None
            memory.release()
        tell("layers", len(model.blocks), len(model.blocks) + 1)
        head = checkpoint.tensor(f"{model.head}.weight"), checkpoint.tensor(f"{model.final_norm}.weight")
        writer.add(quantise_head(model, recipe, *head, rotation, stream))
        tell("layers", len(model.blocks) + 1, len(model.blocks) + 1)
        writer.finish(card.files(checkpoint, recipe, tokens))
    return Report(writer.output, writer.sizes, checkpoint, time.perf_counter() - start, peak.bytes, largest)


def embed(
    writer: Writer,
    model: ModelSpec,
    recipe: Recipe,
    table: torch.Tensor,
    rotation: ResidualRotation | None,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """Store the rotated, quantised embedding; return what the samples look like after it, fp32 [samples, T, D]."""
    module = Embedding(model.vocab, model.d_model, recipe.embedding, dtype=table.dtype)
    for start in range(0, model.vocab, ROWS):
        part = table[start : start + ROWS]
        module.fill(rotation.columns(part) if rotation else part, start)
    writer.add(stored(module, model.embedding, table.dtype))
    return module.to(torch.float32)(tokens)


def transform(
    tensors: Tensors, sub: Sublayer, recipe: Recipe, rotation: ResidualRotation | None
) -> Tensors:
    """Fold the norm's gain, rotate the residual stream and the input of out_proj, in fp64."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    if recipe.fold_norms:
        tensors = fold_norm(tensors, sub)
    if rotation is not None:
        tensors = rotate_residual(tensors, sub, rotation)
    return tensors


def quantise_block(
    model: ModelSpec,
    block: BlockSpec,
    recipe: Recipe,
    layer: int,
    tensors: Tensors,
    rotation: ResidualRotation | None,
    stream: calibrate.Samples,
) -> Tensors:
    """Transform, calibrate and quantise one block; ``stream`` moves on to what the quantised block gives."""
    kept_type = next(iter(tensors.values())).dtype
    module = RecurrentBlock(model, block, recipe, layer, dtype=kept_type, device=stream.device).to(torch.float32)
    for sub in block.sublayers:
        exact = transform(tensors, sub, recipe, rotation)
        exact = cluster(module, sub, recipe, exact, kept_type, stream)
        if recipe.rotate.output:
            exact = rotate_output(exact, sub, output_block(sub.mixer, recipe.rotate.block))
        module.hold(sub, exact, kept_type)
        calibrate.collect_ranges(module, sub, stream)
        module.parts(sub)[0].conv1d.quantise()
        quantise_linears(module, sub, stream)
    return stored(module, block.path, kept_type)


def cluster(
    module: RecurrentBlock,
    sub: Sublayer,
    recipe: Recipe,
    tensors: Tensors,
    kept_type: torch.dtype,
    stream: calibrate.Samples,
) -> Tensors:
    """Sort and cluster the value channels where the recipe and the mixer have clusters; the order comes from few
    samples, the scales later from all."""
    value = next(i.name for i in sub.mixer.inputs if i.semantics == "value")
    site = module.parts(sub)[0].sites[value]
    if recipe.cluster is None or site.clusters is None or not site.static or site.spec.granularity != "cluster":
        return tensors
    module.hold(sub, tensors, kept_type)
    magnitude = calibrate.value_magnitude(module, sub, stream.first(recipe.cluster.samples)).cpu()
    heads, headdim, *wanted = site.clusters
    clusters = sort_and_cluster(magnitude.view(heads, headdim), sub.mixer.sizes["G"], *wanted)
    site.head_end.copy_(clusters.head_end)
    site.channel_end.copy_(clusters.channel_end)
    return permute(tensors, sub, clusters.permutations)


def quantise_linears(module: RecurrentBlock, sub: Sublayer, stream: calibrate.Samples) -> None:
    """Quantise the linears of a sublayer in the order of execution, each with the Hessian of what it sees once all
    before it are quantised; the last one's inputs are kept to move the samples on."""
    mixer = module.parts(sub)[0]
    for proj in sub.mixer.projs:
        linear, last = mixer.linear(proj.role), proj is sub.mixer.projs[-1]
        hessian, kept = calibrate.collect_inputs(module, sub, linear, stream, keep=last)
        linear.quantise(hessian)
    calibrate.rebind(module)
    for start, inputs in zip(range(0, len(stream.hidden), stream.batch_size), kept, strict=True):
        part = stream.hidden[start : start + stream.batch_size]
        part.copy_(linear(inputs, part.to(stream.device), out_dtype=torch.float32))


def quantise_head(
    model: ModelSpec,
    recipe: Recipe,
    head: torch.Tensor,
    gain: torch.Tensor,
    rotation: ResidualRotation | None,
    stream: calibrate.Samples,
) -> Tensors:
    """Fold the last norm into the head, rotate it, and quantise it on what the quantised model gives."""
    norm = Norm(model.d_model, model.eps, folded=recipe.fold_norms, dtype=head.dtype, device=stream.device)
    weight = torch.empty(head.shape, device=stream.device)
    for start in range(0, model.vocab, ROWS):
        part = head[start : start + ROWS].double() * (gain.double() if recipe.fold_norms else 1)
        weight[start : start + ROWS] = rotation.columns(part) if rotation is not None else part
    if not recipe.fold_norms:
        norm.weight.copy_(gain)
    norm = norm.to(torch.float32)
    linear = Linear(
        model.d_model, model.vocab, bias=False, spec=recipe.linear("lm_head"), dtype=head.dtype, device=stream.device
    ).to(torch.float32)
    linear.hold(weight, None)
    hessian = Hessian(model.d_model, stream.device)
    linear.input.observe()
    for hidden in stream:
        linear.input.watch(norm(hidden))
    linear.input.settle()
    for hidden in stream:
        codes = linear.input(norm(hidden))
        hessian.update(calibrate.dequantize(*codes))
    linear.quantise(hessian)
    return {**stored(norm, model.final_norm, head.dtype), **stored(linear, model.head, head.dtype)}


def stored(module: torch.nn.Module, prefix: str, kept_type: torch.dtype) -> Tensors:
    """A module's tensors under their full names; whatever is neither code nor scale keeps the checkpoint's type."""
    tensors = {}
    for name, tensor in module.state_dict().items():
        plain = tensor.is_floating_point() and not name.endswith("scale")
        tensors[f"{prefix}.{name}"] = tensor.to(kept_type) if plain else tensor
    return tensors


