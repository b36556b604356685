"""How far the activations of a model spread: what its linears read and what its residual stream carries."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quamba.errors import UserError
from quamba.inspection.opened import Opened, Place
from quamba.modules.linear import Linear
from quamba.modules.mixer import Mixer
from quamba.recipe import RotationSpec
from quamba.transforms import output_block, residual_rotation
from quamba_kernels import hadamard
from quamba_kernels.ops import Activation, dequantize

OUTLIER = 3.0
"""A channel is an outlier when its largest magnitude exceeds this multiple of the median channel's."""


@dataclass(frozen=True)
class Spread:
    """Magnitudes of an activation [tokens, C].

    peak: max |x| over all tokens and channels. rms: sqrt(mean x^2) over the same. outlier_ratio: peak / rms.
    outlier_channels: the share of channels whose own peak exceeds OUTLIER times the median of all channels' peaks.
    channel_peaks: max |x| of every channel, fp32 [C].
    """

    peak: float
    rms: float
    outlier_ratio: float
    outlier_channels: float
    channel_peaks: torch.Tensor = field(repr=False, compare=False)


class Watched:
    """Statistics of activations [..., C] as they come."""

    def __init__(self) -> None:
        self.peaks: torch.Tensor | None = None
        self.squares, self.count = 0.0, 0

    def update(self, x: torch.Tensor) -> None:
        """Raises FloatingPointError for NaN or Inf."""
        if not x.numel():  # no token was routed here
            return
        rows = x.float().flatten(0, -2)
        peaks, squares = rows.abs().amax(0), float(rows.double().square().sum())
        if not math.isfinite(squares):
            raise FloatingPointError("NaN or Inf")
        self.peaks = peaks if self.peaks is None else torch.maximum(self.peaks, peaks)
        self.squares, self.count = self.squares + squares, self.count + rows.numel()


def spread(watched: list[Watched]) -> Spread | None:
    """Of several activations together (experts of one role); channels are judged beside those of their own activation.
    None where nothing has been seen."""
    seen = [(w, w.peaks) for w in watched if w.peaks is not None]
    if not seen:
        return None
    channel_peaks = torch.cat([peaks for _, peaks in seen]).cpu()
    outliers = sum(int((peaks > OUTLIER * peaks.median()).sum()) for _, peaks in seen)
    rms = math.sqrt(sum(w.squares for w, _ in seen) / sum(w.count for w, _ in seen))
    peak = float(channel_peaks.max())
    return Spread(peak, rms, peak / rms if rms else 1.0, outliers / len(channel_peaks), channel_peaks)


class Rotated:
    """One activation before and after its Hadamard rotation, whichever of the two the model has."""

    def __init__(self, rotate: Callable[[torch.Tensor], torch.Tensor], undo: Callable[[torch.Tensor], torch.Tensor],
                 done: bool) -> None:  # fmt: skip
        self.before, self.after = Watched(), Watched()
        self._rotate, self._undo, self._done = rotate, undo, done

    def update(self, x: torch.Tensor) -> None:
        """x [..., C] as the model has it."""
        self.before.update(self._undo(x) if self._done else x)
        self.after.update(x if self._done else self._rotate(x))


class Survey:
    """Everything that is watched while text runs through a model: ``linears`` by path; ``streams``, the residual stream
    as it enters each block; ``outputs`` by path, the inputs of the linears that a mixer rotates online.

    Quantised inputs are seen before they are rounded and clipped, except those that arrive as codes (x of x_proj). A
    model without rotations is rotated here as a stock recipe would, whether or not that would be exact.
    """

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self.linears = {place.path: Watched() for place in opened.places}
        rotation = opened.rotation or residual_rotation(opened.spec.d_model, RotationSpec().seed)
        done = opened.rotation is not None
        self.streams = [Rotated(rotation.columns, rotation.undo, done) for _ in opened.spec.blocks]
        self.outputs = {place.path: _output(opened, place) for place in opened.places if place.mixer is not None}

    @torch.inference_mode()
    def run(self, ids: torch.Tensor, batch: int, progress: Callable[[str, int, int], None]) -> None:
        """Let windows int64 [windows, T] through the model. Raises UserError that names the layer for NaN or Inf."""
        with ExitStack() as undo:
            for place in self.opened.places:
                if place.module is None:
                    continue
                if isinstance(place.module, Linear):
                    # a site that collects lets floats through: they are seen before they are rounded and clipped
                    place.module.input.observe()
                    undo.callback(setattr, place.module.input, "histogram", None)
                undo.callback(place.module.register_forward_pre_hook(self._read(place)).remove)
            for layer, block in enumerate(self.opened.spec.blocks):
                module = self.opened.model.get_submodule(block.path)
                undo.callback(module.register_forward_pre_hook(self._enter(layer), with_kwargs=True).remove)
            done = 0
            for part in self.opened.windows(ids, batch):
                progress("activations", done, len(ids))
                self.opened.model(part, use_cache=False)
                done += len(part)
            progress("activations", done, len(ids))

    def _read(self, place: Place) -> Callable[..., Any]:
        own, output = self.linears[place.path], self.outputs.get(place.path)

        def see(module: nn.Module, args: tuple[Any, ...]) -> Any:
            given = args[0]
            x = dequantize(*given) if isinstance(given, Activation) else given
            if output is not None:
                _watch(output, x, place.path)
            if not isinstance(module, Linear):
                _watch(own, x, place.path)
                return None
            turns = module.input.block and not isinstance(given, Activation)
            _watch(own, hadamard.rotate(x.float(), module.input.block) if turns else x, place.path)
            if not module.input.quantised or (isinstance(given, Activation) and given.scale is not None):
                return None
            collecting, module.input.histogram = module.input.histogram, None
            codes = module.input(given.data if isinstance(given, Activation) else given)
            module.input.histogram = collecting
            return (codes, *args[1:])

        return see

    def _enter(self, layer: int) -> Callable[..., None]:
        name = self.opened.spec.blocks[layer].path

        def see(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _watch(self.streams[layer], args[0] if args else kwargs["hidden_states"], name)

        return see


def _watch(watching: Watched | Rotated, x: torch.Tensor, name: str) -> None:
    try:
        watching.update(x)
    except FloatingPointError as error:
        raise UserError(f"the input of {name} holds {error} on this text; check the checkpoint's weights") from None


def _output(opened: Opened, place: Place) -> Rotated:
    """What an online rotation does to the input of a linear: before the linear, in it, or nowhere in this model."""
    assert place.mixer is not None
    before, inside = opened.model.get_submodule(place.path.rpartition(".")[0]), place.module
    done = before.block if isinstance(before, Mixer) else 0
    block = done or (inside.input.block if isinstance(inside, Linear) else 0) or output_block(place.mixer, None)
    return Rotated(
        lambda x: hadamard.rotate(x.float(), block), lambda x: hadamard.unrotate(x.float(), block), done > 0
    )
