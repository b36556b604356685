"""Blocks that take a step together: they give what they give one by one, and only where they may."""

import pytest
import torch

import quamba
from quamba.decoding import Decoder
from quamba.modules import stack
from quamba.modules.mixer import Mixer
from quamba_kernels import OPS
from quamba_kernels.registry import Backend


@pytest.fixture
def calls(monkeypatch):
    """How many layers each call of the op had; its torch body serves here what a GPU's kernel serves there."""
    seen = []

    def run(x, blocks, memories, **options):
        seen.append(len(blocks))
        return OPS["ssd_stack"].reference(x, blocks, memories, **options)

    monkeypatch.setattr(stack, "_backend", lambda block: Backend("counted", run))
    monkeypatch.setattr(Mixer, "_fused", lambda self, op: op.candidates[-1])
    monkeypatch.setenv("QUAMBA_BACKEND", "torch")
    return seen


def logits(model, prompts, steps=4):
    """Of every step behind a prompt."""
    decoder = Decoder(model, capture=False)
    with torch.inference_mode():
        first = decoder.prefill(prompts).clone()
        return [first, *(decoder.step(prompts[:, t % prompts.shape[1]]).clone() for t in range(steps))]


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4a16"])
def test_a_stack_gives_what_its_blocks_give(recipe, stock, calls, monkeypatch):
    folder = stock(recipe, "mamba2")
    prompts = torch.tensor([[3, 1, 4, 1, 5]])
    model = quamba.load(folder, device="cpu")[0]
    together = logits(model, prompts)
    layers = model.config.num_hidden_layers
    assert calls == [layers] * 4
    monkeypatch.setattr(stack, "_backend", lambda block: None)
    alone = logits(quamba.load(folder, device="cpu")[0], prompts)
    assert len(calls) == 4
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_what_is_not_one_token_of_one_sequence_goes_block_by_block(stock, calls):
    model = quamba.load(stock("w4a8", "mamba2"), device="cpu")[0]
    assert len(logits(model, torch.tensor([[3, 1, 4], [1, 5, 9]]))) == 5 and calls == []
    decoder = Decoder(model, capture=False)
    seen = []
    with torch.inference_mode():
        decoder.prefill(torch.tensor([[3, 1, 4]]))
        decoder.step(torch.tensor([1]))
        assert len(calls) == 1
        first = stack._mixer(decoder._stacks[0].blocks[0])
        first.linear("in_proj").input.peek = seen.append
        decoder.step(torch.tensor([5]))
    assert len(calls) == 1 and seen


def test_blocks_of_one_kind_stand_together(stock, calls):
    model = quamba.load(stock("w4a8", "mamba2"), device="cpu")[0]
    found = stack.stacks_of(model)
    assert [len(s.blocks) for s in found] == [model.config.num_hidden_layers]
    with stack.joined(found):
        assert all(block.stack is found[0] for block in found[0].blocks)
    assert all(block.stack is None for block in found[0].blocks)
    assert stack.stacks_of(quamba.load(stock("w4a8", "mamba"), device="cpu")[0]) == []
