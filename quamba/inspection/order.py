"""Recover the order of channels that sort-and-cluster chose: it is not stored, but every stored weight shows it."""

from __future__ import annotations

import torch

from quamba.models.spec import MixerSpec, Proj
from quamba.transforms.permute import Permutation


def value_rows(mixer: MixerSpec, proj: Proj) -> list[slice]:
    """The output rows of a projection that carry the value channels [H, P]."""
    segment = next(i.axes for i in mixer.inputs if i.semantics == "value")
    rows, start = [], 0
    for output in proj.outputs:
        size = mixer.size(output.segment)
        if output.segment == segment:
            rows.append(slice(start, start + size))
        start += size
    return rows


def recover(stored: torch.Tensor, exact: torch.Tensor, rows: list[slice], heads: int) -> list[Permutation]:
    """The permutations of "value" and "head" that take ``exact`` to ``stored``.

    stored, exact [O, K]: the dequantised weight, and the original in its own order but in the same basis; rows:
    stretches of H * P outputs whose channels move together. Rounding leaves a row far nearer to itself than to others.
    """
    new, old = (torch.cat([w[r].float() for r in rows], 1) for w in (stored, exact))
    new, old = (w / w.norm(dim=1, keepdim=True).clamp_min(1e-30) for w in (new, old))
    alike = (new @ old.T).view(heads, -1, heads, len(new) // heads)
    head_order = assign(alike.amax(3).sum(1))
    value_order = torch.empty(heads, alike.shape[1], dtype=torch.int64)
    for head, source in enumerate(head_order.tolist()):
        value_order[source] = assign(alike[head, :, source])
    return [Permutation("value", value_order, outer="head"), Permutation("head", head_order)]


def assign(score: torch.Tensor) -> torch.Tensor:
    """A column for every row of score [n, n], int64 [n], each once: the best ones first where two rows want one."""
    wanted = score.argmax(1)
    if len(wanted.unique()) == len(wanted):
        return wanted.cpu()
    left, chosen = score.clone(), torch.empty(len(score), dtype=torch.int64)
    for _ in range(len(score)):
        row, column = divmod(int(left.argmax()), len(score))
        chosen[row] = column
        left[row], left[:, column] = -torch.inf, -torch.inf
    return chosen
