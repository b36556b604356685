"""Batches of sequences of different lengths: what is refused, and that each sequence is run as if alone."""

import pytest
import torch

from quamba_kernels import ops
from quamba_kernels.ops.sequences import check_cu_seqlens

X = torch.randn(1, 7, 6, generator=torch.Generator().manual_seed(0))
TAPS = torch.tensor([[0.5, -1.0, 2.0]]).expand(6, 3)


def bounds(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    "cu_seqlens, message",
    [
        (bounds(0, 3, 6), "rises from 0 to the 7 tokens given, got \\[0, 3, 6\\]"),
        (bounds(1, 7), "rises from 0"),
        (bounds(0, 5, 3, 7), "rises from 0"),
        (bounds(0), "int32 \\[S \\+ 1\\], got torch.int32 \\[1\\]"),
        (torch.tensor([0, 7]), "got torch.int64 \\[2\\]"),
    ],
)
def test_bounds_that_do_not_fit_are_refused(cu_seqlens: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.causal_conv1d(X, TAPS, cu_seqlens=cu_seqlens)


def test_states_and_batches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 sequences and there are 3 states"):
        check_cu_seqlens(bounds(0, 3, 7), X, torch.zeros(3, 2, 6))
    with pytest.raises(ValueError, match="got a batch of 2"):
        check_cu_seqlens(bounds(0, 3, 7), X.expand(2, -1, -1), None)


def test_each_sequence_is_convolved_alone_and_an_empty_one_keeps_its_state() -> None:
    states = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(1))
    state, first, last = states.clone(), states[:1].clone(), states[2:].clone()
    y = ops.causal_conv1d(X, TAPS, None, state, cu_seqlens=bounds(0, 1, 1, 7))
    apart = [ops.causal_conv1d(X[:, :1], TAPS, None, first), ops.causal_conv1d(X[:, 1:], TAPS, None, last)]
    assert torch.equal(y, torch.cat(apart, 1))
    assert torch.equal(state, torch.cat([first, states[1:2], last]))
