"""Hadamard matrices of the sizes that occur in recurrent models, and the transform as two small matrix products.

H_n has entries +-1/sqrt(n) and H H^T = I. A size n = b * 2^k is known when b is 1 or the order of a Paley matrix.
"""

from __future__ import annotations

from functools import cache

import torch


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, int(q**0.5) + 1))


def _jacobsthal(q: int) -> torch.Tensor:
    """Q[i, j] = chi(i - j) with chi the quadratic character of the field of q elements."""
    squares = {(i * i) % q for i in range(1, q)}
    chi = torch.tensor([0] + [1 if i in squares else -1 for i in range(1, q)], dtype=torch.float64)
    index = torch.arange(q)
    return chi[(index[:, None] - index[None, :]) % q]


def _paley_one(n: int) -> torch.Tensor:
    q = n - 1
    s = torch.zeros(n, n, dtype=torch.float64)
    s[0, 1:], s[1:, 0], s[1:, 1:] = 1, -1, _jacobsthal(q)
    return s + torch.eye(n, dtype=torch.float64)


def _paley_two(n: int) -> torch.Tensor:
    q = n // 2 - 1
    s = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    s[0, 1:], s[1:, 0], s[1:, 1:] = 1, 1, _jacobsthal(q)
    plus = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64)
    return torch.kron(s, plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)


def _base(n: int) -> torch.Tensor | None:
    """A matrix of +-1 of order n that is no power of two times a smaller one, by Paley's two constructions (1933)."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if n % 4 == 0 and _is_prime(n - 1):
        return _paley_one(n)
    if n % 4 == 0 and (n // 2 - 1) % 4 == 1 and _is_prime(n // 2 - 1):
        return _paley_two(n)
    return None


@cache
def factor(n: int) -> tuple[int, int] | None:
    """n = base * 2^k with a known base matrix and the largest k; None when no Hadamard matrix of order n is known."""
    power = n & -n
    while power >= 1:
        if _base(n // power) is not None:
            return n // power, power
        power //= 2
    return None


def block_size(n: int) -> int:
    """Largest block for which a transform of size n exists: n itself, or the largest power of two that divides n."""
    return n if factor(n) else n & -n


@cache
def _sylvester(n: int) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < n:
        h = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.float64), h)
    return h


@cache
def hadamard_matrix(n: int) -> torch.Tensor:
    """Orthonormal Hadamard matrix [n, n], float64.

    Raises ValueError when no matrix of that order is known here.
    """
    parts = factor(n)
    if parts is None:
        raise ValueError(f"no Hadamard matrix of order {n} is known; use a block that divides it, such as {n & -n}")
    base = _base(parts[0])
    assert base is not None
    return torch.kron(base, _sylvester(parts[1])) / n**0.5


@cache
def _factors(n: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """H_n = H_a (x) H_b with both sizes near sqrt(n), so that the transform costs n (a + b) products."""
    parts = factor(n)
    if parts is None:
        hadamard_matrix(n)
        raise AssertionError
    base, power = parts
    left = base
    while left < power * base // left and left * 2 <= n:
        left *= 2
    base_matrix = _base(base)
    assert base_matrix is not None
    with torch.inference_mode(False):  # cached: a later call may be outside inference mode
        a = torch.kron(base_matrix, _sylvester(left // base)) / left**0.5
        b = _sylvester(n // left) / (n // left) ** 0.5
        return a.to(device, dtype), b.to(device, dtype)


def rotate(x: torch.Tensor, block: int) -> torch.Tensor:
    """x H along the last axis, block-diagonal with blocks of the given size.

    x [..., C] with C a multiple of block; returns the same shape and dtype. Raises ValueError for a block that does
    not divide C or whose order is unknown.
    """
    _check_block(x, block)
    if block == 1:
        return x
    a, b = _factors(block, x.dtype, x.device)
    y = x.reshape(-1, a.shape[0], b.shape[0])
    return (a.T @ (y @ b)).reshape(x.shape)


def unrotate(x: torch.Tensor, block: int) -> torch.Tensor:
    """x H^T, which undoes ``rotate``: not every H is symmetric. Shapes and errors as there."""
    _check_block(x, block)
    if block == 1:
        return x
    a, b = _factors(block, x.dtype, x.device)
    y = x.reshape(-1, a.shape[0], b.shape[0])
    return (a @ (y @ b.T)).reshape(x.shape)


def _check_block(x: torch.Tensor, block: int) -> None:
    if x.shape[-1] % block:
        raise ValueError(f"a Hadamard block of {block} does not divide {x.shape[-1]} channels")
