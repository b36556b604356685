"""Decoding: what is captured equals what is not, token for token; sampling; the end of a text."""

import gc
from threading import Thread

import pytest
import torch
from transformers import AutoConfig

import quamba
from architectures import OWN, PLAIN
from quamba import generation
from quamba.bench import materialise
from quamba.bench.request import TransformersRequest
from quamba.decoding import Captured, Continuation, Decoder
from quamba.errors import UserError
from quamba.generation import Generator
from quamba.models import ARCHITECTURES, describe
from quamba.modules.likeliest import likeliest
from quamba.modules.mixer import Mixer
from quamba.modules.norm import LastNorm
from quamba.modules.state import Deferred, RecurrentState, deferred
from quamba.recipe import load_recipe
from quamba.sampling import Sampler
from quamba_kernels import Backend, ops


def eager(model, **options):
    """A generator on the CPU, which captures nothing unless the graphs are faked."""
    return Generator(model, **options)


def all_tokens(generator, ids, **options):
    return torch.cat(list(generator.pieces(ids, **options)), 1)


@pytest.fixture(scope="module")
def prompts():
    return torch.randint(0, 96, (2, 5), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=[*OWN, "gated_deltaproduct", "rwkv7"])
def quantised(request, stock, prompts):
    """On the torch bodies, which run on every device; a backend of the CPU may read values on the host."""
    model = quamba.load(stock("w4a8", request.param), device="cpu")[0]
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setenv("QUAMBA_BACKEND", "torch")
        model(prompts)  # binds
    return model


@pytest.mark.parametrize("options", [{}, {"temperature": 20.0, "top_p": 0.9, "seed": 3}], ids=["greedy", "sampled"])
def test_captured_tokens_equal_eager_ones(quantised, prompts, graphs, options, monkeypatch):
    captured = Generator(quantised)
    first = all_tokens(captured, prompts, max_new_tokens=12, **options)
    again = all_tokens(captured, prompts, max_new_tokens=12, **options)
    assert len(graphs) == 1 and graphs[0].calls
    monkeypatch.undo()
    wanted = all_tokens(eager(quantised), prompts, max_new_tokens=12, **options)
    assert torch.equal(first, wanted) and torch.equal(again, wanted)
    assert not options or wanted.unique().numel() > 12


def test_greedy_tokens_are_those_of_transformers(quantised, prompts):
    wanted = quantised.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    torch.testing.assert_close(all_tokens(eager(quantised), prompts, max_new_tokens=6), wanted[:, 5:])


def test_the_last_norm_of_a_prompt_is_that_of_the_last_token(quantised, prompts):
    """And of all tokens again for whoever calls the model itself, whatever has become of a prefill."""
    sizes = []
    norm = quantised.get_submodule(describe(quantised.config).final_norm)
    hook = norm.register_forward_hook(lambda module, given, result: sizes.append(result.shape[1]))
    try:
        with torch.inference_mode():
            logits = Decoder(quantised).prefill(prompts)
            whole = quantised(prompts).logits
            with pytest.raises(IndexError):
                Decoder(quantised).prefill(prompts + quantised.config.vocab_size)
            again = quantised(prompts, logits_to_keep=2).logits
    finally:
        hook.remove()
    last = 1 if isinstance(norm, LastNorm) else prompts.shape[1]  # a layer norm is transformers' own
    assert sizes == [last, prompts.shape[1], prompts.shape[1]]
    assert torch.equal(logits, whole[:, -1]) and torch.equal(again, whole[:, -2:])


