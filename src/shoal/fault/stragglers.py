"""Finds the ranks that are slower than their peers, and in which phase, from their busy seconds. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

IN_A_ROW: Final = 6  # steps before a rank is reported slow, or not slow any more
WARM_UP: Final = 2  # steps ignored after a start: the first one compiles and allocates memory
LEAST_SHARE: Final = 0.05  # of a step's busy time: a smaller delay does not matter
LEAST_SECONDS: Final = 0.01  # other work on a machine may delay any rank by this much


@dataclass(frozen=True)
class Change:
    """A rank that became slow in a phase, or recovered, with its mean seconds and its peers' over `steps`."""

    rank: int
    phase: int
    is_slow: bool
    seconds: float
    others: float
    steps: tuple[int, int]  # the first and the last step that showed the change


class Stragglers:
    """
    Compares each rank's seconds in each phase with the median of its peers, itself excluded.

    A rank becomes slow in a phase after `IN_A_ROW` consecutive steps that take more than `factor` times the median, and exceed it
    by a twentieth of a step and a hundredth of a second. It recovers after as many steps with at most half that excess. A time
    of 0 was not measured and is ignored.
    """

    def __init__(self, factor: float, peers: Sequence[Sequence[int]], phases: int) -> None:
        """peers: lists of ranks with equal work, each rank in one list. phases: number of phases."""
        self._factor, self._peers = factor, [np.array(ranks) for ranks in peers]
        shape = (sum(map(len, peers)), phases)
        self.slow = np.zeros(shape, dtype=bool)
        """Whether each rank is slow in each phase: [ranks, phases]."""
        self._row = np.zeros(shape, dtype=np.int64)  # consecutive steps that contradict `slow`
        self._first = np.zeros(shape, dtype=np.int64)
        self._seconds, self._others = np.zeros(shape), np.zeros(shape)  # sums over these steps
        self._to_come = WARM_UP

    def look(self, step: int, seconds: NDArray[np.float64]) -> list[Change]:
        """Return the changes that a step shows, the worst first. seconds: [ranks, phases]."""
        if self._to_come:
            self._to_come -= bool(seconds.any())
            return []
        if not self.slow.any() and not self._row.any() and (seconds.max(0) - seconds.min(0)).max() <= LEAST_SECONDS:
            return []  # the usual case: no rank is late, and none was
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
        """
        Return for each rank the median seconds of its peers without itself; its own seconds if it has no peers.

        The median is exact for ranks in the slower half, which are the only ones that can be slow.
        """
        usual = seconds.copy()
        for ranks in self._peers:
            n = len(ranks)
            if n > 1:  # the median without oneself, for any rank in the slower half
                ordered = np.sort(seconds[ranks], axis=0)
                usual[ranks] = (ordered[(n - 2) // 2] + ordered[(n - 1) // 2]) / 2
        return usual

    def _change(self, rank: int, phase: int, step: int) -> Change:
        """Describe a rank that has just changed."""
        at = (rank, phase)
        seconds, others = float(self._seconds[at]) / IN_A_ROW, float(self._others[at]) / IN_A_ROW
        return Change(rank, phase, bool(self.slow[at]), seconds, others, (int(self._first[at]), step))
