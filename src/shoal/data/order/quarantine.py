"""
Rows that cannot be read, each replaced by another row of its source. No torch.

The substitute is the first readable row of a sequence that depends only on the row and the seed, so every rank, and a resumed
run, reads the same one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from shoal.data.order.blend import Blend
from shoal.data.order.order import sample_at
from shoal.data.packing.pack import Ints, RowArrays, Rows
from shoal.errors import DataError, UnreadableError

MOST_TRIED: Final = 100  # candidates for a substitute


@dataclass(frozen=True)
class Replaced:
    """A row that cannot be read, the row that is read instead, and why."""

    row: int
    substitute: int
    why: str


@dataclass(frozen=True)
class ReadRows:
    """Rows as arrays, the numbers of the rows that were really read, and those of them replaced for the first time."""

    arrays: RowArrays
    row_ids: Ints
    replaced: tuple[Replaced, ...] = ()


class Quarantine:
    """
    Reads rows, and replaces those that cannot be read.

    known: the rows that the run has replaced before, each with its substitute. It may grow meanwhile. These rows are not
    tried again, so that a disk that works again does not change what is trained on.
    """

    def __init__(self, rows: Rows, order: Blend, known: Mapping[int, int]) -> None:
        self._rows, self._order, self._known = rows, order, known
        self._found: dict[int, Replaced] = {}

    def read(self, row_ids: Ints) -> ReadRows:
        """Return these rows, or their substitutes. Raises DataError if a row has no readable substitute."""
        asked = row_ids.tolist()
        wanted = [self.instead(row) for row in asked]
        try:
            arrays = self._rows.read(wanted)
        except UnreadableError:
            for row in asked:
                self._try(row)
            wanted = [self.instead(row) for row in asked]
            arrays = self._rows.read(wanted)
        found = {row: self._found[row] for row in asked if row in self._found}
        news = tuple(each for row, each in found.items() if self._known.get(row) != each.substitute)
        return ReadRows(arrays, np.array(wanted, np.int64), news)

    def instead(self, row: int) -> int:
        """Return the row that is read for `row`, as far as is known: its substitute, or itself."""
        return self._found[row].substitute if row in self._found else self._known.get(row, row)

    def _try(self, row: int) -> None:
        """Find a substitute for a row if it, or its substitute so far, cannot be read."""
        try:
            self._rows.read([self.instead(row)])
        except UnreadableError as error:
            self._found[row] = Replaced(row, self._substitute(row, error), str(error))

    def _substitute(self, row: int, error: UnreadableError) -> int:
        for candidate in candidates(self._order, row):
            try:
                self._rows.read([candidate])
            except UnreadableError:
                continue
            return candidate
        raise DataError(f"no other row of its source can be read instead: {error}") from error


def too_many(most: int, why: str) -> DataError:
    """Return the error for more unreadable rows than `data.max_quarantined`. why: the message for one of them."""
    rows = "1 row" if most == 1 else f"{most:,} rows"
    return DataError(
        f"more than {rows} (data.max_quarantined) cannot be read: {why}. The last checkpoint is kept; after the repair, or "
        "with a larger data.max_quarantined, the same command resumes from it"
    )


def candidates(order: Blend, row: int) -> list[int]:
    """Return the first `MOST_TRIED` rows that may replace a row: of its source, in an order shuffled by row and seed."""
    source, own = order.locate(row)
    size, first = order.sizes[source], row - own
    places = own * size + np.arange(min(size, MOST_TRIED))  # of epoch `own`: a permutation of its own for each row
    return [first + sample for sample in sample_at(order.seed, places, size, source).tolist() if sample != own]
