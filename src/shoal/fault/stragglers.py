"""Which ranks are slower than the others, and in what: from the seconds that each of them was busy. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

IN_A_ROW: Final = 6  # steps, for a rank to be called slow, and to be called so no longer
WARM_UP: Final = 2  # steps of a life that are not looked at: the first one compiles, and asks for memory
LEAST_SHARE: Final = 0.05  # of a step's own time: less than this holds nobody up
LEAST_SECONDS: Final = 0.01  # a busy machine takes as much from anybody


@dataclass(frozen=True)
class Change:
    """A rank is slow in a phase from now on, or no longer; its seconds and its peers', in the mean of `steps`."""

    rank: int
    phase: int
    is_slow: bool
    seconds: float
    others: float
    steps: tuple[int, int]  # the first and the last of those that showed it


class Stragglers:
    """
    Compares each rank's seconds in each phase with the median of its peers', itself left out.

    A rank is slow in a phase that takes more than `factor` times as long, and by a twentieth of a step and a hundredth
    of a second longer, `IN_A_ROW` times; and so no longer when it is half as far off (or less) as often. What is 0 was
    not measured, and shows nothing.
    """

    def __init__(self, factor: float, peers: Sequence[Sequence[int]], phases: int) -> None:
        """peers: ranks that do the same work, each rank in one list; phases: how many."""
        self._factor, self._peers = factor, [np.array(ranks) for ranks in peers]
        shape = (sum(map(len, peers)), phases)
        self.slow = np.zeros(shape, dtype=bool)
        """[ranks, phases]"""
        self._row = np.zeros(shape, dtype=np.int64)  # steps that show the other thing than `slow`
        self._first = np.zeros(shape, dtype=np.int64)
        self._seconds, self._others = np.zeros(shape), np.zeros(shape)  # summed over these steps
        self._to_come = WARM_UP

    def look(self, step: int, seconds: NDArray[np.float64]) -> list[Change]:
        """What a step shows, [ranks, phases] seconds; the worst first."""
        if self._to_come:
            self._to_come -= bool(seconds.any())
            return []
        if not self.slow.any() and not self._row.any() and (seconds.max(0) - seconds.min(0)).max() <= LEAST_SECONDS:
            return []  # as in most steps: nobody is late, and nobody was
        others = self._usual(seconds)
        late, seen = seconds - others, seconds > 0
        least = np.maximum(LEAST_SHARE * others.sum(1, keepdims=True), LEAST_SECONDS)
        is_late = (late > (self._factor - 1) * others) & (late > least)
        is_well = (late <= (self._factor - 1) / 2 * others) | (late <= least / 2)
        shows = seen & np.where(self.slow, is_well, is_late)
        self._first = np.where(shows & (self._row == 0), step, self._first)
        self._row = np.where(shows, self._row + 1, np.where(seen, 0, self._row))
        for sums, each in ((self._seconds, seconds), (self._others, others)):
            sums[:] = np.where(shows, sums + each, np.where(seen, 0.0, sums))
        changed = self._row >= IN_A_ROW
        self.slow ^= changed
        self._row[changed] = 0
        found = [self._change(rank, phase, step) for rank, phase in np.argwhere(changed).tolist()]
        self._seconds[changed] = self._others[changed] = 0.0
        return sorted(found, key=lambda c: c.others - c.seconds)

    def _usual(self, seconds: NDArray[np.float64]) -> NDArray[np.float64]:
        """For each rank that may be slow, the median of its peers' seconds without its own."""
        usual = seconds.copy()
        for ranks in self._peers:
            n = len(ranks)
            if n > 1:  # of the others of any rank in the upper half
                ordered = np.sort(seconds[ranks], axis=0)
                usual[ranks] = (ordered[(n - 2) // 2] + ordered[(n - 1) // 2]) / 2
        return usual

    def _change(self, rank: int, phase: int, step: int) -> Change:
        at = (rank, phase)
        seconds, others = float(self._seconds[at]) / IN_A_ROW, float(self._others[at]) / IN_A_ROW
        return Change(rank, phase, bool(self.slow[at]), seconds, others, (int(self._first[at]), step))
