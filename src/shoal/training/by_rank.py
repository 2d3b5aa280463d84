"""Records the memory and the busy time of every rank at the measured steps, in `ranks.jsonl`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from shoal.mesh.ballot import Vote
from shoal.mesh.mesh import Mesh
from shoal.metrics.busy import PARTS, Busy
from shoal.metrics.memory import Memory, memory_of
from shoal.run.records import RanksRecord

FIELDS: Final = len(Memory._fields) + len(PARTS)  # numbers of a rank


class ByRank:
    """
    Tells the first rank what each rank measured of a step. All ranks call its methods at the same steps.

    The numbers are part of the ballot of a later step, so they need no all-reduce of their own: of the next step, or on a
    GPU of the step after it, when the device has finished the measured step and no rank has to wait for it.
    """

    def __init__(
        self, mesh: Mesh, busy: Busy, measures: Callable[[int], bool], write: Callable[[RanksRecord], None]
    ) -> None:
        """measures: whether a step is measured. write: a function called with each record, on the first rank."""
        self._mesh, self._busy, self._measures, self._write = mesh, busy, measures, write
        self._delay = 2 if mesh.device.type == "cuda" else 1
        self._waiting: set[int] = set()  # measured steps whose numbers are not sent yet

    def begin(self, step: int) -> None:
        """Begin `step`: measure how long this rank is busy in it, if it is a measured step."""
        if self._measures(step):
            self._waiting.add(step)
            self._busy.begin(keep=step)
        else:
            self._busy.begin()

    def vote(self, step: int) -> Vote:
        """
        Return a vote with this rank's numbers of the measured step that `step` sends; without numbers if it sends none.

        It has `FIELDS` numbers per rank, zero for other ranks, so that the sum has the numbers of all ranks. They are exact:
        a float64 holds any number of bytes up to 2^53.
        """
        measured = step - self._delay
        if measured not in self._waiting:
            return Vote([])
        self._waiting.remove(measured)
        busy = self._busy.take(measured)
        own = [*map(float, memory_of(self._mesh.device)), *(busy.get(part, 0.0) for part in PARTS)]
        numbers = [0.0] * (self._mesh.world_size * FIELDS)
        first = self._mesh.place.rank * FIELDS
        numbers[first : first + FIELDS] = own
        return Vote(numbers, (lambda sums: self._record(measured, sums)) if self._mesh.is_first else _ignore)

    def _record(self, step: int, sums: Sequence[float]) -> None:
        """Write the line of `step`. sums: [ranks * FIELDS], flattened."""
        used, peak, reserved, peak_reserved, *busy = ([*sums[field::FIELDS]] for field in range(FIELDS))
        on_gpu = self._mesh.device.type == "cuda"
        self._write(
            RanksRecord(
                step=step,
                time=round(time.time(), 3),
                memory_bytes=[*map(int, used)],
                peak_memory_bytes=[*map(int, peak)],
                reserved_bytes=[*map(int, reserved)] if on_gpu else None,
                peak_reserved_bytes=[*map(int, peak_reserved)] if on_gpu else None,
                busy_seconds={part: [round(each, 6) for each in of] for part, of in zip(PARTS, busy, strict=True)},
            )
        )


def _ignore(sums: Sequence[float]) -> None:
    """Ignore the sums: only the first rank writes."""
