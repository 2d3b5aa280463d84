"""
Rows: training samples by number, cut from a stream of tokens. No torch.

Row i predicts tokens i*T+1 to (i+1)*T from tokens i*T to (i+1)*T-1, T being `seq_len`. Neighboring rows share a
token, every token but the first is predicted exactly once, and only a tail shorter than a row is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shoal.data.shards import TokenStream

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


def count_rows(num_tokens: int, seq_len: int) -> int:
    """Return how many rows a stream of `num_tokens` fills; a row's last label is the token after the row."""
    return max(0, (num_tokens - 1) // seq_len)


class PackedStream:
    """Rows cut from a token stream, documents end to end. Raises IndexError for row numbers out of range."""

    def __init__(self, stream: TokenStream, seq_len: int, document_mask: bool) -> None:
        self._stream, self._document_mask = stream, document_mask
        self.seq_len = seq_len
        self._num_rows = count_rows(stream.num_tokens, seq_len)

    def __len__(self) -> int:
        return self._num_rows

    def read(self, row_ids: npt.ArrayLike) -> RowArrays:
        """Return the rows with these numbers, in this order. Raises DataError if their bytes were altered."""
        ids = np.atleast_1d(np.asarray(row_ids, np.int64))
        if ((ids < 0) | (ids >= len(self))).any():
            raise IndexError(f"rows {ids.tolist()} of {len(self)}")
        window = np.empty((len(ids), self.seq_len + 1), np.int64)
        for place, row in enumerate(ids):
            window[place] = self._stream.read(int(row) * self.seq_len, (int(row) + 1) * self.seq_len + 1)
        if self._document_mask:
            rows = mask_documents(window, self._starts(ids))
        else:
            positions = np.broadcast_to(np.arange(self.seq_len), (len(ids), self.seq_len)).copy()
            rows = RowArrays(window[:, :-1].copy(), window[:, 1:].copy(), positions, None)
        if not self._stream.learns_all:
            rows.labels[~self._learned(ids)] = IGNORED_LABEL
        return rows

    def _learned(self, ids: Ints) -> npt.NDArray[np.bool_]:
        """Return [rows, seq_len]: whether the token that each label names is learned."""
        begins = (int(row) * self.seq_len + 1 for row in ids)
        return np.stack([mask_answers(self._stream, begin, begin + self.seq_len) for begin in begins])

    def _starts(self, ids: Ints) -> npt.NDArray[np.bool_]:
        """Return [rows, seq_len + 1]: whether a document starts at each token."""
        is_start = np.zeros((len(ids), self.seq_len + 1), np.bool_)
        for place, row in enumerate(ids):
            begin = int(row) * self.seq_len
            is_start[place, self._stream.starts(begin, begin + self.seq_len + 1) - begin] = True
        return is_start


def mask_answers(stream: TokenStream, start: int, stop: int) -> npt.NDArray[np.bool_]:
    """Return whether each token in [start, stop) is learned."""
    steps = np.zeros(stop - start + 1, np.int64)
    spans = stream.answers(start, stop) - start
    np.add.at(steps, spans[:, 0], 1)
    np.add.at(steps, spans[:, 1], -1)
    return np.cumsum(steps[:-1]) > 0


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
