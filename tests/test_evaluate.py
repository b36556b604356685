"""Perplexity against a plain computation, decode against prefill, and lm-eval tasks without a network."""

import json
import math

import pytest
import torch
import yaml

from quamba import decoding, embedded, evaluate
from quamba.errors import UserError
from quamba.harness import _clean
from quamba.loading import load

WINDOW = 24
NOUNS = ["cat", "dog", "house", "tree", "server", "file", "word", "book", "day", "name"]


@pytest.fixture(scope="module", params=["mamba1-tiny", "mamba2-tiny"])
def loaded(request):
    return load(request.param, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def mamba2():
    return load("mamba2-tiny", device="cpu", dtype=torch.float32)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(embedded.validation_text().read_text(encoding="utf-8")[:600], encoding="utf-8")
    return path


def plain_perplexity(model, tokenizer, path, window, count):
    """The definition, word for word: window by window, token by token, in float64."""
    ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    losses = []
    for start in range(0, count * window, window):
        piece = ids[start : start + window]
        with torch.no_grad():
            logits = model(torch.tensor([piece])).logits[0].double()
        for position in range(1, window):
            losses.append(-torch.log_softmax(logits[position - 1], dim=-1)[piece[position]].item())
    return math.exp(sum(losses) / len(losses)), len(losses)


@pytest.mark.parametrize("batch_size", [1, 2, 500])
def test_perplexity_is_its_definition(loaded, text, batch_size):
    found = evaluate.perplexity(*loaded, text, window=WINDOW, max_windows=3, batch_size=batch_size)
    value, tokens = plain_perplexity(*loaded, text, WINDOW, 3)
    assert found["file"] == str(text)
    assert (found["windows"], found["tokens"]) == (3, tokens)
    assert found["value"] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_stepwise_is_prefill(loaded, text, batch_size):
    prefill = evaluate.perplexity(*loaded, text, window=WINDOW, max_windows=3)
    stepwise = evaluate.perplexity(*loaded, text, window=WINDOW, max_windows=3, stepwise=True, batch_size=batch_size)
    assert stepwise["value"] == pytest.approx(prefill["value"], rel=1e-4)
    assert stepwise["tokens"] == prefill["tokens"]


def test_loss_in_chunks_is_the_loss(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(63, 50, generator=generator), torch.randint(50, (63,), generator=generator)
    whole = evaluate._loss(logits, targets)
    monkeypatch.setattr(evaluate, "LOSS_CHUNK", 500)
    assert evaluate._loss(logits, targets).item() == pytest.approx(whole.item(), rel=1e-12)
    assert whole.dtype == torch.float64


def test_incomplete_tail_is_dropped(mamba2, text):
    length = len(mamba2[1](text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])
    window = length // 2 - 1  # two windows and a tail of at least two tokens
    assert evaluate.perplexity(*mamba2, text, window=window)["windows"] == 2
    assert evaluate.perplexity(*mamba2, text, window=length)["windows"] == 1


@pytest.mark.parametrize("stepwise", [False, True])
def test_progress_ends_with_all_windows(mamba2, text, stepwise):
    calls = []
    evaluate.perplexity(
        *mamba2, text, window=8, max_windows=3, stepwise=stepwise, batch_size=2, progress=lambda *a: calls.append(a)
    )
    assert calls[-1] == ("perplexity", 3, 3)
    assert calls == sorted(calls)


@pytest.mark.parametrize(
    ("content", "options", "sentence"),
    [
        (None, {}, "There is no text file"),
        ("", {}, "holds no text"),
        (" \n\n ", {}, "holds no text"),
        (b"\xff\xfe\x00", {}, "not UTF-8"),
        ("a few words", {"window": 64}, "fewer than one window of 64"),
        ("a few words", {"window": 1}, "at least 2 tokens"),
        ("a few words", {"window": 2, "max_windows": 0}, "At least 1 window"),
        ("a few words", {"window": 2, "batch_size": 0}, "batch size is at least 1"),
    ],
)
def test_mistakes_are_told_in_a_sentence(mamba2, tmp_path, content, options, sentence):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=sentence):
        evaluate.perplexity(*mamba2, path, **options)


def test_model_without_a_cache_cannot_step(mamba2, text, monkeypatch):
    monkeypatch.setattr(decoding, "CACHE_NAMES", ("memory",))
    with pytest.raises(UserError, match="returns no cache"):
        evaluate.perplexity(*mamba2, text, window=8, max_windows=1, stepwise=True)


@pytest.fixture
def tasks_path(tmp_path, monkeypatch):
    """A directory with the task `pairs` over ten minimal pairs and the group `all_pairs`."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    data = tmp_path / "pairs.jsonl"
    pairs = [{"sentence_good": f"The {noun} is here.", "sentence_bad": f"The {noun} are here is."} for noun in NOUNS]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    task = {
        "task": "pairs",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(data), "cache_dir": str(tmp_path / "cache")},
        "validation_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    group = {"group": "all_pairs", "task": ["pairs"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "pairs.yaml").write_text(yaml.safe_dump(task))
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(group))
    return tmp_path


def plain_accuracy(model, tokenizer, pairs):
    """The share of pairs whose good sentence has the larger log-likelihood after the first token of all texts."""

    def likelihood(sentence):
        ids = [tokenizer.bos_token_id, *tokenizer(sentence, add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            logs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
        return sum(logs[at, wanted].item() for at, wanted in enumerate(ids[1:]))

    return sum(likelihood(p["sentence_good"]) > likelihood(p["sentence_bad"]) for p in pairs) / len(pairs)


def test_tasks_run_from_local_files(mamba2, tasks_path):
    pairs = [json.loads(line) for line in (tasks_path / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    found = evaluate.tasks(*mamba2, ["all_pairs"], tasks_path=tasks_path, batch_size=4)
    assert set(found) == {"all_pairs", "pairs"}
    assert found["pairs"]["acc"] == pytest.approx(plain_accuracy(*mamba2, pairs))
    assert found["all_pairs"]["acc"] == found["pairs"]["acc"]
    assert set(found["pairs"]) <= {"acc", "acc_stderr"}
    assert set(evaluate.tasks(*mamba2, ["pairs"], tasks_path=tasks_path, limit=3)) == {"pairs"}


def test_local_tasks_do_not_wait_for_the_built_in_ones(tasks_path):
    assert evaluate.find_tasks(["all_pairs"], tasks_path).all_tasks == ["all_pairs", "pairs"]


def test_task_mistakes_are_told_in_a_sentence(mamba2, tasks_path):
    with pytest.raises(UserError, match="no directory"):
        evaluate.find_tasks(["pairs"], tasks_path / "missing")
    with pytest.raises(UserError, match="limit of documents"):
        evaluate.tasks(*mamba2, ["pairs"], tasks_path=tasks_path, limit=0)
    with pytest.raises(UserError, match="Duplicate task 'pairs'"):
        evaluate.tasks(*mamba2, ["pairs", "all_pairs"], tasks_path=tasks_path)
    (tasks_path / "pairs.jsonl").unlink()
    with pytest.raises(UserError, match="data of pairs cannot be had"):
        evaluate.tasks(*mamba2, ["pairs"], tasks_path=tasks_path)


def test_metrics_lose_the_default_filter_and_what_is_no_number():
    metrics = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": "N/A", "f1,none": math.nan, "exact_match,strict": 1}
    assert _clean(metrics) == {"acc": 0.5, "exact_match@strict": 1.0}


def test_a_loss_that_is_no_number_is_an_error(text):
    model, tokenizer = load("mamba2-tiny", device="cpu", dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = math.nan
    with pytest.raises(UserError, match=r"the loss on .*text.txt' is not a number: activations .* torch.float32"):
        evaluate.perplexity(model, tokenizer, text, window=WINDOW, max_windows=2)
