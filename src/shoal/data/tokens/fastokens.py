"""A faster tokenizer, where it is installed and gives the same ids: fastokens. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.data.tokens import same_ids
from shoal.data.tokens.tokenize import Tokenizer

Ids = npt.NDArray[np.uint32]


class DifferentIdsError(Exception):
    """fastokens said something else than tokenizers: nothing that it said is to be kept."""


class FastEncoder:
    """Texts -> ids on all cores, without an object for each. It is believed only as far as it is compared."""

    def __init__(self, fast: Any, tokenizer: Tokenizer) -> None:
        self._fast, self._tokenizer = fast, tokenizer

    def encode_batch(self, texts: Sequence[str], *, compare: bool) -> list[Ids]:
        """Raises `DifferentIdsError`, where `compare`, if tokenizers gives other ids; and if fastokens fails."""
        try:
            content, offsets = self._fast.encode_batch_flat(list(texts), split_special_tokens=True)
        except Exception as error:  # its own, of many kinds
            raise DifferentIdsError(str(error)) from error
        ids = np.frombuffer(content, "<u4").astype(np.uint32, copy=False)
        if ids.size and int(ids.max()) >= self._tokenizer.vocab_size:
            raise DifferentIdsError(
                f"it gave the id {int(ids.max())}, and the tokenizer has {self._tokenizer.vocab_size} tokens"
            )
        each = np.split(ids, np.frombuffer(offsets, "<u8")[1:-1].astype(np.int64)) if texts else []
        if compare:
            for text, ours, theirs in zip(texts, each, self._tokenizer.encode_batch(texts), strict=True):
                if ours.tolist() != theirs:
                    raise DifferentIdsError(f"of {text[:60]!a}")
        return each


def fast_encoder(tokenizer: Tokenizer) -> FastEncoder | None:
    """None where fastokens is not installed, does not know this kind, or fails on a sample of texts."""
    if tokenizer.ids_are_bytes:
        return None  # nothing is faster than none
    try:
        import fastokens
    except ImportError:
        return None
    try:
        encoder = FastEncoder(fastokens.Tokenizer.from_json_str(tokenizer.to_json()), tokenizer)
        encoder.encode_batch(same_ids.sample(), compare=True)
    except Exception:  # an unknown kind is a ValueError; other ids are ours
        return None
    return encoder
