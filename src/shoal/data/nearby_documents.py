"""The documents of a few tokens, found by reading around them: for token files without an index of documents. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from shoal.data.document_index import Documents
from shoal.data.stored.stream import Stream

WINDOW_TOKENS = 1 << 18
BACK_TOKENS = 1 << 24  # searched for the start of a document

SpansIn = Callable[[int, int], Iterable[tuple[int, int, int]]]
"""Returns the documents with tokens in [start, stop): the name of each, a number, and its tokens [first, last)."""


def numbered(documents: Documents) -> SpansIn:
    """Return the documents of tokens, named by their number."""
    return lambda start, stop: [(n, *documents.document_span(n)) for n in documents.documents_in(start, stop)]


def nearby(stream: Stream) -> SpansIn:
    """Return the documents of tokens, named by their first token and ending with the tokens asked for."""

    def spans_in(start: int, stop: int) -> list[tuple[int, int, int]]:
        inside = stream.starts(start, stop)
        firsts = (
            inside.tolist() if len(inside) and inside[0] == start else [_start_before(stream, start), *inside.tolist()]
        )
        return list(zip(firsts, firsts, [*firsts[1:], stop], strict=True))

    return spans_in


def _start_before(stream: Stream, at: int) -> int:
    """Return the last document start before a token, or the first token that is searched."""
    lowest = max(0, at - BACK_TOKENS)
    for high in range(at, lowest, -WINDOW_TOKENS):
        if len(found := stream.starts(max(lowest, high - WINDOW_TOKENS), high)):
            return int(found[-1])
    return lowest
