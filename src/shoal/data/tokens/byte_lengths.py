"""
The raw bytes of each token, to count the bytes of a text from its tokens alone. No torch.

Some tokens of a byte-level vocabulary are part of a character and have no text of their own, so decoding them one by one
would count wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.data.tokens.byte_level import byte_characters
from shoal.data.tokens.tokenize import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_JOINED = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}  # decoders that keep each token's text


@dataclass(frozen=True)
class ByteLengths:
    """
    The bytes of text of each token id.

    of: [vocab_size]; 0 for special tokens and for those that begin and end documents. after_space: [vocab_size], whether the token
    begins with a space. drops_space: whether decoding drops the space before a document, which the tokenizer added.
    """

    of: npt.NDArray[np.int32]
    after_space: npt.NDArray[np.bool_]
    drops_space: bool


def byte_lengths(tokenizer: Tokenizer) -> ByteLengths:
    """Return the table of a tokenizer, from its vocabulary and its decoder."""
    vocab = tokenizer.pieces()
    length, joins = _length_of(tokenizer)
    # a tokenizer.json may have its end-of-text token in the vocabulary only, so that it is not a special token
    special = tokenizer.special_ids | {tokenizer.eot_id, tokenizer.bos_id}
    of, after_space = np.zeros(tokenizer.vocab_size, np.int32), np.zeros(tokenizer.vocab_size, np.bool_)
    for piece, index in vocab.items():
        if index not in special:
            of[index] = length(piece, index)
            after_space[index] = joins or piece.startswith(("▁", " "))
    sample = tokenizer.encode("a")
    drops_space = sum(map(int, of[np.asarray(sample, np.int64)])) > len(tokenizer.decode(sample).encode())
    return ByteLengths(of, after_space, drops_space)


def _length_of(tokenizer: Tokenizer) -> tuple[Callable[[str, int], int], bool]:
    """
    Return the function that counts the bytes of a token, given its entry in the vocabulary and its id.

    Also return whether that may count a space before the token, because the decoder joins words.
    """
    decoders = list(_flat(json.loads(tokenizer.to_json())["decoder"]))
    kinds = {decoder["type"] for decoder in decoders}
    if "ByteLevel" in kinds:
        alphabet, added = frozenset(byte_characters()), tokenizer.added_ids

        def from_bytes(piece: str, index: int) -> int:
            plain = index in added or not alphabet.issuperset(piece)  # added tokens are plain text
            return len(piece.encode()) if plain else len(piece)

        return from_bytes, False
    if kinds and kinds <= _JOINED:
        spaces = [text for decoder in decoders if (text := _space_of(decoder))]
        falls_back = "ByteFallback" in kinds

        def joined(piece: str, _: int) -> int:
            return 1 if falls_back and _BYTE_TOKEN.fullmatch(piece) else len(_spaced(piece, spaces).encode())

        return joined, False
    anchor = tokenizer.encode("a")
    alone = len(tokenizer.decode(anchor).encode())
    return lambda _, index: len(tokenizer.decode([*anchor, index]).encode()) - alone, True


def _flat(decoder: Any) -> Iterator[dict[str, Any]]:
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for each in decoder["decoders"]:
            yield from _flat(each)
    else:
        yield decoder


def _space_of(decoder: dict[str, Any]) -> tuple[str, str] | None:
    """Return the replacement that a decoder makes in each token, if any."""
    match decoder:
        case {"type": "Replace", "pattern": {"String": str(text)}, "content": str(content)}:
            return text, content
        case {"type": "Metaspace", "replacement": str(text)}:
            return text, " "
    return None


def _spaced(piece: str, replacements: list[tuple[str, str]]) -> str:
    for text, content in replacements:
        piece = piece.replace(text, content)
    return piece
