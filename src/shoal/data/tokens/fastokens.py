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

    def encode_batch(self, texts: Sequence[str], *, compare: bool) -> list[Ids]:
        """
        Encode texts.

        Raises `DifferentIdsError` if fastokens fails, if it gives an id outside the vocabulary or, with `compare`, if tokenizers
        gives other ids.
        """
        try:
            content, offsets = self._fast.encode_batch_flat(list(texts), split_special_tokens=True)
        except Exception as error:  # fastokens has many error types
            raise DifferentIdsError(str(error)) from error
        ids = np.frombuffer(content, "<u4").astype(np.uint32, copy=False)
        if ids.size and int(ids.max()) >= self._tokenizer.vocab_size:
            raise DifferentIdsError(
                f"it gave the id {int(ids.max())}, but the tokenizer has {self._tokenizer.vocab_size} tokens"
            )
        each = np.split(ids, np.frombuffer(offsets, "<u8")[1:-1].astype(np.int64)) if texts else []
        if compare:
            for text, ours, theirs in zip(texts, each, self._tokenizer.encode_batch(texts), strict=True):
                if ours.tolist() != theirs:
                    raise DifferentIdsError(f"for {text[:60]!a}")
        return each


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
        encoder.encode_batch(same_ids.sample(), compare=True)
    except Exception:  # ValueError if unsupported; DifferentIdsError for other ids
        return None
    return encoder
