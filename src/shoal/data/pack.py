"""
Rows: a split's tokens cut into training samples. Pure functions of the row's number. No torch.

Row i predicts tokens i*T+1 to (i+1)*T from tokens i*T to (i+1)*T-1, T being `seq_len`: neighbours share a
token, every token but the first is predicted exactly once, and only a tail shorter than a row is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shoal.data.shards import TokenStream

IGNORED_LABEL = -100  # what torch's cross entropy leaves out

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PackedRows:
    """Each int64 [rows, seq_len]. `document_ids` count the documents of a row from 0."""

    tokens: Ints
    labels: Ints
    positions: Ints
    document_ids: Ints


class Rows:
    """All rows of a split. `bytes_of_token` [vocab_size]: the text that a token stands for, in bytes."""

    def __init__(
        self, stream: TokenStream, seq_len: int, document_mask: bool, bytes_of_token: npt.NDArray[np.float64]
    ) -> None:
        self._stream, self._bytes_of_token = stream, bytes_of_token
        self.seq_len, self.document_mask = seq_len, document_mask
        self.num_tokens = stream.num_tokens
        self.num_rows = max(0, (stream.num_tokens - 1) // seq_len)

    def __len__(self) -> int:
        return self.num_rows

    def pack(self, row_ids: npt.ArrayLike) -> PackedRows:
        """The rows of these numbers, in this order. Raises DataError where their bytes were altered."""
        ids = np.atleast_1d(np.asarray(row_ids, np.int64))
        if ((ids < 0) | (ids >= self.num_rows)).any():
            raise IndexError(f"rows {ids.tolist()} of {self.num_rows}")
        window = np.empty((len(ids), self.seq_len + 1), np.int64)
        for place, row in enumerate(ids):
            window[place] = self._stream.read(int(row) * self.seq_len, (int(row) + 1) * self.seq_len + 1)
        if self.document_mask:
            return mask_documents(window, self._starts(ids))
        positions = np.broadcast_to(np.arange(self.seq_len), (len(ids), self.seq_len)).copy()
        return PackedRows(window[:, :-1].copy(), window[:, 1:].copy(), positions, np.zeros_like(positions))

    def text_bytes(self, first_row: int, last_row: int) -> float:
        """
        Bytes of text that the labels of rows [first_row, last_row) stand for: what bits per byte divides by.

        Exact with a byte-level tokenizer; an average otherwise. Reads the rows.
        """
        total = 0.0
        for low in range(first_row, last_row, 256):
            labels = self.pack(np.arange(low, min(low + 256, last_row))).labels
            total += float(self._bytes_of_token[labels[labels != IGNORED_LABEL]].sum())
        return total

    def _starts(self, ids: Ints) -> npt.NDArray[np.bool_]:
        """[rows, seq_len + 1] whether a document starts at this token."""
        is_start = np.zeros((len(ids), self.seq_len + 1), np.bool_)
        for place, row in enumerate(ids):
            begin = int(row) * self.seq_len
            is_start[place, self._stream.starts(begin, begin + self.seq_len + 1) - begin] = True
        return is_start


def mask_documents(window: Ints, is_start: npt.NDArray[np.bool_]) -> PackedRows:
    """
    Keep documents apart; both arguments are [rows, seq_len + 1].

    A label that is the first token of another document is ignored, and positions restart with each
    document; a document that goes on from the row before starts at 0 here too.
    """
    labels = np.where(is_start[:, 1:], IGNORED_LABEL, window[:, 1:])
    begins = is_start[:, :-1].copy()
    begins[:, 0] = True
    at = np.broadcast_to(np.arange(begins.shape[1]), begins.shape)
    positions = at - np.maximum.accumulate(np.where(begins, at, 0), axis=1)
    return PackedRows(window[:, :-1].copy(), labels, positions, np.cumsum(begins, axis=1) - 1)