def test_a_prompt_stores_the_states_of_several_layers_together(quantised, prompts, monkeypatch):
    """Where a backend can: as many as are allowed, the rest at the end; at once for whoever calls the model itself."""
    mixers = [module for module in quantised.modules() if isinstance(module, Mixer)]
    if not mixers:
        pytest.skip("its recurrences store their own states")
    stored = []

    def several(h, state, scale=None, rng=None):
        stored.append(len(h))
        ops.quantize_states(h, state, scale, rng)

    def states(decoder):
        layers = [layer for cache in decoder.cache.values() for layer in cache.layers]
        kept = [(s.recurrent, s.scale, s.rng) for s in layers if isinstance(s, RecurrentState)]
        return [part for parts in kept for part in parts if part is not None]

    with torch.inference_mode():
        alone = Decoder(quantised)
        wanted = alone.prefill(prompts)
        for mixer in mixers:
            monkeypatch.setattr(mixer, "_quantize_state", Backend("other", ops.quantize_state.reference))
            monkeypatch.setattr(mixer, "_quantize_states", Backend("other", several))
        count = len(mixers)
        for layers, size, launches in ((16, 2**26, [count]), (2, 2**26, [2] * (count // 2) + [1] * (count % 2)),
                                       (16, 1, [1] * count)):  # fmt: skip
            monkeypatch.setattr(Deferred, "LAYERS", layers)
            monkeypatch.setattr(Deferred, "BYTES", size)
            decoder = Decoder(quantised)
            for _ in range(2):  # the second clears what the first left
                stored.clear()
                assert torch.equal(decoder.prefill(prompts), wanted) and stored == launches
                assert all(map(torch.equal, states(decoder), states(alone)))
        stored.clear()
        with pytest.raises(IndexError):
            decoder.prefill(prompts + quantised.config.vocab_size)
        assert torch.equal(quantised(prompts, use_cache=True).logits[:, -1], wanted) and not stored


def test_what_a_prompt_asks_of_modules_is_not_asked_by_other_threads(quantised, prompts):
    """Of one model at the same time: all logits for whoever calls it, and its states at once."""
    first = describe(quantised.config).blocks[0].path
    found = []

    def meanwhile(module, given):
        handle.remove()  # once, in the middle of the prompt
        thread = Thread(target=lambda: found.append((quantised(prompts).logits.shape[1], deferred())))
        thread.start()
        thread.join()
        found.append(deferred() is not None)

    handle = quantised.get_submodule(first).register_forward_pre_hook(meanwhile)
    with torch.inference_mode():
        Decoder(quantised).prefill(prompts)
    assert found == [(prompts.shape[1], None), True] and deferred() is None


def test_padded_prompts_of_a_batch_give_what_they_give_alone(quantised, prompts):
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.int64), prompts[:1, :3]], 1)
    batch, mask = torch.cat([padded, prompts[1:]]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    got = all_tokens(eager(quantised), batch, mask=mask, max_new_tokens=1)
    assert got[0, 0] == all_tokens(eager(quantised), prompts[:1, :3], max_new_tokens=1)[0, 0]


def test_decoder_replays_what_it_would_have_computed(quantised, prompts, graphs, monkeypatch):
    with torch.inference_mode():
        decoder = Decoder(quantised)
        got = [decoder.step(prompts[:, t % 5]).clone() for t in range(8)]
        assert decoder.captured.replays and len(graphs) == 1
        monkeypatch.undo()
        plain = Decoder(quantised, capture=False)
        assert all(torch.equal(a, plain.step(prompts[:, t % 5])) for t, a in enumerate(got))


def test_a_cache_that_grows_is_never_captured(quantised, prompts, graphs, monkeypatch):
    monkeypatch.setattr(Decoder, "static", property(lambda self: False))
    with torch.inference_mode():
        text = Continuation(quantised, 2, room=9)
        text.begin(prompts)
        for _ in range(8):
            text.step()
    assert not graphs


@pytest.mark.parametrize("model_type", PLAIN)
def test_a_cache_that_grows_gives_the_tokens_of_transformers_again_and_again(model_type, prompts, graphs):
    config = AutoConfig.for_model(model_type, **ARCHITECTURES[model_type].tiny[0])
    model = materialise.build(config, load_recipe("w4a16"), torch.float32, torch.device("cpu"))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    generator = Generator(model)
    for given in (torch.ones_like(mask), mask):
        wanted = model.generate(prompts * given, attention_mask=given, **options)[:, 5:]
        for _ in range(2):
            got = all_tokens(generator, prompts * given, mask=given if given is mask else None, max_new_tokens=5)
            assert torch.equal(got, wanted)
    assert not graphs


def test_a_step_reads_nothing_on_the_host(graphs):
    x = torch.ones(1)
    step = Captured(lambda: x.add_(1).item(), capture=True, eager=0)
    with pytest.raises(RuntimeError, match="read on the host"):
        step()


@pytest.mark.parametrize("every", [1, 3, 8])
def test_a_text_ends_where_all_sequences_have_stopped(quantised, prompts, every, monkeypatch):
    free = all_tokens(eager(quantised), prompts, max_new_tokens=10)
    monkeypatch.setattr(generation, "CHECK_EVERY", every)
    monkeypatch.setattr(generation, "torch", torch)
    stop = [int(free[0, 2]), int(free[1, 5])]
    got = all_tokens(eager(quantised, stop=stop, pad=77), prompts, max_new_tokens=10)
    ends = [min(int((row == s).nonzero()[0]) for s in stop if (row == s).any()) for row in free]
    assert got.shape[1] == max(ends) + 1
    for row, wanted, end in zip(got, free, ends, strict=True):
        assert torch.equal(row[: end + 1], wanted[: end + 1]) and (row[end + 1 :] == 77).all()


def test_last_counts_tokens_of_a_late_look():
    generator = Generator(None, stop=[9])
    done = torch.tensor([True, True])
    assert generator._last(done, torch.tensor([[1, 9, 0, 0], [9, 0, 0, 0]]), False) == 2
    assert generator._last(done, torch.tensor([[0, 0], [3, 9]]), False) == 2
    assert generator._last(torch.tensor([True, False]), torch.tensor([[9, 0], [1, 2]]), False) is None
    assert generator._last(torch.tensor([True, False]), torch.tensor([[9, 0], [1, 2]]), True) == 2


def test_sampling_follows_the_probabilities_and_the_nucleus():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(20000, 1)
    drawn = Sampler(1.0, seed=5)(logits).bincount(minlength=4) / 20000
    torch.testing.assert_close(drawn, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.015, rtol=0)
    kept = Sampler(1.0, 0.7, seed=5)(logits[:, [3, 0, 2, 1]]).bincount(minlength=4) / 20000
    torch.testing.assert_close(kept, torch.tensor([0, 0.625, 0, 0.375]), atol=0.015, rtol=0)
    cold = Sampler(1e-3, seed=5)(logits)
    assert torch.equal(cold, torch.zeros_like(cold))
    assert torch.equal(Sampler(1.0, 0.01)(logits), cold)


def test_sampling_draws_anew_and_again_by_its_seed():
    logits = torch.zeros(3, 500)
    sampler = Sampler(1.0, seed=1)
    draws = [sampler(logits) for _ in range(3)]
    assert len({int(d) for row in draws for d in row}) > 6
    sampler.restart(1)
    assert all(torch.equal(a, sampler(logits)) for a in draws)
    sampler.restart(2)
    assert not torch.equal(draws[0], sampler(logits))


def test_a_model_that_keeps_states_in_its_modules_decodes_and_begins_anew(stock, prompts):
    """It takes a cache and returns none; a prompt of one token is to it what a step is."""
    model = quamba.load(stock("w8a8", "recurrent_gemma"), device="cpu")[0]
    with torch.inference_mode():
        wanted = model(prompts, use_cache=False).logits
        decoder = Decoder(model)
        for first in (3, 1, 1, 4):
            steps = [decoder.prefill(prompts[:, :first])] + [decoder.step(ids) for ids in prompts[:, first:].unbind(1)]
            assert torch.allclose(torch.stack(steps, 1), wanted[:, first - 1 :], atol=1e-5), first
    with pytest.raises(UserError, match="RecurrentGemmaForCausalLM keeps states in its modules, so they cannot be"):
        TransformersRequest(model, prompts, 4).prefill()


@pytest.mark.parametrize("vocab", [50280, 50288, 256000, 503, 40])
def test_the_likeliest_token_is_the_first_of_the_largest_logits(vocab: int) -> None:
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(vocab)).round(decimals=1)
    logits[1] = 0.0
    logits[2, -1] = 100.0
    first = [int((row == row.max()).nonzero()[0]) for row in logits]
    assert likeliest(logits).tolist() == first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU records graphs")
def test_a_graph_is_recorded_while_an_older_one_is_garbage() -> None:
    x = torch.ones(8, device="cuda")

    def run() -> torch.Tensor:
        gc.set_threshold(1, 1, 1)
        kept = [[i] for i in range(1000)]  # collections, unless something prevents them
        return x + len(kept)

    threshold = gc.get_threshold()
    gc.set_threshold(0)
    try:
        older = Captured(lambda: x + 1, capture=True, eager=0)
        older()
        older.run = older.__call__  # a cycle, which only a collection frees
        del older
        assert Captured(run, capture=True, eager=0)().tolist() == [1001.0] * 8
    finally:
        gc.set_threshold(*threshold)
