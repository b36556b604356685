"""Fixtures that more than one file of tests needs."""

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that is handed out unwritten holds NaN (or a large integer), so that a result that lacks a write shows."""

    def poisoned(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
            elif tensor.dtype not in (torch.bool, torch.uint8):
                tensor.fill_(torch.iinfo(tensor.dtype).max)
            return tensor

        return made

    for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty",))):
        for name in names:
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    yield
