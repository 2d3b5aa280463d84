"""
Where a document is trained on, and which documents a step reads: both computed, whatever the length of the run. No torch.

    document -> tokens -> rows -> positions (the inverse of the order) -> steps and slots
    step -> positions -> rows -> tokens -> documents
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.data.dataset import Dataset
from shoal.data.document_index import Documents, find_documents
from shoal.data.order.blend import Blend
from shoal.data.order.ledger import Header
from shoal.data.packing.pack import PlacedRows
from shoal.data.prepare import Progress, no_progress
from shoal.run.jsonl import whole_lines


@dataclass(frozen=True)
class Life:
    """Steps on consecutive positions: the step after `step` begins at position `first`; none goes beyond `stop`."""

    first: int
    step: int
    global_batch: int
    stop: float = math.inf


@dataclass(frozen=True)
class Instead:
    """At positions [first, stop), `substitute` was read instead of `row`, which could not be read."""

    first: int
    stop: float
    row: int
    substitute: int


@dataclass(frozen=True)
class Place:
    """A row's place in the training: its step, from 1; its slot, the micro-batch in the step; and its index in the slot."""

    step: int
    slot: int
    index: int


class Timeline:
    """
    The step at each position, and the positions of each step, with resumes, rollbacks and changed batches.

    instead: the rows that could not be read.
    """

    def __init__(self, lives: Sequence[Life], micro_batch: int, instead: Sequence[Instead] = ()) -> None:
        self.lives, self._micro_batch, self.instead = list(lives), micro_batch, instead

    @classmethod
    def of_ledger(cls, path: Path, micro_batch: int) -> tuple[Timeline, Header]:
        """Read a run's ledger: its timeline and its last header. Raises OSError if it cannot be read, ValueError if it is empty."""
        lives: list[Life] = []
        instead: list[Instead] = []
        header: dict[str, Any] | None = None
        step = position = 0
        for line in whole_lines(path):
            if "after" in line:
                header, step, position = line, line["after"], line["position"]
                lives = [*_until(lives, position), Life(position, step, line["global_batch"])]
                instead = [replace(i, stop=min(i.stop, position)) for i in instead if i.first < position]
            elif "passed_over" in line:
                first, position = line["passed_over"]
                lives = [*_until(lives, first), Life(position, step, lives[-1].global_batch)]
            elif "quarantined" in line:
                row, substitute = line["quarantined"]
                instead = [replace(i, stop=min(i.stop, position)) if i.row == row else i for i in instead]
                instead.append(Instead(position, math.inf, row, substitute))
            else:
                step, position = line["step"], line["stop"]
        if header is None:
            raise ValueError(f"{path} is empty")
        return cls(lives, micro_batch, instead), Header.of_line(header)

    def read_at(self, positions: Sequence[int], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the rows that were read at `positions`, where the order has `rows`."""
        read, at = rows.copy(), np.asarray(positions, np.int64)
        for each in self.instead:
            read[(rows == each.row) & (at >= each.first) & (at < each.stop)] = each.substitute
        return read

    def place(self, position: int) -> Place | None:
        """Return where the sample at `position` is trained on; None if it was passed over."""
        index = bisect_right([life.first for life in self.lives], position) - 1
        if index < 0 or position >= self.lives[index].stop:
            return None
        life = self.lives[index]
        steps, at = divmod(position - life.first, life.global_batch)
        return Place(life.step + steps + 1, at // self._micro_batch, at % self._micro_batch)

    def positions(self, step: int) -> range:
        """Return the positions of a step, from 1 on. Raises ValueError for a step before the first."""
        if step < 1:
            raise ValueError(f"there is no step {step}; the first is 1")
        life = [life for life in self.lives if life.step < step][-1]
        first = life.first + (step - life.step - 1) * life.global_batch
        return range(first, first + life.global_batch)


def _until(lives: Iterable[Life], position: int) -> Iterator[Life]:
    """Yield what was taken before `position`: a rollback revokes the rest."""
    for life in lives:
        if life.first < position:
            yield Life(life.first, life.step, life.global_batch, min(life.stop, position))


@dataclass(frozen=True)
class Seen:
    """A row in the training: its place, its source, its number there, and the documents it reads, in order."""

    place: Place
    source: str
    row: int
    documents: Sequence[int]


@dataclass(frozen=True)
class Finder:
    """The two questions, for a run: its sources by name, each with its rows and its documents, and its order and timeline."""

    order: Blend
    timeline: Timeline
    rows: Mapping[str, PlacedRows]
    documents: Mapping[str, Documents]

    @classmethod
    def of(cls, dataset: Dataset, order: Blend, timeline: Timeline, progress: Progress = no_progress) -> Finder:
        """
        Return the finder of a run on these sources. Makes the index of documents that token files still lack.

        Raises DataError if a source does not fill a row.
        """
        rows = {name: dataset.part_rows(name, "train") for name in dataset.parts}
        return cls(order, timeline, rows, {n: find_documents(p, "train", progress) for n, p in dataset.parts.items()})

    def where(self, source: str, document: int, last_step: int) -> list[Seen]:
        """
        Return the rows in which a document is trained on up to `last_step`, in the order of training.

        Raises IndexError if there is no such document.
        """
        rows = self.rows[source].rows_of(*self.documents[source].document_span(document))
        if not len(rows):
            return []  # it is in the tail that fills no row
        first = self.order.first_row(list(self.rows).index(source))
        wanted = {row + first for row in rows}
        # also the positions of rows that one of these was read instead of
        asked = np.array(sorted(wanted | {i.row for i in self.timeline.instead if i.substitute in wanted}))
        indices, at = self.order.positions_of(asked, self.timeline.positions(last_step).stop)
        positions = at.tolist()
        read = self.timeline.read_at(positions, asked[indices]).tolist()
        return [
            Seen(place, source, row - first, (document,))
            for row, position in zip(read, positions, strict=True)
            if row in wanted and (place := self.timeline.place(position)) is not None
        ]

    def at(self, step: int) -> list[Seen]:
        """Return the rows of a step, by slot. Raises ValueError if no such step can be taken."""
        positions = self.timeline.positions(step)
        found = self.of_rows(self.timeline.read_at(positions, self.order.rows_at(positions)))
        places = [self.timeline.place(position) for position in positions]
        return [Seen(place, *each) for place, each in zip(places, found, strict=True) if place is not None]

    def of_rows(self, rows: npt.NDArray[np.int64]) -> list[tuple[str, int, Sequence[int]]]:
        """Return source, row of that source and documents of each row of the blend."""
        names = list(self.rows)
        found: list[tuple[str, int, Sequence[int]]] = []
        for row, index in zip(rows.tolist(), self.order.sources_of(rows).tolist(), strict=True):
            own = row - self.order.first_row(index)
            documents = self.documents[names[index]]
            spans = self.rows[names[index]].place(own).spans
            found.append((names[index], own, [n for span in spans for n in documents.documents_in(*span)]))
        return found
