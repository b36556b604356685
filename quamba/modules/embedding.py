"""Token embedding, int8 per row or as the checkpoint has it."""

from __future__ import annotations

import torch

from quamba.modules.lowbit import LowBit
from quamba.recipe import StorageSpec
from quamba_kernels import Setting, ops
from quamba_kernels.ops.rowwise import to_int8, token_scale


class Embedding(LowBit):
    """y = table[ids] for a table [V, D]; int8 rows have a scale each."""

    answers_weight = True
    weight: torch.Tensor
    weight_packed: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(
        self,
        vocab: int,
        size: int,
        spec: StorageSpec,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dtype)
        self.spec, self.out_dtype = spec, out_dtype
        if spec.bits == 8:
            self.register_buffer("weight_packed", torch.zeros(vocab, size, dtype=torch.int8, device=device))
            self.register_buffer("weight_scale", torch.ones(vocab, dtype=torch.float32, device=device))
        else:
            self.plain("weight", vocab, size, device=device)

    def fill(self, table: torch.Tensor, start: int = 0) -> None:
        """Store rows [v, D] of floats from ``start`` on; the scale of a row is max |row| / 127, whatever its sign."""
        if self.spec.bits == 8:
            scale = token_scale(table.float())
            self.weight_packed[start : start + len(table)] = to_int8(table, scale)
            self.weight_scale[start : start + len(table)] = scale.squeeze(-1)
        else:
            self.weight[start : start + len(table)] = table

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int [...] -> [..., D] in ``out_dtype``, or else in the activations' type."""
        self.bind()
        out_dtype = self.out_dtype or self.dtype
        if self.spec.bits == 8:
            return self._embedding(ids, self.weight_packed, self.weight_scale, out_dtype=out_dtype)
        return self.weight[ids].to(out_dtype)

    def _bind(self) -> None:
        self._embedding = ops.embedding.bind(Setting(self._any_device().type, self.dtype))
