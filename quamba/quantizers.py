"""Round to nearest and GPTQ: (weight, grid, Hessian) -> integer codes. Frantar et al., 2210.17323."""

from __future__ import annotations

import torch

from quamba.formats.format import Grid

BLOCK = 128


class Hessian:
    """Sum of x^T x over what a linear really sees, fp32 [K, K], and the number of tokens."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(features, features, device=device)
        self.tokens = 0

    def update(self, x: torch.Tensor) -> None:
        """Add inputs x [..., K]."""
        rows = x.detach().float().flatten(0, -2)
        self.total.addmm_(rows.T, rows)
        self.tokens += rows.shape[0]

    @property
    def mean(self) -> torch.Tensor:
        """E[x^T x], [K, K]."""
        return self.total / max(self.tokens, 1)


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
    mean = hessian.mean.clone()
    weigh = importance(hessian, features)
    dead = mean.diagonal() == 0
    mean[dead, dead] = 1
    weight[:, dead] = 0
    order = mean.diagonal().argsort(descending=True) if act_order else torch.arange(features)
    inverse = _inverse_factor(mean[order][:, order], damping)
    grid.begin(weight, weigh)
    codes = torch.zeros_like(weight)
    work = weight[:, order]
    for start in range(0, features, BLOCK):
        end = min(start + BLOCK, features)
        errors = torch.zeros_like(work[:, start:end])
        for column in range(start, end):
            source = int(order[column])
            group = source // grid.size
            if not act_order and source % grid.size == 0:
                grid.fit(group, _present(work, column, grid.size, end, errors, inverse, start), weigh[source : source + grid.size])
            step = grid.step(group)
            code = torch.round(work[:, column] / step).clamp_(*grid.bounds)
            codes[:, source] = code
            error = (work[:, column] - code * step) / inverse[column, column]
            work[:, column:end] -= error.unsqueeze(1) * inverse[column, column:end].unsqueeze(0)
            errors[:, column - start] = error
        work[:, end:] -= errors @ inverse[start:end, end:]
    return codes


def _present(
    work: torch.Tensor, column: int, size: int, end: int, errors: torch.Tensor, inverse: torch.Tensor, start: int
) -> torch.Tensor:
    """The weights of the group that begins at ``column`` with every error so far pushed onto them: columns beyond the
    running block have not had this block's errors yet."""
    stop = column + size
    group = work[:, column:stop].clone()
    if stop > end:
        group[:, end - column :] -= errors @ inverse[start:end, end:stop]
    return group


def _inverse_factor(mean: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper Cholesky factor of the damped inverse Hessian, [K, K]."""
    diagonal = mean.diagonal().mean()
    for boost in (1, 10, 100):
        damped = mean.double() + torch.eye(mean.shape[0], dtype=torch.float64) * (damping * boost * diagonal + 1e-10)
        factor, info = torch.linalg.cholesky_ex(damped)
        if info == 0:
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if info == 0:
                return upper.float()
    raise FloatingPointError("the Hessian is not positive definite even with 100 times the damping")
