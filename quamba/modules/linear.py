"""A linear in any weight format."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn import functional as F

from quamba import formats
from quamba.modules.lowbit import LowBit
from quamba.modules.norm import Pending
from quamba.modules.site import Site
from quamba.quantizers import Hessian, gptq, rtn
from quamba.recipe import ActivationSpec, LinearSpec
from quamba_kernels.ops import Activation, dequantize

SLAB = 2**21
"""Weights quantised at once: rows do not depend on each other, and a head of 256,000 rows is not copied whole."""


class Linear(LowBit):
    """y = x W^T + bias; the format owns the stored tensors. K in features, O out features. block: size of the Hadamard
    blocks in which a float input is rotated, 0 for none. out_dtype: of y, None for the activations'.

    While quantising, ``hold`` keeps the float weight until ``quantise``, and ``capture`` is called with the input.
    """

    answers_weight = True
    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        features: int,
        outputs: int,
        *,
        bias: bool,
        spec: LinearSpec,
        block: int = 0,
        out_dtype: torch.dtype | None = None,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(dtype)
        self.features, self.outputs, self.spec, self.out_dtype = features, outputs, spec, out_dtype
        self.format = formats.get(spec.format)
        self.capture: Callable[[Activation], None] | None = None
        self.held: torch.Tensor | None = None
        self.names: tuple[str, ...] = ()
        self._allocate(device)
        input_spec = spec.input if self.format.int8_input else ActivationSpec(bits=16)
        if input_spec.granularity != "tensor":
            input_spec = input_spec.model_copy(update={"granularity": "tensor"})
        self.input = Site(input_spec, features, block=block, dtype=dtype, device=device)
        if bias:
            self.plain("bias", outputs, device=device)
        else:
            self.bias = None

    def _allocate(self, device: torch.device | str | None) -> None:
        shapes = self.format.tensors(self.features, self.outputs, self.spec)
        for name, (shape, dtype) in shapes.items():
            if name == "weight":
                self.plain(name, *shape, device=device)
            else:
                self._buffers[name] = torch.zeros(shape, dtype=dtype, device=device)
        self.names = tuple(shapes)

    def forward(
        self,
        x: torch.Tensor | Activation | Pending,
        residual: torch.Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """x [..., K] floats, codes with their scale, or floats before their norm -> [..., O] in ``out_dtype`` (default:
        the linear's own)."""
        out_dtype = out_dtype or self.out_dtype or self.dtype
        if isinstance(x, Pending):
            return self._normalised(x, residual, out_dtype)
        seen: Activation = x if isinstance(x, Activation) else self.input(x)
        if self.capture is not None:
            self.capture(seen)
        if self.held is not None:
            y = F.linear(dequantize(*seen), self.held, self.bias)
            return (y if residual is None else y + residual).to(out_dtype)
        self.bind()
        if self.format.int8_input:
            return self._backend(seen.data, seen.scale, self._weights, self.bias, residual, out_dtype=out_dtype)
        data = seen.data if seen.scale is None else dequantize(*seen).to(self.dtype)
        return self._backend(data, self._weights, self.bias, residual, out_dtype=out_dtype)

    def ahead(self, rows: int) -> AbstractContextManager[None]:
        """Surrounds what runs before this linear over so many rows, and the linear: a backend may use the time."""
        if self.held is not None or torch.compiler.is_compiling():
            return nullcontext()
        self.bind()
        return self._backend.ahead(self._weights, rows)

    @property
    def normalises(self) -> bool:
        """Whether this linear takes what stands before its norm: a backend does both, and nobody looks at the input."""
        if self.held is not None or self.capture is not None or self.input.watched or self.input.block:
            return False
        if self.input.static and not self.input.ready:
            return False
        self.bind()
        return self._norm_linear is not None

    def _normalised(self, x: Pending, residual: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
        assert self._norm_linear is not None
        weight = None if x.norm.folded else x.norm.weight
        coded = self.format.int8_input
        y: torch.Tensor = self._norm_linear(
            x.x, weight, x.norm.eps, self._weights, self.bias, residual, linear=self.format.op.name,
            in_scale=self.input.shared_scale if coded else None, per_token=coded and self.input.per_token,
            in_dtype=self.dtype, out_dtype=out_dtype,
        )  # fmt: skip
        return y

    def _bind(self) -> None:
        device = self._any_device().type
        self._backend = self.format.bind(device, self.dtype, self.features, self.outputs, self.spec)
        self._norm_linear = self.format.bind_norm(device, self.dtype, self.features, self.outputs, self.spec)
        stored: dict[str, torch.Tensor] = {name: getattr(self, name) for name in self.names}
        self._weights = self._backend.prepack(tuple(stored.values()))
        for name, tensor in stored.items():
            # prepacked weights stand in for the stored ones, which are rebuilt when asked for
            if all(tensor is not w for w in self._weights):
                self._buffers[name] = None

    def _any_device(self) -> torch.device:
        return self._weights[0].device if self._bound else super()._any_device()

    def _unbind(self) -> None:
        for name, tensor in zip(self.names, self._backend.unpack(self._weights), strict=True):
            if name != "weight":
                self._buffers[name] = tensor
        del self._weights, self._backend, self._norm_linear

    def hold(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Run in floats with this weight [O, K] and bias [O] until ``quantise``."""
        self.held = weight.float()
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def quantise(self, hessian: Hessian | None) -> None:
        """Store the held weight as the format and the spec say, the Hessian [K, K] being that of the inputs."""
        for rows in self.slabs():
            self.quantise_rows(rows, hessian)
        self.release()

    def slabs(self) -> list[slice]:
        """The rows that are quantised at once, apart from all others; none where the format rounds nothing."""
        size = max(1, SLAB // self.features)
        starts = range(0, self.outputs, size) if self.format.has_grid else ()
        return [slice(start, min(start + size, self.outputs)) for start in starts]

    def quantise_rows(self, rows: slice, hessian: Hessian | None) -> None:
        """Store one slab of the held weight; ``release`` follows the last one."""
        assert self.held is not None
        part = self.held[rows]
        grid = self.format.grid(self.features, len(part), self.spec)
        if self.spec.method == "gptq" and hessian is not None:
            codes = gptq(part, grid, hessian, self.spec.damping, self.spec.act_order)
        else:
            codes = rtn(part, grid, hessian)
        for name, tensor in grid.pack(codes).items():
            getattr(self, name)[rows] = tensor

    def stored_rows(self, rows: slice) -> list[torch.Tensor]:
        """What is stored for some rows, in place."""
        return [getattr(self, name)[rows] for name in self.names]

    def release(self) -> None:
        """Let the held weight go, and run on what is stored."""
        weight, self.held = self.held, None
        if weight is not None and not self.format.has_grid:
            self.weight.copy_(weight)
