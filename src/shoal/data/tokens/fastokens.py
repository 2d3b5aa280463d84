"""fastokens: a faster tokenizer, used if it is installed and gives the same ids. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.data.tokens import same_ids
from shoal.data.tokens.tokenize import Tokenizer

Ids = npt.NDArray[np.uint32]


class DifferentIdsError(Exception):
    """fastokens failed, or gave other ids than tokenizers, so all its ids must be discarded."""


class FastEncoder:
    """Texts -> ids on all cores, without a Python object per id. Some ids are compared with those of the tokenizers library."""

    def __init__(self, fast: Any, tokenizer: Tokenizer) -> None:
        self._fast, self._tokenizer = fast, tokenizer

    def encode_batch(self, texts: Sequence[str], compared_characters: int) -> list[Ids]:
        """
        Encode texts.

        compared_characters: how much text tokenizers encodes too, in whole texts; if all are longer, the start of the first.

        Raises `DifferentIdsError` if fastokens fails, if it gives an id outside the vocabulary, or if tokenizers gives other
        ids.
        """
        each = self._encode(texts)
        if compared_characters and texts:
            self._compare(texts, each, compared_characters)
        return each

    def _encode(self, texts: Sequence[str]) -> list[Ids]:
        try:
            content, offsets = self._fast.encode_batch_flat(list(texts), split_special_tokens=True)
        except Exception as error:  # fastokens has many error types
            raise DifferentIdsError(str(error)) from error
        ids = np.frombuffer(content, "<u4").astype(np.uint32, copy=False)
        if ids.size and int(ids.max()) >= self._tokenizer.vocab_size:
            raise DifferentIdsError(
                f"it gave the id {int(ids.max())}, but the tokenizer has {self._tokenizer.vocab_size} tokens"
            )
        return np.split(ids, np.frombuffer(offsets, "<u8")[1:-1].astype(np.int64)) if texts else []

    def _compare(self, texts: Sequence[str], each: Sequence[Ids], characters: int) -> None:
        places, left = [], characters
        for place, text in enumerate(texts):
            if len(text) <= left:
                places.append(place)
                left -= len(text)
        chosen, ours = [texts[place] for place in places], [each[place] for place in places]
        if not places:
            chosen = [texts[0][:characters]]
            ours = self._encode(chosen)
        for text, ids, theirs in zip(chosen, ours, self._tokenizer.encode_batch(chosen), strict=True):
            if ids.tolist() != theirs:
                raise DifferentIdsError(f"for {text[:60]!a}")


def fast_encoder(tokenizer: Tokenizer) -> FastEncoder | None:
    """Return an encoder; None if fastokens is not installed, does not support this tokenizer, or fails on sample texts."""
    if tokenizer.ids_are_bytes:
        return None  # bytes need no tokenizer
    try:
        import fastokens
    except ImportError:
        return None
    try:
        encoder = FastEncoder(fastokens.Tokenizer.from_json_str(tokenizer.to_json()), tokenizer)
        sample = same_ids.sample()
        encoder.encode_batch(sample, sum(map(len, sample)))
    except Exception:  # ValueError if unsupported; DifferentIdsError for other ids
        return None
    return encoder
