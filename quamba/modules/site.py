"""A place where an activation becomes int8: its scale, or the statistics from which the scale will be set."""

from __future__ import annotations

from collections.abc import Callable

import torch

from quamba.modules.lowbit import LowBit
from quamba.observers import DETAILED, OBSERVERS, QMAX, Histogram
from quamba.recipe import ActivationSpec
from quamba.transforms.cluster import cluster_label
from quamba_kernels import Setting, ops
from quamba_kernels.ops import Activation

MIN_SCALE = 1e-8


class Site(LowBit):
    """A static scale for ``channels`` channels in ``groups`` state groups, or none (16 bits, or dynamic).

    Buffers by granularity: scale fp32 [1], [C] or [G]; "cluster" holds scale [G, h, c] with head_end [G, h] and
    channel_end [G, h, c]. clusters = (heads, headdim, h, c). The scale of a site not yet calibrated is 0.
    block: size of the Hadamard blocks in which floats that enter are rotated first, 0 for none.
    """

    scale: torch.Tensor
    head_end: torch.Tensor
    channel_end: torch.Tensor

    def __init__(
        self,
        spec: ActivationSpec,
        channels: int,
        *,
        groups: int = 1,
        clusters: tuple[int, int, int, int] | None = None,
        block: int = 0,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(dtype)
        if spec.granularity == "cluster" and clusters is None:
            # without a value axis to cluster, the state groups are the finest shared scales
            spec = spec.model_copy(update={"granularity": "state_group"})
        self.spec, self.channels, self.groups, self.clusters = spec, channels, groups, clusters
        self.block = block
        self.histogram: Histogram | None = None
        self.peek: Callable[[torch.Tensor], None] | None = None
        if self.static:
            flat: dict[str, tuple[int, ...]] = {"tensor": (1,), "channel": (channels,), "state_group": (groups,)}
            shape = flat.get(spec.granularity)
            if shape is None:
                assert clusters is not None
                shape = (groups, *clusters[2:])
                for name, size in (("head_end", shape[:2]), ("channel_end", shape)):
                    self.register_buffer(name, torch.zeros(size, dtype=torch.int32, device=device))
            self.register_buffer("scale", torch.zeros(shape, dtype=torch.float32, device=device))
        else:
            # nothing is stored, but the operators are bound for the device where the model lies
            self.register_buffer("anchor", torch.empty(0, device=device), persistent=False)

    @property
    def quantised(self) -> bool:
        """Whether this activation becomes int8."""
        return self.spec.bits == 8

    @property
    def static(self) -> bool:
        """Whether the scale is calibrated."""
        return self.quantised and self.spec.scale == "static"

    @property
    def per_token(self) -> bool:
        """Whether every token has its own scale, once calibration is over."""
        return self.quantised and self.spec.scale == "dynamic" and self.histogram is None

    @property
    def ready(self) -> bool:
        """Whether a static scale has been set."""
        return self.static and self.histogram is None

    @property
    def watched(self) -> bool:
        """Whether somebody wants to see what passes: statistics, or ``peek``."""
        return self.histogram is not None or self.peek is not None

    @property
    def shared_scale(self) -> torch.Tensor | None:
        """The scale as ops take it for a linear's input, [1] fp32; None when there is none."""
        return self.scale if self.ready else None

    def observe(self) -> None:
        """Begin to collect statistics; until ``settle`` the site lets floats through."""
        if self.quantised:
            detailed = self.static and self.spec.observer in DETAILED
            self.histogram = Histogram(self.channels, detailed, self._any_device())

    def watch(self, x: torch.Tensor) -> None:
        """Add x [..., C] to the statistics while collecting."""
        if self.peek is not None:
            self.peek(x)
        if self.histogram is not None and self.static:
            self.histogram.update(x)

    def label(self) -> tuple[torch.Tensor, int]:
        """Index into the flattened scale of every channel, and the number of scales."""
        index = torch.arange(self.channels, device=self._any_device())
        if self.spec.granularity == "tensor":
            return torch.zeros_like(index), 1
        if self.spec.granularity == "channel":
            return index, self.channels
        if self.spec.granularity == "state_group":
            return index // (self.channels // self.groups), self.groups
        assert self.clusters is not None
        heads, headdim = self.clusters[:2]
        return cluster_label(self.head_end, self.channel_end, heads, headdim).flatten(), self.scale.numel()

    def settle(self) -> None:
        """Set the scale from the statistics, and quantise from now on."""
        histogram, self.histogram = self.histogram, None
        if histogram is None or not self.static:
            return
        label, groups = self.label()
        peak, counts = histogram.grouped(label, groups)
        bound = OBSERVERS[self.spec.observer](peak, counts, self.spec.quantile)
        self.scale.copy_((bound / QMAX).clamp_min(MIN_SCALE).view_as(self.scale))

    def per_channel(self) -> torch.Tensor | None:
        """The static scale of every channel, fp32 [C]; None when there is none."""
        return self.scale.flatten()[self.label()[0]] if self.ready else None

    def forward(self, x: torch.Tensor) -> Activation:
        """x [..., C] as codes with their scale; as floats when 16 bits are asked for or while calibrating."""
        if self.block:
            self.bind()
            scale = self.shared_scale
            out: Activation = self._rotate(x, self.block, out_scale=scale, per_token=self.per_token, out_dtype=x.dtype)
            self.watch(out.data)
            return out
        self.watch(x)
        if not (self.ready or self.per_token):
            return Activation(x)
        self.bind()
        return self._quantize(x, None if self.per_token else self._scale)

    def _bind(self) -> None:
        shape = {"I": self.channels, "block": self.block}
        setting = Setting(self._any_device().type, self.dtype, shape)
        self._quantize = ops.quantize.bind(setting)
        if self.block:
            self._rotate = ops.rotate_input.bind(setting)
        scale = self.per_channel()
        self._scale = self.scale if scale is not None and self.scale.numel() == 1 else scale
