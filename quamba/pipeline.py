"""load -> fold -> rotate -> cluster -> calibrate -> quantise -> pack -> save, one sublayer in memory at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from quamba import calibrate, calibration, card, memory
from quamba.checkpoint import Checkpoint, Onlooker, Writer
from quamba.ends import embed, last_norm, quantise_head, stored
from quamba.errors import UserError
from quamba.lending import Lent, Uses, later_uses, reaching
from quamba.linears_only import quantize as quantize_linears
from quamba.loading import pick_device
from quamba.models import fit_recipe
from quamba.models.spec import BlockSpec, ModelSpec, Sublayer
from quamba.modules.block import RecurrentBlock
from quamba.modules.embedding import Embedding
from quamba.modules.host import HostedBlock, mixer_class, rotates, turns_values
from quamba.modules.mixer import Mixer
from quamba.ranks import ALONE, Ranks
from quamba.recipe import FLOAT, Recipe, load_recipe
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
    rotate_values,
    sort_and_cluster,
)
from quamba.transforms.rotate import ResidualRotation

Tensors = dict[str, torch.Tensor]
Progress = Callable[[str, int, int], None]


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
    linears_only: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    ranks: Ranks = ALONE,
) -> Report:
    """Quantise a checkpoint (Hub id, directory or embedded name) as a recipe says, into a Hugging Face directory.

    tokenizer: a directory, a Hub id or a SentencePiece file, for a checkpoint that comes without one.
    calibration_text: a text file, a dataset's name, or None for the embedded text; samples windows of seqlen tokens
    (None: as the recipe says) drawn with the seed. resume: keep finished layers beside the output until it is complete,
    and go on after those that an interrupted run kept; ``say`` is told so in a line. linears_only: quantise the linears
    of a model of any type, and nothing else. ranks: the processes that share the work (``quamba.ranks.joined``), all of
    which call this; the first one writes and speaks, and the bytes are those of one process with as many threads.
    Raises UserError for what the user got wrong; a killed or failed run leaves ``output`` as it was.
    """
    start, tell = time.perf_counter(), (ranks.first and progress) or (lambda phase, done, total: None)
    recipe, where = load_recipe(recipe), ranks.device or pick_device(device)
    checkpoint = Checkpoint(source, tokenizer, linears_only=linears_only)
    if checkpoint.quantised:
        raise UserError(f"{checkpoint.path} is quantised already; give the original checkpoint")
    model, plan = checkpoint.spec, recipe.calibration
    if linears_only:
        if ranks.size > 1:
            raise UserError("--linears-only holds the whole model in one process; start it without a launcher")
        if resume:
            raise UserError("--resume keeps finished layers, and --linears-only holds the whole model; leave one out")
        return quantize_linears(
            checkpoint, recipe, output, calibration_text=calibration_text, samples=samples or plan.samples,
            seqlen=seqlen or plan.seqlen, seed=seed, device=device, overwrite=overwrite, progress=tell,
        )  # fmt: skip
    recipe = fit_recipe(recipe, model)
    checkpoint.check()
    tokens = calibration.windows(
        calibration.read_text(calibration_text), checkpoint.tokenizer(),
        samples or plan.samples, seqlen or plan.seqlen, seed, model,
    )  # fmt: skip
    memory.release()
    obstacle = residual_rotation_obstacle(model) if recipe.rotate.residual else None
    with (
        (Writer(output, overwrite, checkpoint.path) if ranks.first else Onlooker(output)) as writer,
        (
            FinishedLayers(writer.output, key(checkpoint, recipe, tokens, seed, where), ranks)
            if resume
            else nullcontext()
        ) as kept,
        memory.watch(where) as peak,
    ):
        rotates_residual = recipe.rotate.residual and obstacle is None
        rotation = residual_rotation(model.d_model, recipe.rotate.seed) if rotates_residual else None
        with naming(model.embedding):
            embedding = embed(writer, model, recipe, checkpoint.tensor(f"{model.embedding}.weight"), rotation)
        skeleton = Skeleton(checkpoint.config, model) if model.hosted else None
        for name in model.params:
            writer.add({name: checkpoint.tensor(name)})
            if skeleton is not None:
                skeleton.take(name, checkpoint.tensor(name))
        own = calibrate.Samples.share(tokens, plan.batch_size, ranks)
        hidden, arguments = enter(embedding, own, skeleton, recipe)
        stream = calibrate.Samples(hidden, plan.batch_size, where, ranks, len(tokens))
        largest, done = 0, 0 if kept is None else kept.done
        floats = in_floats(checkpoint, recipe, rotation, skeleton, arguments, where)
        uses, lent = later_uses(model, arguments, stream, done, floats), Lent()
        if kept is not None and done:
            kept.restore(writer, stream)
            if say is not None and ranks.first:
                say(f"resuming after {done} of {len(model.blocks)} layers, kept in {kept.folder}")
        for layer, block in enumerate(model.blocks):
            tell("layers", layer, len(model.blocks) + 1)
            if layer < done and not model.lent(block):
                continue
            tensors = checkpoint.block(block)
            kept_type = next(iter(tensors.values())).dtype
            module = build(model, block, recipe, layer, kept_type, where, skeleton, arguments, lent)
            if kept is not None and layer < done:
                assert isinstance(module, HostedBlock)
                module.load(kept.layer(layer))
                lent |= module.lend(model.lent(block))
                continue
            largest = max(largest, sum(4 * t.numel() for t in tensors.values()))
            with naming(f"layer {layer} ({block.path})"):
                made = quantise_block(module, recipe, tensors, kept_type, rotation, stream, uses)
            writer.add(made)
            if isinstance(module, HostedBlock):
                lent |= module.lend(model.lent(block))
            if kept is not None:
                kept.keep(layer, made, stream)
            del tensors, module, made  # before the next block comes
            memory.release()
        tell("layers", len(model.blocks), len(model.blocks) + 1)
        head = checkpoint.tensor(f"{model.head}.weight")
        norm, gain = last_norm(model, recipe, checkpoint, skeleton, where)
        with naming(model.head):
            writer.add(quantise_head(model, recipe, head, norm, gain, rotation, stream))
        tell("layers", len(model.blocks) + 1, len(model.blocks) + 1)
        writer.finish(card.files(checkpoint, recipe, tokens))
    sizes = ranks.tell(writer.sizes)
    if ranks.first:
        forget(writer.output)
    notes = [f"residual stream not rotated: {obstacle}"] if obstacle else []
    seconds = time.perf_counter() - start
    return Report(writer.output, sizes, checkpoint, seconds, peak.bytes, largest, notes)


@contextmanager
def naming(part: str) -> Iterator[None]:
    """Say in which part of the model numbers went wrong."""
    try:
        yield
    except FloatingPointError as error:
        raise UserError(f"{part}: {error}; look at the original's weights, or give another calibration text") from None


def enter(
    embedding: Embedding, tokens: torch.Tensor, skeleton: Skeleton | None, recipe: Recipe
) -> tuple[torch.Tensor, dict[str, Arguments]]:
    """What the samples look like before the first block, fp32 [samples, T, D]; what transformers passes its layers."""
    if skeleton is None or not len(tokens):
        return embedding(tokens), {}
    size = recipe.calibration.batch_size
    # the samples that decide the order of clusters may end within a batch
    return skeleton.record(embedding, tokens, size, recipe.cluster.samples % size if recipe.cluster else 0)


def build(
    model: ModelSpec,
    block: BlockSpec,
    recipe: Recipe,
    layer: int,
    dtype: torch.dtype,
    device: torch.device,
    skeleton: Skeleton | None,
    arguments: dict[str, Arguments],
    lent: Lent,
) -> calibrate.Block:
    """A block that computes in fp32 and will store what it keeps in ``dtype``."""
    if skeleton is not None and block.hosted:
        hosted, passed = skeleton.copy(block.path), arguments.get(block.path, {})
        return HostedBlock(hosted, model, block, recipe, layer, passed, lent=lent, dtype=dtype, device=device)
    return RecurrentBlock(model, block, recipe, layer, dtype=dtype, device=device).to(torch.float32)


def in_floats(
    checkpoint: Checkpoint,
    recipe: Recipe,
    rotation: ResidualRotation | None,
    skeleton: Skeleton | None,
    arguments: dict[str, Arguments],
    device: torch.device,
) -> Callable[[int, BlockSpec, Lent], HostedBlock]:
    """What builds a block that runs on its transformed float weights, for quamba.lending."""
    floats = FLOAT.model_copy(update={"fold_norms": recipe.fold_norms})

    def made(layer: int, block: BlockSpec, lent: Lent) -> HostedBlock:
        tensors = checkpoint.block(block)
        kept_type = next(iter(tensors.values())).dtype
        module = build(checkpoint.spec, block, floats, layer, kept_type, device, skeleton, arguments, lent)
        assert isinstance(module, HostedBlock)
        module.keep(tensors, kept_type)
        for sub in block.sublayers:
            module.hold(sub, transform(tensors, sub, floats, rotation), kept_type)
        return module

    return made


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
    uses: Uses,
) -> Tensors:
    """Transform, calibrate and quantise one block; ``stream`` moves on to what the quantised block gives. What later
    blocks use too is calibrated on ``uses`` beside it."""
    spec = block.block_spec
    block.keep(tensors, kept_type)
    for sub in spec.sublayers if isinstance(block, HostedBlock) else ():
        # a hosted layer runs whole, so what comes later must be there in floats already
        block.hold(sub, rotated(transform(tensors, sub, recipe, rotation), sub, recipe, block.layer_idx), kept_type)
        calibrate.let_through(block, sub)
    for sub in spec.sublayers:
        exact = transform(tensors, sub, recipe, rotation)
        exact = cluster(block, sub, recipe, exact, kept_type, stream)
        block.hold(sub, rotated(exact, sub, recipe, block.layer_idx), kept_type)
        seen = reaching(block, sub, stream, uses)
        calibrate.collect_ranges(block, sub, seen)
        mixer = block.part(sub)
        if isinstance(mixer, Mixer):
            mixer.conv1d.quantise()
        quantise_linears(block, sub, seen)
    if isinstance(block, HostedBlock):
        calibrate.advance(block, spec.sublayers[-1], stream)
    stream.check()
    return stored(block, spec.path, kept_type)


def rotated(tensors: Tensors, sub: Sublayer, recipe: Recipe, layer: int) -> Tensors:
    """Fold the inverse of the online rotation into out_proj where there is one; rotate values offline where they may
    be."""
    if recipe.rotate.output and turns_values(sub.mixer):
        return rotate_values(tensors, sub)
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
        seen = [(linear, hessian) for linears, hessian in zip(stage, hessians, strict=True) for linear in linears]
        calibrate.quantise_together(seen, stream.ranks)
    calibrate.rebind(block)
    for start, inputs in zip(range(0, len(stream.hidden), stream.batch_size), kept, strict=True) if apart else ():
        part = stream.hidden[start : start + stream.batch_size]
        part.copy_(stages[-1][0][0](inputs, part.to(stream.device), out_dtype=torch.float32))
