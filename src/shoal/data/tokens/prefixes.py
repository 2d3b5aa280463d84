"""
Where a beginning of a chat text ends in the text's tokens. No torch.

A tokenizer cuts a text at its special tokens and encodes each part apart. So the tokens before a special token do not depend on
what follows it, and a beginning needs to be encoded from its last special token on only. Long conversations have many
beginnings: this makes their encoding several times faster.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property

from shoal.data.tokens.tokenize import Tokenizer

GROUP_CHARACTERS = 1_000_000  # texts are encoded in groups of about this size, as Rust's ids take far more memory


class SpecialTexts:
    """The special tokens of a tokenizer, the end of text included, and their texts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids = tokenizer.special_ids | {tokenizer.eot_id}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        texts = sorted((self.tokenizer.decode([index]) for index in self.ids), key=len, reverse=True)
        return re.compile("|".join(re.escape(text) for text in texts if text))

    def without(self, text: str) -> str:
        """Return `text` without special tokens."""
        return self._pattern.sub("", text)

    def places(self, text: str) -> list[tuple[int, int]]:
        """Return where each special token in `text` begins and ends."""
        return [match.span() for match in self._pattern.finditer(text)]


class Beginnings:
    """
    A text and some beginnings of it, to find where each ends in the text's tokens.

    Encode `texts`, then call `ends` with their ids.
    """

    def __init__(self, special: SpecialTexts, whole: str, beginnings: Sequence[str]) -> None:
        self._special, self._beginnings = special, beginnings
        self._places = special.places(whole)
        stops = [stop for _, stop in self._places]
        self._last = [bisect_right(stops, len(text)) - 1 for text in beginnings]  # its last special token, -1 if none
        self.texts = [whole, *(text[self._from(last) :] for text, last in zip(beginnings, self._last, strict=True))]

    def _from(self, last: int) -> int:
        return self._places[last][0] if last >= 0 else 0

    def ends(self, encoded: Sequence[list[int]]) -> list[int | None]:
        """Return how many tokens each beginning has; None if its tokens are not the first tokens of the whole text."""
        whole = encoded[0]
        at = [index for index, token in enumerate(whole) if token in self._special.ids]
        if len(at) != len(self._places):  # a text that looks like a special token is none: encode each beginning whole
            full = self._special.tokenizer.encode_chat_batch(self._beginnings)
            return [len(ids) if whole[: len(ids)] == ids else None for ids in full]
        found: list[int | None] = []
        for last, ids in zip(self._last, encoded[1:], strict=True):
            begin = at[last] if last >= 0 else 0
            end = begin + len(ids)
            found.append(end if whole[begin:end] == ids else None)
        return found


def encode_in_groups(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    """Yield the ids of each text, in bounded memory."""
    group, size = list[str](), 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= GROUP_CHARACTERS:
            yield from tokenizer.encode_chat_batch(group)
            group, size = [], 0
    yield from tokenizer.encode_chat_batch(group)
