"""Round to nearest and GPTQ: (weight, grid, Hessian) -> integer codes. Frantar et al., 2210.17323."""

from __future__ import annotations

import torch

from quamba.formats.format import Grid
from quamba.ranks import ALONE, Ranks

BLOCK = 128


class Hessian:
    """Sum of x^T x over what a linear really sees, fp32 [K, K], and the number of tokens.

    ``update`` adds to the running batch, ``end_batch`` that to the total, in the order of the batches over all ranks;
    ``unite`` gives every rank the whole. So the sum is the same however many ranks there are.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu", ranks: Ranks = ALONE) -> None:
        self.total = torch.zeros(features, features, device=device)
        self.tokens, self.ranks = 0, ranks
        self._batch: torch.Tensor | None = None
        self._factors: dict[tuple[float, bool], tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, x: torch.Tensor) -> None:
        """Add inputs x [..., K]."""
        rows = x.detach().float().flatten(0, -2)
        self._batch = rows.T @ rows if self._batch is None else self._batch.addmm_(rows.T, rows)
        self.tokens += rows.shape[0]

    def end_batch(self) -> None:
        """Called by all ranks after each of their batches, and by one that had none while the others had."""
        self._factors.clear()
        self.ranks.add_in_order(self.total, self._batch)
        self._batch = None

    def unite(self) -> None:
        """Called by all ranks after the last batch."""
        self.ranks.complete(self.total)
        tokens = torch.tensor([self.tokens])
        self.ranks.count(tokens)
        self.tokens = int(tokens)

    @property
    def mean(self) -> torch.Tensor:
        """E[x^T x], [K, K]. Raises FloatingPointError when an input held NaN or Inf."""
        assert self._batch is None, "the last batch was not ended"
        if not torch.isfinite(self.total.diagonal()).all():
            raise FloatingPointError("NaN or Inf in its activations")
        return self.total / max(self.tokens, 1)

    def factor(self, damping: float, act_order: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The order of the columns [K] and the upper Cholesky factor [K, K] of the damped inverse in that order.

        Kept for the next slab of the same linear. Raises FloatingPointError when the Hessian cannot be factored even
        with 100 times the damping.
        """
        if (damping, act_order) not in self._factors:
            mean = self.mean
            dead = mean.diagonal() == 0
            mean[dead, dead] = 1
            order = torch.arange(len(mean), device=mean.device)
            if act_order:
                order = mean.diagonal().argsort(descending=True)
            self._factors[damping, act_order] = order, _inverse_factor(mean[order][:, order], damping)
        return self._factors[damping, act_order]


def importance(hessian: Hessian | None, features: int) -> torch.Tensor:
    """Weight of each input feature's squared error [K]: the Hessian's diagonal, or ones."""
    if hessian is None:
        return torch.ones(features)
    diagonal = hessian.mean.diagonal()
    return diagonal.clamp_min(diagonal.mean() * 1e-4 + 1e-30)


def rtn(weight: torch.Tensor, grid: Grid, hessian: Hessian | None) -> torch.Tensor:
    """Codes [O, K] by rounding each weight to its nearest value; the Hessian only weighs the search for scales."""
    grid.begin(weight, importance(hessian, weight.shape[1]))
    groups = [grid.quantize(part, g) for g, part in enumerate(weight.split(grid.size, 1))]
    return torch.cat(groups, 1)


def gptq(weight: torch.Tensor, grid: Grid, hessian: Hessian, damping: float, act_order: bool) -> torch.Tensor:
    """Codes [O, K] column by column, each column's error pushed onto those not yet quantised (Algorithm 1).

    act_order takes columns by falling diagonal; the groups stay those of the original order (static groups).
    Raises FloatingPointError when the Hessian cannot be factored even with 100 times the damping.
    """
    features = weight.shape[1]
    weight = weight.float().clone()
    weigh = importance(hessian, features)
    weight[:, hessian.total.diagonal() == 0] = 0
    order, inverse = hessian.factor(damping, act_order)
    columns = order.tolist()
    grid.begin(weight, weigh)
    codes = torch.zeros_like(weight.T)
    work = weight.T[order].contiguous()  # [K, O]: a column of the weight is a row here, and contiguous
    for start in range(0, features, BLOCK):
        end = min(start + BLOCK, features)
        errors = torch.zeros_like(work[start:end])
        for column in range(start, end):
            source = columns[column]
            group = source // grid.size
            if not act_order and source % grid.size == 0:
                span = slice(source, source + grid.size)
                grid.fit(group, _present(work, span, start, end, errors, inverse).T.contiguous(), weigh[span])
            step = grid.step(group)
            code = torch.round(work[column] / step).clamp_(*grid.bounds)
            codes[source] = code
            error = (work[column] - code * step) / inverse[column, column]
            work[column:end].addr_(inverse[column, column:end], error, alpha=-1)
            errors[column - start] = error
        work[end:].addmm_(inverse[start:end, end:].T, errors, alpha=-1)
    return codes.T.contiguous()


def _present(
    work: torch.Tensor, span: slice, start: int, end: int, errors: torch.Tensor, inverse: torch.Tensor
) -> torch.Tensor:
    """The weights [S, O] of the group that begins now with every error so far pushed onto them: rows beyond the running
    block [start, end) have not had this block's errors yet."""
    group = work[span].clone()
    if span.stop > end:
        group[end - span.start :].addmm_(inverse[start:end, end : span.stop].T, errors, alpha=-1)
    return group


def _inverse_factor(mean: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper Cholesky factor of the damped inverse Hessian, [K, K]."""
    diagonal = mean.diagonal().mean()
    for boost in (1, 10, 100):
        added = damping * boost * diagonal + 1e-10
        damped = mean.double() + torch.eye(len(mean), dtype=torch.float64, device=mean.device) * added
        factor, info = torch.linalg.cholesky_ex(damped)
        if info == 0:
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if info == 0:
                return upper.float()
    raise FloatingPointError("the Hessian is not positive definite even with 100 times the damping")
