"""RMS norm before a mixer, before the head, and between scan and out_proj."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple

import torch

from quamba.modules.lowbit import LowBit
from quamba.modules.site import Site
from quamba_kernels import Setting, ops
from quamba_kernels.ops import Activation

if TYPE_CHECKING:
    from quamba.modules.linear import Linear


class Pending(NamedTuple):
    """The input of a linear that normalises x [..., D] itself; ``norm`` gives the result where it must be seen."""

    x: torch.Tensor
    norm: Norm


class Norm(LowBit):
    """y = x / rms(x) * weight over D channels, quantised on the way out where the consumer asks for it.

    folded: the gain lives in the linears that read y, and no tensor is stored.
    """

    answers_weight = True
    weight: torch.Tensor

    def __init__(
        self,
        size: int,
        eps: float,
        *,
        folded: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(dtype)
        self.eps, self.folded = eps, folded
        self.register_buffer("anchor", torch.empty(0, device=device), persistent=False)
        if not folded:
            self.plain("weight", size, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., D] -> [..., D] in the activations' type."""
        return self.into(x, None).data

    def into(self, x: torch.Tensor, site: Site | None) -> Activation:
        """x [..., D] float as the input of a linear whose input site is given."""
        self.bind()
        weight = None if self.folded else self.weight
        if site is None:
            return self._rms_norm(x, weight, self.eps, out_dtype=self.dtype)
        out = self._rms_norm(
            x, weight, self.eps, out_scale=site.shared_scale, per_token=site.per_token, out_dtype=self.dtype
        )
        site.watch(out.data)
        return out

    def before(self, x: torch.Tensor, linear: Linear) -> Activation | Pending:
        """x [..., D] float as the input of a linear, left to the linear where a backend does both at once."""
        return Pending(x, self) if linear.normalises else self.into(x, linear.input)

    def _bind(self) -> None:
        self._rms_norm = ops.rms_norm.bind(Setting(self._any_device().type, self.dtype))


_NARROWED = ContextVar("narrowed", default=False)


class LastNorm(Norm):
    """The norm before the head."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, D] -> [B, T, D] in the activations' type, or [B, 1, D] of the last token."""
        return super().forward(x[:, -1:] if _NARROWED.get() else x)


@contextmanager
def narrowed() -> Iterator[None]:
    """Inside, for this thread, heads see the last token of each sequence alone: for callers that read no other
    logits."""
    before = _NARROWED.set(True)
    try:
        yield
    finally:
        _NARROWED.reset(before)
