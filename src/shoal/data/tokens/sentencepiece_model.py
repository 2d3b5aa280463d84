"""
Convert SentencePiece models, BPE and unigram, to the tokenizers library. No torch.

The format: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import hashlib
import importlib
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from shoal.data.tokens.same_ids import check_same_ids
from shoal.errors import DataError

SPACE = "▁"  # the character that replaces a space in a piece
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # SentencePiece.Type
NEVER = 1000.0  # subtracted from the lowest score for pieces that no text may be encoded as


def from_sentencepiece(path: Path) -> tokenizers.Tokenizer:
    """
    Convert the model in this file, and compare its ids with SentencePiece's.

    Raises DataError if the model cannot be converted or any id differs.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; set data.tokenizer") from error
    return tokenizers.Tokenizer.from_str(_converted(content, str(path), hashlib.sha256(content).hexdigest()))


@lru_cache(maxsize=2)  # preparing loads the tokenizer twice
def _converted(content: bytes, name: str, sha256: str) -> str:
    try:
        import sentencepiece

        format_module = importlib.import_module("sentencepiece.sentencepiece_model_pb2")  # it needs protobuf
    except ImportError as error:
        raise DataError(
            f"{name} needs the sentencepiece and protobuf libraries: pip install 'shoal[sentencepiece]'"
        ) from error
    proto = format_module.ModelProto()
    try:
        original = sentencepiece.SentencePieceProcessor(model_proto=content)
        proto.ParseFromString(content)
    except Exception as error:  # RuntimeError, and protobuf's DecodeError
        raise DataError(f"{name} is not a SentencePiece model: {error}; set data.tokenizer") from error
    tokenizer = _convert(proto, name)
    check_same_ids(name, tokenizer, lambda text: list(original.encode(text)))
    text: str = tokenizer.to_str()
    return text


def _convert(proto: Any, name: str) -> tokenizers.Tokenizer:
    """Convert a `ModelProto`. Raises DataError for model types that language models do not use."""
    if proto.trainer_spec.model_type not in (UNIGRAM, BPE) or proto.trainer_spec.treat_whitespace_as_suffix:
        raise DataError(f"{name} is neither a BPE nor a unigram model with spaces in front; set data.tokenizer")
    model = _unigram(proto) if proto.trainer_spec.model_type == UNIGRAM else _bpe(proto)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_splits(proto))
    tokenizer.decoder = _decoder(proto)
    for piece in proto.pieces:
        if piece.type in (UNKNOWN, CONTROL, USER_DEFINED):
            special = piece.type != USER_DEFINED
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=False, special=special)])
    return tokenizer


def _bpe(proto: Any) -> models.BPE:
    """Convert a BPE model. SentencePiece joins neighbors into the best-scoring piece, so each way to build a piece is a merge."""
    ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    parts = {piece.piece for piece in proto.pieces if piece.type == NORMAL}
    merges = []
    for piece in sorted((p for p in proto.pieces if p.type == NORMAL), key=lambda p: -p.score):
        text = piece.piece
        pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        merges += [pair for pair in pairs if pair[0] in parts and pair[1] in parts]
    return models.BPE(
        vocab=ids,
        merges=merges,
        unk_token=_unknown(proto),
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _unigram(proto: Any) -> models.Unigram:
    """Convert a unigram model. Control and byte pieces get a score so low that no text is encoded as them."""
    lowest = min(piece.score for piece in proto.pieces if piece.type == NORMAL)
    vocab = [
        (piece.piece, piece.score if piece.type in (NORMAL, USER_DEFINED) else lowest - NEVER) for piece in proto.pieces
    ]
    unknown = next(index for index, piece in enumerate(proto.pieces) if piece.type == UNKNOWN)
    return models.Unigram(vocab, unknown, proto.trainer_spec.byte_fallback)


def _unknown(proto: Any) -> str:
    return next(str(piece.piece) for piece in proto.pieces if piece.type == UNKNOWN)


def _normalizer(spec: Any) -> normalizers.Sequence:
    steps: list[Any] = []
    # tokenizers applies this map to grapheme clusters, SentencePiece to characters; `check_same_ids` often rejects the result
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _decoder(proto: Any) -> decoders.Sequence:
    steps: list[Any] = [decoders.Replace(SPACE, " ")]
    if proto.trainer_spec.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _splits(proto: Any) -> list[pre_tokenizers.Split]:
    """Return splits that change no ids: between words, so that words are cached; and around reserved characters."""
    splits = []
    between_words = re.compile(f"[^{SPACE}]{SPACE}")
    if not any(between_words.search(piece.piece) for piece in proto.pieces if piece.type in (NORMAL, USER_DEFINED)):
        splits.append(pre_tokenizers.Split(Regex(f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+"), "isolated"))
    known = {character for piece in proto.pieces if piece.type == NORMAL for character in piece.piece}
    reserved = {
        character for piece in proto.pieces if piece.type not in (NORMAL, USER_DEFINED) for character in piece.piece
    }
    if reserved - known:  # otherwise the name of a control piece would score better than its letters
        splits.append(pre_tokenizers.Split(Regex(f"[{re.escape(''.join(sorted(reserved - known)))}]+"), "isolated"))
    return splits
