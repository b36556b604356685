"""The order of int4 codes that Hopper's 16-bit products take."""

import pytest
import torch

from quamba_kernels.cuda.int4_order import order, stored
from quamba_kernels.ops.linear import unpack_int4


def words(outputs: int, features: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(features)
    return torch.randint(-(2**31), 2**31, (outputs, features // 8), generator=rng).int()


@pytest.mark.parametrize("features", [32, 96, 2560])
def test_each_word_is_what_a_lane_multiplies(features: int) -> None:
    w = words(5, features)
    codes, made = unpack_int4(w), order(w)
    assert made.shape == (5, features // 32, 4) and made.is_contiguous()
    for t in range(4):
        for q in range(4):
            for neighbour in range(2):
                nibble = (made[..., t] >> 4 * (q + 4 * neighbour) & 15) - 8
                assert torch.equal(nibble.long(), codes[:, 8 * q + 2 * t + neighbour :: 32].long())


@pytest.mark.parametrize("features", [32, 96, 2560])
def test_the_stored_order_comes_back(features: int) -> None:
    w = words(7, features)
    assert torch.equal(stored(order(w)), w) and not torch.equal(order(w).flatten(1), w)
