"""What each scheme costs each linear, alone in a model that is otherwise in floats: KL divergence of the next token.

The blocks are walked once, as the pipeline walks them: what the samples look like before a block is there when its
linears come to their turn, so a candidate runs from its own block on. All candidates of earlier blocks wait in host
memory and move on together, so a block is read once however many candidates pass it; where they take more than a
share of the memory, the walk begins anew at the first block that has not had its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from quamba import calibrate, ends, memory, pipeline
from quamba.budget.instead import Instead, input_kind, input_sites
from quamba.budget.parts import HEAD, Part
from quamba.checkpoint import Checkpoint
from quamba.lending import Lent, Uses, later_uses, reaching
from quamba.models.spec import Sublayer
from quamba.modules.host import HostedBlock
from quamba.modules.linear import Linear
from quamba.modules.site import Site
from quamba.quantizers import Hessian
from quamba.recipe import ActivationSpec, Recipe
from quamba.skeleton import Skeleton
from quamba.transforms import residual_rotation, residual_rotation_obstacle

Losses = dict[tuple[int | None, str], tuple[float, ...]]
"""By layer and role: the loss of each option of that part, in nats per token."""

SHARE = 4
"""Candidates may take one part in so many of the machine's memory."""
ROWS = 512
"""Tokens whose distributions are held at once."""
FLOATS = ActivationSpec(bits=16)


@dataclass
class Candidate:
    """One option of one part, and what the samples look like with it where the walk has come to. lent: where later
    blocks use the part too, the full path of the module that holds it; it stands there for floats then as well."""

    part: Part
    option: int
    samples: calibrate.Samples
    instead: Instead | None = None
    lent: str | None = None


