"""
Best-fit packing: whole documents into rows, cut only if they are longer than a row. No torch.

After "Fewer Truncations Improve Language Modeling" (Ding et al. 2024, https://arxiv.org/abs/2404.10830): best fit in
order of decreasing length. Only lengths matter, so all pieces of one length that go into equally filled rows are placed at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shoal.data.stored.stream import Stream

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pieces:
    """Pieces of documents in the order of the stream: the start of each, and its length, in tokens; int64 [pieces]."""

    starts: Ints
    lengths: Ints

    def __len__(self) -> int:
        return len(self.starts)


def cut_documents(stream: Stream, seq_len: int) -> Pieces:
    """Return the documents of a stream in pieces. See `pieces_of`."""
    if not stream.num_tokens:
        return Pieces(np.zeros(0, np.int64), np.zeros(0, np.int64))
    starts = stream.starts(0, stream.num_tokens)
    return pieces_of(starts, np.diff(starts, append=stream.num_tokens), seq_len)


def pieces_of(starts: Ints, lengths: Ints, seq_len: int) -> Pieces:
    """
    Return documents, [documents]; one longer than a row (`seq_len` + 1 tokens) as full rows and a remainder.

    Neighboring pieces share a token: the last label of the one is the first token of the other, so every token of a
    document but the first is predicted once. Skips documents of one token, because nothing is predicted in them.
    """
    labels = lengths - 1  # tokens that are predicted
    counts = -(-labels // seq_len)
    document = np.repeat(np.arange(len(starts)), counts)
    done = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * seq_len
    return Pieces(starts[document] + done, np.minimum(labels[document] - done, seq_len) + 1)


def best_fit(lengths: Ints, capacity: int) -> tuple[Ints, int]:
    """
    Return the row of each piece [pieces], and the number of rows. No row gets more than `capacity` tokens.

    Places the longest piece first, each into the fullest row that has room for it, else into a new row. Rows are numbered
    by the place of their longest piece, so that the first rows are like the others. Raises ValueError if a piece is longer
    than a row.
    """
    if len(lengths) and int(lengths.max()) > capacity:
        raise ValueError(f"a piece of {int(lengths.max())} tokens does not fit into a row of {capacity}")
    order = np.argsort(-lengths, kind="stable")
    counts = np.bincount(lengths, minlength=capacity + 1)
    rows, placed = _OpenRows(capacity), []
    for length in np.flatnonzero(counts)[::-1].tolist():
        placed += rows.place(length, int(counts[length]))
    row_in_order = np.concatenate([np.zeros(0, np.int64), *placed])
    longest = np.zeros(rows.count, np.int64)  # in each row
    longest[row_in_order[::-1]] = order[::-1]
    number = np.empty(rows.count, np.int64)
    number[np.argsort(longest)] = np.arange(rows.count)
    row = np.empty(len(lengths), np.int64)
    row[order] = number[row_in_order]
    return row, rows.count


class _OpenRows:
    """Rows by the room that is left in them."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._by_room: list[list[Ints]] = [[] for _ in range(capacity + 1)]
        self._has_rows = np.zeros(capacity + 1, np.bool_)
        self.count = 0

    def place(self, length: int, count: int) -> list[Ints]:
        """Place `count` pieces of one length; return arrays with the row of each."""
        found = []
        while count:
            room = length + int(np.argmax(self._has_rows[length:]))  # the fullest rows that it fits into
            if not self._has_rows[room]:
                room = self._capacity
            each = room // length  # once a row has one of these pieces, it is the fullest that has room for another
            rows = self._take(room, -(-count // each))
            taken = min(count, len(rows) * each)
            found.append(np.repeat(rows, each)[:taken])
            whole, rest = divmod(taken, each)
            self._put(rows[:whole], room - each * length)
            self._put(rows[whole:], room - rest * length)
            count -= taken
        return found

    def _take(self, room: int, at_most: int) -> Ints:
        """Return rows with this much room, no longer open; new rows, if none has."""
        if not self._has_rows[room]:
            first, self.count = self.count, self.count + at_most
            return np.arange(first, self.count)
        rows = self._by_room[room].pop()
        if len(rows) > at_most:
            self._by_room[room].append(rows[at_most:])
        self._has_rows[room] = bool(self._by_room[room])
        return rows[:at_most]

    def _put(self, rows: Ints, room: int) -> None:
        if len(rows):
            self._by_room[room].append(rows)
            self._has_rows[room] = True
