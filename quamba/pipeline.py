"""load -> fold -> rotate -> cluster -> calibrate -> quantise -> pack -> save, one sublayer in memory at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
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
from quamba.modules.host import HostedBlock, folds, mixer_class, rotates
from quamba.modules.linear import Linear
from quamba.modules.mixer import Mixer
from quamba.modules.norm import Norm
from quamba.quantizers import Hessian
from quamba.recipe import Recipe, load_recipe
from quamba.report import Report
from quamba.resume import FinishedLayers, forget, key
from quamba.skeleton import Arguments, Skeleton
from quamba.transforms import (
    fold_factors,
    fold_norms,
    output_block,
    permute,
    residual_rotation,
    residual_rotation_obstacle,
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
    tokenizer: str | Path | None = None,
    calibration_text: str | Path | None = None,
    samples: int | None = None,
    seqlen: int | None = None,
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Report:
    """Quantise a checkpoint (Hub id, directory or embedded name) as a recipe says, into a Hugging Face directory.

    tokenizer: a directory, a Hub id or a SentencePiece file, for a checkpoint that comes without one.
    calibration_text: a text file, a dataset's name, or None for the embedded text; samples windows of seqlen tokens
    (None: as the recipe says) drawn with the seed. resume: keep finished layers beside the output until it is complete,
    and go on after those that an interrupted run kept; ``say`` is told so in a line. Raises UserError for what the user
    got wrong; a killed or failed run leaves ``output`` as it was.
    """
    start, tell = time.perf_counter(), progress or (lambda phase, done, total: None)
    recipe, checkpoint, where = load_recipe(recipe), Checkpoint(source, tokenizer), pick_device(device)
    if checkpoint.quantised:
        raise UserError(f"{checkpoint.path} is quantised already; give the original checkpoint")
    model, plan = checkpoint.spec, recipe.calibration
    check_recipe(recipe, model)
    checkpoint.check()
    tokens = calibration.windows(
        calibration.read_text(calibration_text), checkpoint.tokenizer(),
        samples or plan.samples, seqlen or plan.seqlen, seed, model,
    )  # fmt: skip
    memory.release()
    obstacle = residual_rotation_obstacle(model) if recipe.rotate.residual else None
    with (
        Writer(output, overwrite, checkpoint.path) as writer,
        (
            FinishedLayers(writer.output, key(checkpoint, recipe, tokens, seed, where)) if resume else nullcontext()
        ) as kept,
        memory.watch(where) as peak,
    ):
        rotates_residual = recipe.rotate.residual and obstacle is None
        rotation = residual_rotation(model.d_model, recipe.rotate.seed) if rotates_residual else None
        table = checkpoint.tensor(f"{model.embedding}.weight")
        with naming(model.embedding):
            embedding = embed(writer, model, recipe, table, rotation)
        skeleton = Skeleton(checkpoint.config, model) if model.hosted else None
        hidden, arguments = enter(embedding, tokens, skeleton, plan.batch_size)
        stream = calibrate.Samples(hidden, plan.batch_size, where)
        largest = done = 0
        if kept is not None and kept.done:
            done = kept.restore(writer, stream.hidden)
            if say is not None:
                say(f"resuming after {done} of {len(model.blocks)} layers, kept in {kept.folder}")
        for layer, block in enumerate(model.blocks):
            tell("layers", layer, len(model.blocks) + 1)
            if layer < done:
                continue
            tensors = checkpoint.block(block)
            largest = max(largest, sum(4 * t.numel() for t in tensors.values()))
            kept_type = next(iter(tensors.values())).dtype
            module = build(model, block, recipe, layer, kept_type, where, skeleton, arguments)
            with naming(f"layer {layer} ({block.path})"):
                made = quantise_block(module, recipe, tensors, kept_type, rotation, stream)
            writer.add(made)
            if kept is not None:
                kept.keep(layer, made, stream.hidden)
            memory.release()
        tell("layers", len(model.blocks), len(model.blocks) + 1)
        head = checkpoint.tensor(f"{model.head}.weight")
        norm, gain = last_norm(model, recipe, checkpoint, skeleton, where)
        with naming(model.head):
            writer.add(quantise_head(model, recipe, head, norm, gain, rotation, stream))
        tell("layers", len(model.blocks) + 1, len(model.blocks) + 1)
        writer.finish(card.files(checkpoint, recipe, tokens))
    forget(writer.output)
    notes = [f"residual stream not rotated: {obstacle}"] if obstacle else []
    seconds = time.perf_counter() - start
    return Report(writer.output, writer.sizes, checkpoint, seconds, peak.bytes, largest, notes)


@contextmanager
def naming(part: str) -> Iterator[None]:
    """Say in which part of the model numbers went wrong."""
    try:
        yield
    except FloatingPointError as error:
        raise UserError(f"{part}: {error}; look at the original's weights, or give another calibration text") from None


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


def enter(
    embedding: Embedding, tokens: torch.Tensor, skeleton: Skeleton | None, batch_size: int
) -> tuple[torch.Tensor, dict[str, Arguments]]:
    """What the samples look like before the first block, fp32 [samples, T, D]; what transformers passes its layers."""
    return (embedding(tokens), {}) if skeleton is None else skeleton.record(embedding, tokens, batch_size)


def build(
    model: ModelSpec,
    block: BlockSpec,
    recipe: Recipe,
    layer: int,
    dtype: torch.dtype,
    device: torch.device,
    skeleton: Skeleton | None,
    arguments: dict[str, Arguments],
) -> calibrate.Block:
    """A block that computes in fp32 and will store what it keeps in ``dtype``."""
    if skeleton is not None and block.hosted:
        hosted, passed = skeleton.layer(block.path), arguments[block.path]
        return HostedBlock(hosted, model, block, recipe, layer, passed, dtype=dtype, device=device)
    return RecurrentBlock(model, block, recipe, layer, dtype=dtype, device=device).to(torch.float32)


def transform(tensors: Tensors, sub: Sublayer, recipe: Recipe, rotation: ResidualRotation | None) -> Tensors:
    """Fold the norm's gain and rotate the residual stream, in fp64; of the block's tensors those of one sublayer."""
    own = {sub.mixer.name(param.path) for param in sub.mixer.params} | {f"{sub.norm}.weight"}
    tensors = {name: tensor.double() for name, tensor in tensors.items() if name in own}
    if mixer_class(sub.mixer) is not None:
        tensors = fold_factors(tensors, sub.mixer, f"{sub.mixer.path}.")
    if recipe.fold_norms:
        tensors = fold_norms(tensors, [sub])
    if rotation is not None:
        tensors = rotate_residual(tensors, sub, rotation)
    return tensors


def quantise_block(
    block: calibrate.Block,
    recipe: Recipe,
    tensors: Tensors,
    kept_type: torch.dtype,
    rotation: ResidualRotation | None,
    stream: calibrate.Samples,
) -> Tensors:
    """Transform, calibrate and quantise one block; ``stream`` moves on to what the quantised block gives."""
    spec = block.block_spec
    block.keep(tensors, kept_type)
    for sub in spec.sublayers if isinstance(block, HostedBlock) else ():
        # a hosted layer runs whole, so what comes later must be there in floats already
        block.hold(sub, rotated(transform(tensors, sub, recipe, rotation), sub, recipe, block.layer_idx), kept_type)
    for sub in spec.sublayers:
        exact = transform(tensors, sub, recipe, rotation)
        exact = cluster(block, sub, recipe, exact, kept_type, stream)
        block.hold(sub, rotated(exact, sub, recipe, block.layer_idx), kept_type)
        calibrate.collect_ranges(block, sub, stream)
        mixer = block.part(sub)
        if isinstance(mixer, Mixer):
            mixer.conv1d.quantise()
        quantise_linears(block, sub, stream)
    if isinstance(block, HostedBlock):
        calibrate.advance(block, spec.sublayers[-1], stream)
    stream.check()
    return stored(block, spec.path, kept_type)


def rotated(tensors: Tensors, sub: Sublayer, recipe: Recipe, layer: int) -> Tensors:
    """Fold the inverse of the online rotation into out_proj where there is one."""
    if not rotates(sub.mixer, recipe, layer):
        return tensors
    return rotate_output(tensors, sub, output_block(sub.mixer, recipe.rotate.block))


def cluster(
    block: calibrate.Block,
    sub: Sublayer,
    recipe: Recipe,
    tensors: Tensors,
    kept_type: torch.dtype,
    stream: calibrate.Samples,
) -> Tensors:
    """Sort and cluster the value channels where the recipe and the mixer have clusters; the order comes from few
    samples, the scales later from all."""
    mixer = block.part(sub)
    if not isinstance(mixer, Mixer) or recipe.cluster is None:
        return tensors
    site = mixer.sites[next(i.name for i in sub.mixer.inputs if i.semantics == "value")]
    if site.clusters is None or not site.static or site.spec.granularity != "cluster":
        return tensors
    block.hold(sub, tensors, kept_type)
    magnitude = calibrate.value_magnitude(block, sub, stream.first(recipe.cluster.samples)).cpu()
    heads, headdim, *wanted = site.clusters
    clusters = sort_and_cluster(magnitude.view(heads, headdim), sub.mixer.sizes["G"], *wanted)
    site.head_end.copy_(clusters.head_end)
    site.channel_end.copy_(clusters.channel_end)
    return permute(tensors, sub, clusters.permutations)


def quantise_linears(block: calibrate.Block, sub: Sublayer, stream: calibrate.Samples) -> None:
    """Quantise the linears of a sublayer in the order of execution, each with the Hessian of what it sees once all
    before it are quantised. Of a block that is not hosted the last one's inputs are kept to move the samples on."""
    apart = not isinstance(block, HostedBlock)
    stages = calibrate.stages(block, sub)
    for stage in stages:
        hessians, kept = calibrate.collect_inputs(block, sub, stage, stream, keep=apart and stage is stages[-1])
        for linears, hessian in zip(stage, hessians, strict=True):
            for linear in linears:
                linear.quantise(hessian)
    calibrate.rebind(block)
    for start, inputs in zip(range(0, len(stream.hidden), stream.batch_size), kept, strict=True) if apart else ():
        part = stream.hidden[start : start + stream.batch_size]
        part.copy_(stages[-1][0][0](inputs, part.to(stream.device), out_dtype=torch.float32))


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
