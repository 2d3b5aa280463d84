"""
Rows: training samples by number, made of spans of a stream of tokens. No torch.

In `PackedStream`, row i predicts tokens i*T+1 to (i+1)*T from tokens i*T to (i+1)*T-1, T being `seq_len`. Neighboring rows share a
token, every token but the first is predicted exactly once, and only a tail shorter than a row is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shoal.data.stored.stream import Spans, Stream

IGNORED_LABEL = -100  # the default `ignore_index` of torch's cross entropy

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RowArrays:
    """
    Some rows as arrays, each int64 [rows, seq_len].

    labels: the next token, or IGNORED_LABEL, also for tokens outside the answers of a conversation. document_ids: the document of each token, numbered from 0 in
    each row; None if tokens attend across documents.
    """

    tokens: Ints
    labels: Ints
    positions: Ints
    document_ids: Ints | None


class Rows(Protocol):
    """All that the loader needs of training data: rows of `seq_len` tokens, each a pure function of its number."""

    @property
    def seq_len(self) -> int: ...

    def __len__(self) -> int: ...

    def read(self, row_ids: npt.ArrayLike) -> RowArrays:
        """Return the rows with these numbers, in this order. Raises DataError if their bytes were altered."""
        ...


Span = tuple[int, int]
"""Tokens [start, stop) of a split's stream."""


@dataclass(frozen=True)
class Placed:
    """
    A row as spans of a stream, of at most seq_len + 1 tokens in all. The last token of a row is only a label.

    pad: the token after the last span of a shorter row.
    """

    stream: Stream
    spans: Sequence[Span]
    pad: int = 0


class PlacedRows(Rows, Protocol):
    """Rows made of spans of a stream, so that a token's rows can be found, and a row's tokens."""

    document_mask: bool

    def place(self, row: int) -> Placed:
        """Return the spans that a row consists of, in its order."""
        ...

    def rows_of(self, start: int, stop: int) -> list[int]:
        """Return the numbers of all rows with a token of [start, stop), ascending."""
        ...


def count_rows(num_tokens: int, seq_len: int) -> int:
    """Return how many rows a stream of `num_tokens` fills; a row's last label is the token after the row."""
    return max(0, (num_tokens - 1) // seq_len)


class PackedStream:
    """Rows cut from a token stream, documents end to end. Raises IndexError for row numbers out of range."""

    def __init__(self, stream: Stream, seq_len: int, document_mask: bool) -> None:
        self._stream, self.document_mask = stream, document_mask
        self.seq_len = seq_len
        self._num_rows = count_rows(stream.num_tokens, seq_len)

    def __len__(self) -> int:
        return self._num_rows

    def place(self, row: int) -> Placed:
        return Placed(self._stream, [(row * self.seq_len, (row + 1) * self.seq_len + 1)])

    def rows_of(self, start: int, stop: int) -> list[int]:
        first = max(start - 1, 0) // self.seq_len  # neighboring rows share a token
        return list(range(first, min((stop - 1) // self.seq_len + 1, len(self))))

    def read(self, row_ids: npt.ArrayLike) -> RowArrays:
        """Return the rows with these numbers, in this order. Raises DataError if their bytes were altered."""
        return read_rows(self, row_ids)


def read_rows(rows: PlacedRows, row_ids: npt.ArrayLike) -> RowArrays:
    """Return the rows with these numbers, in this order. Raises IndexError for a number out of range, DataError for altered bytes."""
    placed = [rows.place(row) for row in check_ids(row_ids, len(rows)).tolist()]
    return read_placed(placed, rows.seq_len, document_mask=rows.document_mask)


def check_ids(row_ids: npt.ArrayLike, count: int) -> Ints:
    """Return row numbers as an array. Raises IndexError if one is not in range(count)."""
    ids = np.atleast_1d(np.asarray(row_ids, np.int64))
    if ((ids < 0) | (ids >= count)).any():
        raise IndexError(f"rows {ids.tolist()} of {count}")
    return ids


def read_placed(rows: Sequence[Placed], seq_len: int, *, document_mask: bool) -> RowArrays:
    """
    Return rows made of spans. Raises DataError if their bytes were altered.

    No label crosses from one span to the next. Labels of padding, and outside the answers of conversations, are ignored; with a document mask, padding is a document
    of its own.
    """
    window = np.empty((len(rows), seq_len + 1), np.int64)
    is_start = np.zeros(window.shape, np.bool_)  # of a document, a span or the padding
    learned = np.ones(window.shape, np.bool_)
    for place, row in enumerate(rows):
        at = 0
        for start, stop in row.spans:
            window[place, at : at + stop - start] = row.stream.read(start, stop)
            if document_mask:
                is_start[place, row.stream.starts(start, stop) - start + at] = True
            is_start[place, at] = True
            if (answers := row.stream.answers(start, stop)) is not None:
                _mark(learned[place, at : at + stop - start], answers - start)
            at += stop - start
        window[place, at:] = row.pad
        is_start[place, at : at + 1] = True
        learned[place, at:] = False
    if document_mask:
        arrays = mask_documents(window, is_start)
    else:
        positions = np.broadcast_to(np.arange(seq_len), (len(rows), seq_len)).copy()
        labels = np.where(is_start[:, 1:], IGNORED_LABEL, window[:, 1:])
        arrays = RowArrays(window[:, :-1].copy(), labels, positions, None)
    if not learned.all():
        arrays.labels[~learned[:, 1:]] = IGNORED_LABEL
    return arrays


def _mark(learned: npt.NDArray[np.bool_], answers: Spans) -> None:
    """Set `learned` to whether each token is in one of the spans."""
    steps = np.zeros(len(learned) + 1, np.int64)
    np.add.at(steps, answers[:, 0], 1)
    np.add.at(steps, answers[:, 1], -1)
    learned[:] = np.cumsum(steps[:-1]) > 0


def mask_documents(window: Ints, is_start: npt.NDArray[np.bool_]) -> RowArrays:
    """
    Return the rows of `window` with document ids, so that tokens attend only within their own document.

    window: tokens, [rows, seq_len + 1]. is_start: whether a document starts at each token, same shape. A label that is the
    first token of another document is ignored. Positions restart at 0 with each document and with each row.
    """
    labels = np.where(is_start[:, 1:], IGNORED_LABEL, window[:, 1:])
    begins = is_start[:, :-1].copy()
    begins[:, 0] = True
    at = np.broadcast_to(np.arange(begins.shape[1]), begins.shape)
    positions = at - np.maximum.accumulate(np.where(begins, at, 0), axis=1)
    return RowArrays(window[:, :-1].copy(), labels, positions, np.cumsum(begins, axis=1) - 1)
