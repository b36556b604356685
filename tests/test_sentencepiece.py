"""SentencePiece files as transformers tokenizers, compared with SentencePiece itself."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from quamba import embedded, layouts, sentencepiece
from quamba.errors import UserError
from quamba.tokenizer import open_tokenizer, texts

pytest.importorskip("google.protobuf")
original = pytest.importorskip("sentencepiece")

PLAIN = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
KINDS = {
    "bpe": {"model_type": "bpe", **PLAIN, "split_digits": True},
    "bpe-normalised": {"model_type": "bpe", "byte_fallback": True, "pad_id": 3, "bos_id": -1},
    "bpe-unprefixed": {"model_type": "bpe", **PLAIN, "add_dummy_prefix": False},
    "bpe-defined": {"model_type": "bpe", **PLAIN, "user_defined_symbols": ["<X>", "\n"]},
    "unigram": {"model_type": "unigram", "byte_fallback": True},
}
SPECIAL = ["", "Hello  the world\nnew line\t tab é 漢字 ﬁ", "trail  ", "x<X>y <X> z", "1234 5.6", "naïve café"]
LEADING = ["  lead", " ", "   ", "\n\na"]


@pytest.fixture(scope="module")
def samples():
    text = embedded.validation_text().read_text(encoding="utf-8")
    return SPECIAL + [text[i : i + 211].lstrip() for i in range(0, 40_000, 1000)]


@pytest.fixture(scope="module", params=sorted(KINDS))
def model(request, tmp_path_factory):
    """(kind, file) of a model of 600 pieces."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    lines = embedded.calibration_text().read_text(encoding="utf-8")[:40_000].splitlines()
    prefix = folder / "pieces"
    original.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(prefix), vocab_size=600, minloglevel=2, **KINDS[request.param]
    )
    return request.param, prefix.with_suffix(".model")


def test_ids_and_texts_are_those_of_sentencepiece(model, samples):
    kind, file = model
    theirs, ours = original.SentencePieceProcessor(model_file=str(file)), sentencepiece.read(file)
    for text in samples + (LEADING if kind != "bpe-defined" else []):
        ids = theirs.encode(text)
        assert ours(text)["input_ids"] == ids, text
        assert ours.decode(ids) == theirs.decode(ids)
    for name in ("unk", "bos", "eos", "pad"):
        found = getattr(ours, f"{name}_token_id")
        assert (-1 if found is None else found) == getattr(theirs, f"{name}_id")()


def test_a_saved_one_is_the_same_without_the_file(model, samples, tmp_path):
    _, file = model
    ours = open_tokenizer(tmp_path, layouts.LAYOUTS["megatron"], file)
    for name, text in texts(tmp_path, ours).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(samples)["input_ids"] == ours(samples)["input_ids"] and again.eos_token_id == ours.eos_token_id


def test_a_file_beside_the_weights_is_found(model, tmp_path):
    _, file = model
    (tmp_path / "pieces.model").write_bytes(file.read_bytes())
    assert len(open_tokenizer(tmp_path, layouts.LAYOUTS["megatron"])) == 600


def test_what_is_no_model_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "pieces.model"
    for content in (b"", b"not a model at all"):
        file.write_bytes(content)
        with pytest.raises(UserError, match="is no SentencePiece model"):
            sentencepiece.read(file)

    def missing():
        raise ImportError

    monkeypatch.setattr(sentencepiece, "import_protobuf", missing)
    with pytest.raises(UserError, match=r"pip install quamba\[sentencepiece\]"):
        sentencepiece.read(file)
