"""
Held-out rows that cannot be read: evaluations skip them. No torch.

A skipped row keeps its place in its batch, without labels, so that the other rows' losses have the same bits as before.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from shoal.data.order.quarantine import too_many
from shoal.data.packing.pack import IGNORED_LABEL, Ints, PlacedRows, RowArrays
from shoal.errors import UnreadableError

MOST_NAMED: Final = 5  # rows that a message names; one damaged block of a shard has many

Unread = dict[tuple[str, int], None]
"""(source, row of that source) of the held-out rows that cannot be read, in the order in which they were found."""


@dataclass(frozen=True)
class Skipped:
    """A held-out row that cannot be read, and why."""

    source: str
    row: int
    why: str


def in_words(skipped: Sequence[Skipped], count: str = "") -> str:
    """Return a message on rows of one source, with the reason of the first. count: how many such rows the run has."""
    numbers = ", ".join(f"{each.row:,}" for each in skipped[:MOST_NAMED])
    more = f" and {len(skipped) - MOST_NAMED:,} more" if len(skipped) > MOST_NAMED else ""
    of = f" of {skipped[0].source}" if skipped[0].source else ""
    rows, are = ("rows", "are") if len(skipped) > 1 else ("row", "is")
    return f"held-out {rows} {numbers}{more}{of} cannot be read and {are} skipped{count}: {skipped[0].why}"


class HeldOutQuarantine:
    """
    Reads held-out rows, and skips those that cannot be read.

    known: the rows skipped so far. `settle` adds to it. These rows are not tried again, so that the losses of a run's
    evaluations are over the same rows. most: `data.max_quarantined`. replaced: how many training rows count towards it.
    tell: a function called with the new rows of each source, after they were added.
    """

    def __init__(
        self,
        known: Unread,
        most: int,
        *,
        replaced: int = 0,
        tell: Callable[[Sequence[Skipped]], None] = lambda rows: None,
    ) -> None:
        self._known, self._most, self._replaced, self._tell = known, most, replaced, tell
        self._found: dict[tuple[str, int], Skipped] = {}

    @property
    def num_found(self) -> int:
        """The number of rows that this rank found since the last `take`."""
        return len(self._found)

    def take(self) -> list[Skipped]:
        """Return the rows that this rank found since the last call."""
        found, self._found = list(self._found.values()), {}
        return found

    def read(self, source: str, rows: PlacedRows, row_ids: Ints, asked: npt.NDArray[np.bool_]) -> RowArrays:
        """
        Return these rows of a source; those that cannot be read are without labels.

        asked: whether each row is evaluated here. Others fill the batch: that one of them cannot be read is not reported.
        """
        try:
            if not any((source, row) in self._known for row in row_ids.tolist()):
                return rows.read(row_ids)
        except UnreadableError:
            pass
        each = [
            self._read(source, rows, row, asked=one) for row, one in zip(row_ids.tolist(), asked.tolist(), strict=True)
        ]
        ids = [one.document_ids for one in each if one.document_ids is not None]
        return RowArrays(
            np.concatenate([one.tokens for one in each]),
            np.concatenate([one.labels for one in each]),
            np.concatenate([one.positions for one in each]),
            np.concatenate(ids) if ids else None,
        )

    def _read(self, source: str, rows: PlacedRows, row: int, *, asked: bool) -> RowArrays:
        if (source, row) in self._known or self.num_found > self._most:  # one too many ends the run: read no more
            return _blank(rows)
        try:
            return rows.read([row])
        except UnreadableError as error:
            if asked:
                self._found[source, row] = Skipped(source, row, str(error))
            return _blank(rows)

    def settle(self, told: Sequence[Skipped], copies: int) -> bool:
        """
        Skip rows from now on, the same on all ranks. Return whether the ranks agreed on them already.

        told: what `take` returned on all ranks, by rank. copies: the number of ranks that read each row. Raises DataError if
        there would be more rows than `data.max_quarantined`.
        """
        new = {(each.source, each.row): each for each in reversed(told)}  # the lowest rank's reason
        if len(self._known) + len(new) + self._replaced > self._most:
            raise too_many(self._most, new[min(new)].why)
        self._known.update(dict.fromkeys(sorted(new)))
        for _, rows in itertools.groupby((new[place] for place in sorted(new)), lambda each: each.source):
            self._tell(list(rows))
        readers = [sum((each.source, each.row) == place for each in told) for place in new]
        return all(count == copies for count in readers)

    def count(self, sizes: Mapping[str, int]) -> int:
        """Return how many of the first rows of each source are skipped. sizes: how many rows of each."""
        return sum(row < sizes.get(source, 0) for source, row in self._known)


def _blank(rows: PlacedRows) -> RowArrays:
    """Return a row without labels."""
    zeros = np.zeros((1, rows.seq_len), np.int64)
    labels, positions = np.full_like(zeros, IGNORED_LABEL), np.arange(rows.seq_len)[None]
    return RowArrays(zeros, labels, positions, zeros.copy() if rows.document_mask else None)
