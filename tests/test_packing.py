"""The bit layout on disk."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quamba.packing import pack_int4, unpack_int4
from quamba_kernels.backends.cpu import contract, expand
from quamba_kernels.ops.linear import expand_two_level


def codes(low: int, high: int):
    """int8 [O, K] with K a multiple of 8."""
    sizes = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**31))

    def draw(size: tuple[int, int, int]) -> torch.Tensor:
        rng = torch.Generator().manual_seed(size[2])
        return torch.randint(low, high + 1, (size[0], 8 * size[1]), generator=rng, dtype=torch.int8)

    return sizes.map(draw)


@given(codes(-8, 7))
def test_unpack_undoes_pack(values: torch.Tensor) -> None:
    packed = pack_int4(values)
    assert packed.dtype == torch.int32 and packed.shape == (values.shape[0], values.shape[1] // 8)
    assert torch.equal(unpack_int4(packed), values)


def test_bytes_are_those_of_the_format() -> None:
    # low nibble first, stored with +8: the layout of compressed-tensors' pack-quantized
    values = torch.tensor([[-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7]], dtype=torch.int8)
    assert bytes(pack_int4(values).numpy().tobytes()).hex() == "1032547698badcfe"
    assert pack_int4(torch.zeros(1, 8, dtype=torch.int8)).item() == -2004318072  # 0x88888888


@pytest.mark.parametrize("bad", [-9, 8, 127, -128])
def test_codes_out_of_range_are_refused(bad: int) -> None:
    values = torch.zeros(2, 8, dtype=torch.int8)
    values[1, 3] = bad
    with pytest.raises(ValueError, match=rf"lie in \[-8, 7\], got .*{bad}"):
        pack_int4(values)


@pytest.mark.parametrize("features", [1, 7, 12])
def test_part_of_a_word_is_refused(features: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of 8 input features, got {features}"):
        pack_int4(torch.zeros(2, features, dtype=torch.int8))


@given(codes(-7, 7), st.integers(0, 2**31))
@settings(max_examples=50)
def test_two_levels_stay_inside_int8_and_contract_back(values: torch.Tensor, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    multiplier = torch.randint(1, 18, (values.shape[0], values.shape[1] // 8), generator=rng, dtype=torch.int8)
    scale = torch.rand(values.shape[0], generator=rng)
    packed = pack_int4(values)
    expanded = expand_two_level(packed, multiplier)
    wide = values.unflatten(1, (-1, 8)).long() * multiplier.unsqueeze(-1)
    assert wide.abs().max() <= 127 and torch.equal(expanded.long(), wide.flatten(1))
    again, _, _ = contract(expand((packed, multiplier, scale)))
    assert torch.equal(again, packed)
