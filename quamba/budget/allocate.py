"""Which scheme each linear gets: the least sum of losses within so many bytes, exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Choice = tuple[int, float]
"""What one scheme takes, in bytes, and what it loses."""

HALVINGS = 200
SLACK = 1e-9
"""Of the best known sum, what a bound may exceed it by: rounding of sums must never rule out the best choice."""


def allocate(parts: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """The index of one choice for each part, such that the bytes fit the budget and the sum of losses is least; of
    equal sums the one with fewer bytes.

    Exact: all sums that could lead to the best choice are carried from part to part. One is dropped when another has
    neither more bytes nor more loss, or when even Lagrange's bound on what is left exceeds a known solution.
    Raises ValueError when the smallest choices exceed the budget.
    """
    least = [min(size for size, _ in part) for part in parts]
    if sum(least) > budget:
        raise ValueError(f"the smallest choices take {sum(least)} bytes, the budget has {budget}")
    fronts = [_front(part) for part in parts]
    price = _price(fronts, budget)
    cheapest = [float((losses + price * sizes).min()) for sizes, losses, _ in fronts]
    known = _greedy(fronts, price, budget)
    bytes_left = np.append(np.cumsum(least[::-1])[::-1], 0)
    bound_left = np.append(np.cumsum(cheapest[::-1])[::-1], 0.0)
    sizes, losses = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for index, (more, lost, names) in enumerate(fronts):
        all_sizes, all_losses = (sizes[:, None] + more).ravel(), (losses[:, None] + lost).ravel()
        bound = all_losses + bound_left[index + 1] - price * (budget - all_sizes)
        fits = all_sizes + bytes_left[index + 1] <= budget
        kept = np.flatnonzero(fits & (bound <= known + SLACK * (abs(known) + 1e-300)))
        kept = kept[np.lexsort((all_losses[kept], all_sizes[kept]))]
        lowest = np.minimum.accumulate(all_losses[kept])
        kept = kept[np.append(True, lowest[1:] < lowest[:-1])[: len(kept)]]
        trail.append((kept // len(more), names[kept % len(more)]))
        sizes, losses = all_sizes[kept], all_losses[kept]
    at, chosen = int(losses.argmin()), []
    for parents, names in reversed(trail):
        chosen.append(int(names[at]))
        at = int(parents[at])
    return chosen[::-1]


Front = tuple[np.ndarray, np.ndarray, np.ndarray]


def _front(part: Sequence[Choice]) -> Front:
    """Bytes, losses and indices of the choices that no smaller one equals or betters, by rising bytes."""
    sizes, losses = np.array([c[0] for c in part], np.int64), np.array([c[1] for c in part], float)
    order = np.lexsort((losses, sizes))
    lowest = np.minimum.accumulate(losses[order])
    kept = order[np.append(True, lowest[1:] < lowest[:-1])]
    return sizes[kept], losses[kept], kept


def _taken(fronts: Sequence[Front], price: float) -> list[int]:
    """Where loss + price * bytes is least in each front; of equals the smaller."""
    return [int((losses + price * sizes).argmin()) for sizes, losses, _ in fronts]


def _bytes(fronts: Sequence[Front], taken: Sequence[int]) -> int:
    return sum(int(front[0][at]) for front, at in zip(fronts, taken, strict=True))


def _price(fronts: Sequence[Front], budget: int) -> float:
    """The least loss per byte at which what is bought fits the budget."""
    low, high = 0.0, 1e-30
    if _bytes(fronts, _taken(fronts, low)) <= budget:
        return low
    while _bytes(fronts, _taken(fronts, high)) > budget:
        high *= 1e3
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if _bytes(fronts, _taken(fronts, middle)) > budget:
            low = middle
        else:
            high = middle
    return high


def _greedy(fronts: Sequence[Front], price: float, budget: int) -> float:
    """The loss of a good solution: what is bought at the price, and then the upgrade that gains most while one fits."""
    taken = _taken(fronts, price)
    left = budget - _bytes(fronts, taken)
    while True:
        best, gain = None, 0.0
        for part, (sizes, losses, _) in enumerate(fronts):
            for at in range(taken[part] + 1, len(sizes)):
                gained = float(losses[taken[part]] - losses[at])
                if sizes[at] - sizes[taken[part]] <= left and gained > gain:
                    best, gain = (part, at), gained
        if best is None:
            return sum(float(losses[at]) for (_, losses, _), at in zip(fronts, taken, strict=True))
        left -= int(fronts[best[0]][0][best[1]] - fronts[best[0]][0][taken[best[0]]])
        taken[best[0]] = best[1]
