"""What a linear announces for other kernels to take along: by whom it is seen, and for how long."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from quamba.modules.linear import Linear
from quamba.recipe import LinearSpec
from quamba_kernels.cuda.expansion import ahead, expanded, waiting

CPU = torch.device("cpu")


def weight(outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(outputs, 8, dtype=torch.int32), torch.ones(outputs, 2, dtype=torch.int8)


def test_the_first_kernel_takes_it_and_the_linear_finds_it() -> None:
    one, other = weight(8), weight(16)
    assert not waiting(CPU).y and expanded(one[0]) is None
    with ahead(*one):
        assert expanded(one[0]) is None  # nobody took it
        taken = waiting(CPU)
        codes = expanded(one[0])
        assert codes is not None and codes.shape == (8, 64) and taken.y == codes.data_ptr()
        assert not waiting(CPU).y and expanded(other[0]) is None
    assert expanded(one[0]) is None


def test_the_innermost_is_meant() -> None:
    one, other = weight(8), weight(16)
    with ahead(*one):
        with ahead(*other):
            assert waiting(CPU).O == 16 and expanded(one[0]) is None
        assert waiting(CPU).O == 8


def test_other_devices_and_threads_do_not_see_it() -> None:
    with ahead(*weight(8)), ThreadPoolExecutor(1) as pool:
        assert not waiting(torch.device("meta")).y
        assert not pool.submit(waiting, CPU).result().y
        assert waiting(CPU).y


def test_an_error_inside_ends_it() -> None:
    one = weight(8)
    with pytest.raises(RuntimeError), ahead(*one):
        raise RuntimeError
    assert not waiting(CPU).y


def test_a_linear_of_another_backend_announces_nothing() -> None:
    linear = Linear(64, 32, bias=False, spec=LinearSpec(format="w4a8", group_size=32), dtype=torch.float32)
    with linear.ahead(4096):
        assert not waiting(CPU).y
