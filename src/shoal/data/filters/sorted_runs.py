"""A growing map from keys to document numbers in sorted arrays, for millions of keys. No torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Keys = npt.NDArray[Any]  # [n], of any dtype that numpy sorts


class SortedRuns:
    """
    Keys with a document number each, in sorted runs: a key takes its own bytes plus four.

    A Python set of 16-byte digests takes about 90 bytes each. Equal keys keep the order in which they were added.
    Runs of similar length are merged, so there are about log2(n) runs, and a key is copied about as often.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[Keys, npt.NDArray[np.int32]]] = []  # the oldest first

    def add(self, keys: Keys, numbers: npt.ArrayLike) -> None:
        """Add keys [n] and their document numbers [n]."""
        if not len(keys):
            return
        self._runs.append(_sorted(keys, np.asarray(numbers, np.int32)))
        while len(self._runs) > 1 and len(self._runs[-2][0]) < 2 * len(self._runs[-1][0]):
            (old, old_numbers), (new, new_numbers) = self._runs[-2:]
            self._runs[-2:] = [_sorted(np.concatenate([old, new]), np.concatenate([old_numbers, new_numbers]))]

    def find(self, keys: Keys) -> tuple[Ints, Ints]:
        """Return (places in `keys`, document numbers) of every match, ordered by place and then by age."""
        places, numbers = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for run, run_numbers in self._runs:
            low, high = np.searchsorted(run, keys, "left"), np.searchsorted(run, keys, "right")
            found = np.flatnonzero(high > low)
            counts = (high - low)[found]
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            places.append(np.repeat(found, counts))
            numbers.append(run_numbers[np.repeat(low[found], counts) + within].astype(np.int64))
        place, number = np.concatenate(places), np.concatenate(numbers)
        order = np.argsort(place, kind="stable")
        return place[order], number[order]


def _sorted(keys: Keys, numbers: npt.NDArray[np.int32]) -> tuple[Keys, npt.NDArray[np.int32]]:
    order = np.argsort(keys, kind="stable")
    return keys[order], numbers[order]
