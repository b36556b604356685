"""Hadamard matrices of every order that models have, and the fast transform."""

import pytest
import torch

from quamba_kernels.hadamard import block_size, factor, hadamard_matrix, rotate, unrotate

ORDERS = [1, 2, 4, 12, 20, 28, 36, 40, 44, 48, 112, 192, 320, 768, 1536, 2560, 4096, 5120]
UNKNOWN = {3: 1, 6: 2, 7: 1, 14: 2, 92: 4, 184: 8, 1000003: 1}


@pytest.mark.parametrize("n", ORDERS)
def test_matrix_is_orthonormal_with_entries_of_one_size(n: int) -> None:
    h = hadamard_matrix(n)
    assert h.shape == (n, n) and h.dtype == torch.float64
    assert torch.allclose(h.abs(), torch.full_like(h, n**-0.5), rtol=1e-12, atol=0)
    rows = h if n <= 1536 else h[torch.randperm(n, generator=torch.Generator().manual_seed(0))[:64]]
    assert (rows @ rows.T - torch.eye(len(rows), dtype=torch.float64)).abs().max() < 1e-12


@pytest.mark.parametrize("n", ORDERS)
def test_rotate_is_the_product_with_the_matrix(n: int) -> None:
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    assert (rotate(x, n) - x @ hadamard_matrix(n)).abs().max() < 1e-11


@pytest.mark.parametrize("n", ORDERS)
def test_unrotate_is_the_product_with_the_transpose(n: int) -> None:
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    assert (unrotate(x, n) - x @ hadamard_matrix(n).T).abs().max() < 1e-11
    assert (unrotate(rotate(x, n), n) - x).abs().max() < 1e-11


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_rotate_keeps_shape_type_and_norm(dtype: torch.dtype, tolerance: float) -> None:
    x = torch.randn(2, 3, 320, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = rotate(x, 320)
    assert y.shape == x.shape and y.dtype == dtype
    assert abs(y.float().norm() / x.float().norm() - 1) < tolerance


@pytest.mark.parametrize("channels, block", [(48, 12), (48, 16), (96, 4), (184, 8), (60, 20)])
def test_blocks_are_rotated_apart(channels: int, block: int) -> None:
    x = torch.randn(5, channels, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    diagonal = torch.block_diag(*[hadamard_matrix(block)] * (channels // block))
    assert (rotate(x, block) - x @ diagonal).abs().max() < 1e-12
    assert torch.equal(rotate(x, 1), x)


@pytest.mark.parametrize("n, block", UNKNOWN.items())
def test_unknown_orders_fall_back_to_the_largest_power_of_two(n: int, block: int) -> None:
    assert factor(n) is None and block_size(n) == block
    with pytest.raises(ValueError, match=f"order {n} is known; use a block that divides it, such as {block}"):
        hadamard_matrix(n)
    with pytest.raises(ValueError, match=f"order {n} is known"):
        rotate(torch.ones(1, n), n)


@pytest.mark.parametrize("n", ORDERS)
def test_known_orders_are_one_block(n: int) -> None:
    base, power = factor(n) or (0, 0)
    assert base * power == n and power & (power - 1) == 0 and block_size(n) == n


@pytest.mark.parametrize("channels, block", [(48, 5), (48, 96), (12, 8)])
def test_a_block_that_does_not_divide_is_refused(channels: int, block: int) -> None:
    with pytest.raises(ValueError, match=f"block of {block} does not divide {channels}"):
        rotate(torch.ones(2, channels), block)
    with pytest.raises(ValueError, match=f"block of {block} does not divide {channels}"):
        unrotate(torch.ones(2, channels), block)


def test_a_constant_row_is_flattened_by_the_signs() -> None:
    from quamba.transforms import residual_rotation

    rotated = residual_rotation(192, 0).columns(torch.ones(1, 192))
    assert rotated.abs().max() < 4  # sqrt(192) = 13.9 without the random signs
    assert torch.equal(rotated, residual_rotation(192, 0).columns(torch.ones(1, 192)))
    assert not torch.equal(rotated, residual_rotation(192, 1).columns(torch.ones(1, 192)))


@pytest.mark.parametrize("n", [20, 92, 192])
def test_the_rotation_of_the_stream_is_undone(n: int) -> None:
    from quamba.transforms import residual_rotation

    x, rotation = torch.randn(5, n, generator=torch.Generator().manual_seed(n)), residual_rotation(n, 3)
    assert (rotation.undo(rotation.columns(x)) - x).abs().max() < 1e-12
