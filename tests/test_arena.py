"""Tensors that share large blocks of memory."""

from pathlib import Path

import pytest
import torch

from quamba import arena
from quamba.loading import load


def storages(tensors: list[torch.Tensor]) -> int:
    return len({t.untyped_storage().data_ptr() for t in tensors})


def test_values_types_and_alignment_stay() -> None:
    made = [torch.arange(n, dtype=kind).reshape(shape) for n, kind, shape in (
        (6, torch.int8, (2, 3)), (1000, torch.float32, (10, 100)), (1, torch.int64, ()), (7, torch.bfloat16, (7,)),
    )]  # fmt: skip
    want = [t.clone() for t in made]
    arena.into_blocks(made)
    assert storages(made) == 1
    for got, was in zip(made, want, strict=True):
        assert got.dtype == was.dtype and got.is_contiguous() and torch.equal(got, was)
        assert (got.data_ptr() - made[0].data_ptr()) % arena.ALIGNMENT == 0


def test_a_block_holds_what_fits_and_a_larger_tensor_stays() -> None:
    made = [torch.full((n,), i, dtype=torch.uint8) for i, n in enumerate((512, 512, 1, 4096, 512))]
    large = made[3].data_ptr()
    arena.into_blocks(made, block=1024)
    assert storages(made) == 3 and storages(made[:2]) == 1 and made[3].data_ptr() == large
    assert [int(t[0]) for t in made] == [0, 1, 2, 3, 4]


def test_what_was_one_tensor_stays_one() -> None:
    table = torch.randn(8, 4)
    head, other = table.view(8, 4), torch.randn(3)
    arena.into_blocks([table, other, head])
    table[0] = 7
    assert torch.equal(head, table)


def test_views_and_empty_tensors_are_left_alone() -> None:
    wide = torch.randn(4, 8)
    across, empty = wide.T, torch.empty(0)
    arena.into_blocks([across, empty])
    assert across.data_ptr() == wide.data_ptr() and empty.numel() == 0


@pytest.mark.parametrize("model_type", ["mamba", "mamba2"])
def test_a_model_in_blocks_answers_and_is_saved_as_before(model_type: str, stock, tmp_path: Path) -> None:
    path = stock("w4a8", model_type)
    model, _ = load(path, device="cpu", dtype=torch.float32)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        want = model(ids).logits
    for module in model.modules():
        if hasattr(module, "unbind"):
            module.unbind()
    arena.into_blocks([*model.parameters(), *model.buffers()])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, want)
    model.save_pretrained(tmp_path)
    again, _ = load(tmp_path, tokenizer=path, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, want)


def test_tensors_on_a_cpu_keep_their_own_memory() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    before = [p.data_ptr() for p in model.parameters()]
    arena.settle(model)
    assert [p.data_ptr() for p in model.parameters()] == before


def test_a_model_loaded_in_inference_mode_answers(tiny_checkpoint) -> None:
    folder, _ = tiny_checkpoint("mamba2")
    ids = torch.arange(10)[None]
    with torch.inference_mode():
        model, _ = load(folder, device="cpu", dtype=torch.float32)
        want = model(ids).logits
        for module in model.modules():
            if hasattr(module, "unbind"):
                module.unbind()
        arena.into_blocks([*model.parameters(), *model.buffers()])
        assert torch.equal(model(ids).logits, want)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, want)