@dataclass
class Measurement:
    """What to measure, on what, and whom to tell (done, total).

    tokens [samples, T]: the first ``judged`` windows (rounded up to whole batches) are what candidates read; the rest,
    where there is one, is what scales and Hessians are taken from, so that a loss is one on a text not yet seen.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    parts: Sequence[Part]
    tokens: torch.Tensor
    judged: int
    device: torch.device
    tell: Callable[[int, int], None]

    def __post_init__(self) -> None:
        model, batch_size = self.checkpoint.spec, self.recipe.calibration.batch_size
        self.judged = min(len(self.tokens), -(-self.judged // batch_size) * batch_size)
        rotates = self.recipe.rotate.residual and residual_rotation_obstacle(model) is None
        self.rotation = residual_rotation(model.d_model, self.recipe.rotate.seed) if rotates else None
        self.losses: dict[tuple[int | None, str], list[float]] = {
            (part.layer, part.role): [0.0] * len(part.options) for part in self.parts
        }
        self.steps, self.lent, self.uses = (0, 0), Lent(), Uses()

    def run(self) -> Losses:
        """Raises FloatingPointError when a number that is met is not finite."""
        model = self.checkpoint.spec
        skeleton = Skeleton(self.checkpoint.config, model) if model.hosted else None
        table = self.checkpoint.tensor(f"{model.embedding}.weight")
        embedding = ends.filled(model, self.recipe, table, self.rotation).to(torch.float32)
        if skeleton is not None:
            for name in model.params:
                skeleton.take(name, self.checkpoint.tensor(name))
        batch_size = self.recipe.calibration.batch_size
        hidden, arguments = pipeline.enter(embedding, self.tokens, skeleton, self.recipe)
        stream = calibrate.Samples(hidden, batch_size, self.device)
        floats = pipeline.in_floats(self.checkpoint, self.recipe, self.rotation, skeleton, arguments, self.device)
        self.uses = later_uses(model, arguments, self._split(stream)[0], 0, floats)
        carried = 1 if model.carry is None else 2  # what layers hand on is about as much as a hidden state
        start, turns, blocks = 0, self._turns(carried * hidden[: self.judged].nbytes), len(model.blocks)
        self.steps = 0, sum(blocks - begun for begun in (0, *turns[:-1])) + len(turns)
        for end in turns:
            if start and model.hosted:
                skeleton = Skeleton(self.checkpoint.config, model)
            stream = self._walk(start, end, stream, skeleton, arguments)
            start = end
        return {key: tuple(found) for key, found in self.losses.items()}

    def _turns(self, size: int) -> list[int]:
        """The blocks before which a walk ends its turn: so many candidates fit the memory, one of so many bytes."""
        room, ends, waiting = max(1, memory.installed() // SHARE // size), [], 0
        for layer in range(len(self.checkpoint.spec.blocks)):
            count = sum(len(part.options) for part in self.parts if part.layer == layer and len(part.options) > 1)
            if waiting and waiting + count > room:
                ends.append(layer)
                waiting = 0
            waiting += count
        return [*ends, len(self.checkpoint.spec.blocks)]

    def _walk(
        self,
        start: int,
        end: int,
        stream: calibrate.Samples,
        skeleton: Skeleton | None,
        arguments: dict[str, Any],
    ) -> calibrate.Samples:
        """From block ``start``, where ``stream`` has come to, to the head; candidates are made in the blocks before
        ``end``. Returns what the samples look like there."""
        model, there = self.checkpoint.spec, stream
        waiting: list[Candidate] = []
        for layer in range(start, len(model.blocks)):
            if layer == end:
                there = stream.copy()
            block = model.blocks[layer]
            tensors = self.checkpoint.block(block)
            dtype = next(iter(tensors.values())).dtype
            module = pipeline.build(
                model, block, self.recipe, layer, dtype, self.device, skeleton, arguments, self.lent
            )
            with pipeline.naming(f"layer {layer} ({block.path})"):
                for subs in self._floats(module, tensors, dtype, stream):
                    fresh = list(self._candidates(module, layer, subs, stream)) if layer < end else []
                    calibrate.advance(module, subs[-1], stream)
                    for candidate in waiting:
                        here = block.borrows is not None and block.borrows[1] == candidate.lent
                        with (candidate.instead if here else None) or nullcontext():
                            calibrate.advance(module, subs[-1], candidate.samples)
                    waiting += fresh
                if isinstance(module, HostedBlock):
                    self.lent |= module.lend(model.lent(block))
                stream.check()
            memory.release()
            self._step()
        with pipeline.naming(model.head):
            self._judge(waiting, stream, skeleton, last=end == len(model.blocks))
        return there

    def _split(self, stream: calibrate.Samples) -> tuple[calibrate.Samples, calibrate.Samples]:
        """Of samples those that scales and Hessians are taken from, and those that candidates read; no copies."""
        if self.judged == len(stream.hidden):
            return stream, stream
        carry = {name: tensor[self.judged :] for name, tensor in stream.carry.items()}
        rest = calibrate.Samples(stream.hidden[self.judged :], stream.batch_size, stream.device, carry=carry)
        return rest, stream.first(self.judged)

    def _floats(
        self, module: calibrate.Block, tensors: pipeline.Tensors, dtype: torch.dtype, stream: calibrate.Samples
    ) -> Iterator[list[Sublayer]]:
        """Let a block hold its transformed floats, and yield the sublayers that run next, together."""
        subs, recipe, hosted = module.block_spec.sublayers, self.recipe, isinstance(module, HostedBlock)
        module.keep(tensors, dtype)
        for sub in subs if hosted else ():
            exact = pipeline.transform(tensors, sub, recipe, self.rotation)
            module.hold(sub, pipeline.rotated(exact, sub, recipe, module.layer_idx), dtype)
            calibrate.let_through(module, sub)
        for sub in subs:
            exact = pipeline.transform(tensors, sub, recipe, self.rotation)
            exact = pipeline.cluster(module, sub, recipe, exact, dtype, self._split(stream)[0])
            module.hold(sub, pipeline.rotated(exact, sub, recipe, module.layer_idx), dtype)
            for site in calibrate.sites(module, sub):
                site.histogram, site.spec = None, FLOATS
            calibrate.rebind(module)
            if not hosted:
                yield [sub]
        if hosted:
            yield list(subs)

    def _candidates(
        self,
        module: calibrate.Block,
        layer: int,
        subs: list[Sublayer],
        stream: calibrate.Samples,
    ) -> Iterator[Candidate]:
        """Every option of every part of some sublayers, made on what these see in floats."""
        run, (seen, judged) = partial(module.run, subs[-1]), self._split(stream)
        for part in self.parts:
            if part.layer != layer or len(part.options) == 1:
                continue
            linears: list[Linear] = []
            hessians: list[Hessian] = []
            sites: dict[str, list[Site]] = {}
            lent = None
            for sub in subs:
                own = [n for p in sub.mixer.projs if p.role == part.role for n in module.linears(sub, p)]
                if not own:
                    continue
                reached = reaching(module, sub, seen, self.uses)
                for kind, made in input_sites(part, own, run, reached).items():
                    sites.setdefault(kind, []).extend(made)
                linears, hessians = linears + own, hessians + _hessians(module, sub, own, reached)
                paths = self.checkpoint.spec.lent(module.block_spec)
                inside = f"{module.block_spec.path}.{sub.mixer.path}."
                lent = next((path for path in paths if inside.startswith(f"{path}.")), None)
            for index, option in enumerate(part.options) if linears else ():
                samples = judged.copy()
                instead = Instead(linears, option.spec, hessians, sites[input_kind(option)])
                with instead:
                    calibrate.advance(module, subs[-1], samples)
                yield Candidate(part, index, samples, None if lent is None else instead, lent)

    def _judge(
        self,
        waiting: list[Candidate],
        stream: calibrate.Samples,
        skeleton: Skeleton | None,
        last: bool,
    ) -> None:
        """The loss of the candidates that have come to the head, and in the last walk of those of the head itself."""
        model, (seen, judged) = self.checkpoint.spec, self._split(stream)
        norm, gain = ends.last_norm(model, self.recipe, self.checkpoint, skeleton, self.device)
        weight = self.checkpoint.tensor(f"{model.head}.weight")
        linear = Linear(
            model.d_model, model.vocab, bias=False, spec=self.recipe.linear(HEAD), dtype=weight.dtype,
            device=self.device,
        ).to(torch.float32)  # fmt: skip
        linear.hold(ends.fold_head(weight, gain, self.rotation, self.device), None)
        linear.input.spec = FLOATS

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            return linear(norm(hidden[..., : model.d_model].to(self.device)))

        for start in range(0, self._tokens, ROWS):
            wanted = logits(_rows(judged.hidden, start))
            for candidate in waiting:
                found = logits(_rows(candidate.samples.hidden, start))
                self._add(candidate.part, candidate.option, wanted, found)
        for part in self.parts if last else ():
            if part.layer is None and len(part.options) > 1:
                self._judge_head(part, linear, logits, seen, judged)
        self._step()

    def _judge_head(
        self,
        part: Part,
        linear: Linear,
        logits: Callable[[torch.Tensor], torch.Tensor],
        seen: calibrate.Samples,
        judged: calibrate.Samples,
    ) -> None:
        sites = input_sites(part, [linear], lambda hidden, carry: logits(hidden), seen)
        hessian = Hessian(linear.features, self.device)
        linear.capture = lambda x: hessian.update(x.data)
        for hidden in seen:
            logits(hidden)
            hessian.end_batch()
        linear.capture = None
        for index, option in enumerate(part.options):
            instead = Instead([linear], option.spec, [hessian], sites[input_kind(option)])
            for start in range(0, self._tokens, ROWS):
                wanted = logits(_rows(judged.hidden, start))
                with instead:
                    found = logits(_rows(judged.hidden, start))
                self._add(part, index, wanted, found)

    def _add(self, part: Part, option: int, wanted: torch.Tensor, found: torch.Tensor) -> None:
        """Add the KL divergence of the distributions of some tokens, logits [1, T, V]."""
        apart = F.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        self.losses[part.layer, part.role][option] += float(apart.double().sum()) / self._tokens

    @property
    def _tokens(self) -> int:
        return self.judged * self.tokens.shape[1]

    def _step(self) -> None:
        self.steps = self.steps[0] + 1, self.steps[1]
        self.tell(*self.steps)


def _rows(hidden: torch.Tensor, start: int) -> torch.Tensor:
    """Some tokens of hidden states [samples, T, D], as [1, ROWS, D]."""
    return hidden.flatten(0, 1)[start : start + ROWS].unsqueeze(0)


def _hessians(
    module: calibrate.Block, sub: Sublayer, linears: list[Linear], stream: calibrate.Samples
) -> list[Hessian]:
    """What each linear sees in floats."""
    found: dict[int, Hessian] = {}
    for stage in calibrate.stages(module, sub):
        if any(linear is known for group in stage for known in group for linear in linears):
            hessians, _ = calibrate.collect_inputs(module, sub, stage, stream, keep=False)
            for group, hessian in zip(stage, hessians, strict=True):
                found |= {id(linear): hessian for linear in group}
    return [found[id(linear)] for linear in linears]
