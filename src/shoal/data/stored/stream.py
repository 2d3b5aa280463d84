"""A stream of tokens, documents end to end: all that rows, evaluation and decoding need of tokens on disk. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.unsignedinteger[Any]]
Starts = npt.NDArray[np.int64]
Spans = npt.NDArray[np.int64]
"""[spans, 2]: the first token of each span, and the token after its last."""


class Stream(Protocol):
    """Tokens and document starts by their offset. A shard, a token file, several end to end, and a section are streams."""

    @property
    def num_tokens(self) -> int: ...

    def read(self, start: int, stop: int) -> Tokens:
        """Return tokens [start, stop). Raises DataError if they are not the tokens that were prepared."""
        ...

    def starts(self, start: int, stop: int) -> Starts:
        """Return the offsets in [start, stop) at which a document starts, ascending."""
        ...

    def answers(self, start: int, stop: int) -> Spans | None:
        """Return the learned spans in [start, stop), cut to it and ascending; None if every token is learned."""
        ...


class TokenStream:
    """Streams end to end. Raises IndexError for an empty range, or one beyond the tokens."""

    def __init__(self, parts: Sequence[Stream]) -> None:
        self._parts = list(parts)
        self._begins = np.concatenate([[0], np.cumsum([part.num_tokens for part in parts], dtype=np.int64)])
        self.num_tokens = int(self._begins[-1])

    def read(self, start: int, stop: int) -> Tokens:
        """Return tokens [start, stop); a view if one part has them all."""
        found = [part.read(a, b) for part, _, a, b in self._spans(start, stop)]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def starts(self, start: int, stop: int) -> Starts:
        """Return the offsets in [start, stop) at which a document starts, ascending."""
        return np.concatenate([part.starts(a, b) + begin for part, begin, a, b in self._spans(start, stop)])

    def answers(self, start: int, stop: int) -> Spans | None:
        """Return the learned spans in [start, stop), cut to it and ascending; None if every token is learned."""
        parts = self._spans(start, stop)
        found = [part.answers(a, b) for part, _, a, b in parts]
        if all(spans is None for spans in found):
            return None
        whole = [
            np.array([[a, b]]) if spans is None else spans for spans, (_, _, a, b) in zip(found, parts, strict=True)
        ]
        return np.concatenate([spans + begin for spans, (_, begin, _, _) in zip(whole, parts, strict=True)])

    def _spans(self, start: int, stop: int) -> list[tuple[Stream, int, int, int]]:
        """Return (part, its offset, start and stop in the part) for each part with tokens in [start, stop)."""
        check_range(start, stop, self.num_tokens)
        first = int(np.searchsorted(self._begins, start, side="right")) - 1
        spans = []
        for index in range(first, len(self._parts)):
            begin, end = int(self._begins[index]), int(self._begins[index + 1])
            if begin >= stop:
                break
            spans.append((self._parts[index], begin, max(start, begin) - begin, min(stop, end) - begin))
        return spans


class Section:
    """Tokens [begin, end) of a stream, as a stream."""

    def __init__(self, stream: Stream, begin: int, end: int) -> None:
        self._stream, self._begin = stream, begin
        self.num_tokens = end - begin

    def read(self, start: int, stop: int) -> Tokens:
        """Return tokens [start, stop) of the section."""
        check_range(start, stop, self.num_tokens)
        return self._stream.read(self._begin + start, self._begin + stop)

    def starts(self, start: int, stop: int) -> Starts:
        """Return the offsets in [start, stop) at which a document starts, ascending."""
        check_range(start, stop, self.num_tokens)
        return self._stream.starts(self._begin + start, self._begin + stop) - self._begin

    def answers(self, start: int, stop: int) -> Spans | None:
        """Return the learned spans in [start, stop), cut to it and ascending; None if every token is learned."""
        check_range(start, stop, self.num_tokens)
        found = self._stream.answers(self._begin + start, self._begin + stop)
        return None if found is None else found - self._begin


def check_range(start: int, stop: int, num_tokens: int) -> None:
    """Raise IndexError unless [start, stop) has tokens, all of them in a stream of `num_tokens`."""
    if not 0 <= start < stop <= num_tokens:
        raise IndexError(f"tokens {start} to {stop} of {num_tokens}")
