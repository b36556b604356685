"""Whole quantised models on a GPU: their logits beside the CPU's, captured tokens beside eager ones.

Where a value lies on the edge between two codes its last bit decides, and what that changes grows from layer to layer:
noise of 1e-5 after each linear moves the logits of these models by 0.4 to 1.7%. So the CPU's own logits with such noise
say how near those of the GPU can be. It is a coarse measure, for what lies between operators, which have their own
tests: an A twice as large in one layer is 1.6 to 7 times as far away, one layer without D 15 to 52 times.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoTokenizer

import quamba
from quamba import embedded
from quamba.decoding import Decoder
from quamba.generation import Generator
from quamba.modules.linear import Linear
from quamba_kernels.testing import error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

BATCH, TOKENS, STEPS = 4, 257, 16
ROUNDING = 1e-5
"""What stands for rounding in another order, relative to each output of a linear."""
ALLOWED = 1.5


class Pair(NamedTuple):
    """The same directory on both devices, and prompts for it, ids [BATCH, TOKENS]."""

    cpu: Any
    gpu: Any
    ids: torch.Tensor


@pytest.fixture(
    scope="module", params=[(m, r) for m in embedded.names() for r in ("w8a8", "w4a8", "w4a16")], ids="-".join
)
def pair(request: pytest.FixtureRequest, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    name, recipe = request.param
    checkpoint, output = embedded.checkpoint(name), tmp_path_factory.mktemp(name) / recipe
    made = quamba.quantize(checkpoint, recipe, output, calibration_text=text, samples=8, seqlen=128, device="cpu")
    words = embedded.validation_text().read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(checkpoint)(words, return_tensors="pt").input_ids[0, : BATCH * TOKENS]
    cpu, gpu = (quamba.load(made.output, device=device)[0] for device in ("cpu", "cuda"))
    return Pair(cpu, gpu, ids.view(BATCH, TOKENS))


@contextmanager
def rounded_otherwise(model: Any) -> Iterator[None]:
    """Inside, outputs of linears are off by ROUNDING."""
    random = torch.Generator().manual_seed(0)

    def disturb(module: Any, given: Any, result: torch.Tensor) -> torch.Tensor:
        return result * (1 + ROUNDING * torch.randn(result.shape, generator=random))

    hooks = [m.register_forward_hook(disturb) for m in model.modules() if isinstance(m, Linear)]
    assert hooks
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def whole(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits [BATCH, TOKENS, V] of all tokens at once."""
    return model(ids.to(model.device)).logits.float().cpu()


def by_and_by(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits [BATCH, 2 + STEPS, V]: after a prompt, after a second piece, and after each token of the rest."""
    ids, end = ids.to(model.device), ids.shape[1] - STEPS
    decoder = Decoder(model)
    logits = [decoder.prefill(ids[:, :130]), decoder.forward(ids[:, 130:end])]
    logits += [decoder.step(ids[:, end + i]).clone() for i in range(STEPS)]
    assert model.device.type == "cpu" or decoder.captured.replays
    return torch.stack([part.float().cpu() for part in logits], 1)


@pytest.mark.parametrize("schedule", [whole, by_and_by])
def test_logits_are_as_near_as_rounding_lets_them_be(pair: Pair, schedule: Any) -> None:
    with torch.inference_mode():
        wanted, got = schedule(pair.cpu, pair.ids), schedule(pair.gpu, pair.ids)
        with rounded_otherwise(pair.cpu):
            apart = error(schedule(pair.cpu, pair.ids), wanted)
    assert error(got, wanted) < ALLOWED * apart


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "top_p": 0.9, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch", [1, BATCH])
def test_captured_tokens_equal_eager_ones(pair: Pair, batch: int, options: dict[str, Any]) -> None:
    ids = pair.ids[:batch, :40].cuda()

    def tokens(capture: bool) -> torch.Tensor:
        pieces = Generator(pair.gpu, capture=capture).pieces(ids, max_new_tokens=40, **options)
        return torch.cat(list(pieces), 1)

    wanted = tokens(False)
    assert wanted.unique().numel() > 12
    assert torch.equal(tokens(True), wanted)
