"""A SentencePiece model file as a transformers tokenizer, so that it is saved like any other.

The settings of the file are followed (charsmap, extra spaces, prefix, byte fallback), and no token is added to a text.
Ids differ from SentencePiece's own where a text spells out a control piece such as </s>, which becomes that token, and,
in a model with user-defined symbols, at the start of a text that begins with a space or such a symbol.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf

from quamba.errors import UserError

NORMAL, CONTROL, DEFINED = 1, 3, 4
SPACE = "\u2581"


def read(file: Path) -> PreTrainedTokenizerFast:
    """Raises UserError for a file that is no SentencePiece model, for a kind of model that is not supported, and where
    protobuf is not installed."""
    proto = _parse(file)
    trained, pieces = proto.trainer_spec, proto.pieces
    build = {1: _unigram, 2: _bpe}.get(trained.model_type)
    if build is None or trained.treat_whitespace_as_suffix:
        raise UserError(f"{file} is a SentencePiece model of a kind that is not read; unigram and bpe are")
    tokenizer = Tokenizer(build(proto))
    defined = any(piece.type == DEFINED for piece in pieces)
    prefix = proto.normalizer_spec.add_dummy_prefix
    tokenizer.normalizer = normalizers.Sequence(list(_normalizers(proto.normalizer_spec, prefix and not defined)))
    if prefix and defined:
        # defined symbols cut a text into stretches, of which only the first gets the prefix
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "first", split=False)
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    spaced = decoders.Replace(SPACE, " ")
    tokenizer.decoder = decoders.Sequence([spaced, decoders.ByteFallback(), decoders.Fuse(), *strip])
    tokenizer.add_special_tokens([AddedToken(p.piece, normalized=False) for p in pieces if p.type == CONTROL])
    tokenizer.add_tokens([AddedToken(p.piece, normalized=False) for p in pieces if p.type == DEFINED])
    named = {"unk": trained.unk_id, "bos": trained.bos_id, "eos": trained.eos_id, "pad": trained.pad_id}
    tokens = {f"{name}_token": pieces[i].piece for name, i in named.items() if 0 <= i < len(pieces)}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, name_or_path=str(file), **tokens
    )


def _parse(file: Path) -> Any:
    try:
        proto = import_protobuf().ModelProto()
    except ImportError:
        raise UserError(f"{file} needs protobuf to be read: pip install quamba[sentencepiece]") from None
    from google.protobuf.message import DecodeError

    try:
        proto.ParseFromString(file.read_bytes())
    except (DecodeError, OSError) as error:
        raise UserError(f"{file} is no SentencePiece model that can be read: {error}") from None
    if not proto.pieces:
        raise UserError(f"{file} is no SentencePiece model: it holds no pieces")
    return proto


def _normalizers(rules: Any, prefix: bool) -> Any:
    if rules.precompiled_charsmap:
        yield normalizers.Precompiled(rules.precompiled_charsmap)
    if rules.remove_extra_whitespaces:
        yield normalizers.Strip()
        yield normalizers.Replace(Regex(" {2,}"), " ")
    if prefix:
        yield normalizers.Prepend(SPACE)
    if rules.escape_whitespaces:
        yield normalizers.Replace(" ", SPACE)


def _unigram(proto: Any) -> models.Unigram:
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    return models.Unigram(scores, proto.trainer_spec.unk_id, proto.trainer_spec.byte_fallback)


def _bpe(proto: Any) -> models.BPE:
    """SentencePiece joins the two neighbours whose union scores best; a merge is every way to cut a piece in two."""
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    merges = []
    for piece in sorted(normal, key=lambda piece: (-normal[piece], ids[piece])):
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += [cut for cut in cuts if cut[0] in normal and cut[1] in normal]
    unknown = proto.pieces[proto.trainer_spec.unk_id].piece
    return models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=proto.trainer_spec.byte_fallback)
