"""
A series of points and its pyramid: minimum, maximum and sum of every 16, 32, 64, ... points. No torch.

A window reads a few buckets of the level that fits, so its time depends on the width of the picture, not on the number of
points; a spike of one point is the maximum of its bucket at every level.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BASE: Final = 16  # points in a block of the lowest level; fewer points are reduced when a window asks for them
LOW, HIGH, TOTAL, COUNT = range(4)  # the rows of a level


def reduced(values: Floats, starts: Ints) -> Floats:
    """
    Return minimum, maximum, sum and number of the finite values of each bucket: an array of shape [4, buckets].

    starts: the index where each bucket begins, ascending; the last one ends with `values`. Minimum and maximum of a bucket
    without a finite value are infinite.
    """
    finite = np.isfinite(values)
    levels = np.empty((4, len(starts)))
    if not len(starts):
        return levels
    levels[LOW] = np.minimum.reduceat(np.where(finite, values, np.inf), starts)
    levels[HIGH] = np.maximum.reduceat(np.where(finite, values, -np.inf), starts)
    levels[TOTAL] = np.add.reduceat(np.where(finite, values, 0.0), starts)
    levels[COUNT] = np.add.reduceat(finite.astype(np.float64), starts)
    return levels


def _lowest(values: Floats) -> Floats:
    """Return the lowest level: one block for each `BASE` values; the values are a whole number of blocks."""
    blocks = values.reshape(-1, BASE)
    finite = np.isfinite(blocks)
    return np.stack(
        [
            np.where(finite, blocks, np.inf).min(axis=1),
            np.where(finite, blocks, -np.inf).max(axis=1),
            np.where(finite, blocks, 0.0).sum(axis=1),
            finite.sum(axis=1).astype(np.float64),
        ]
    )


def _halved(level: Floats) -> Floats:
    """Return the level above: each block covers two of `level`, which has an even number of them."""
    pairs = level.reshape(4, -1, 2)
    return np.stack(
        [pairs[LOW].min(axis=1), pairs[HIGH].max(axis=1), pairs[TOTAL].sum(axis=1), pairs[COUNT].sum(axis=1)]
    )


def level_sizes(points: int) -> Iterator[int]:
    """Yield the number of whole blocks of each level above `points` points, from the lowest."""
    blocks = points // BASE
    while blocks:
        yield blocks
        blocks //= 2


def bucket_width(first: int, stop: int, columns: int) -> int:
    """Return the smallest power of two of points that divides the points [first, stop) into at most `columns` buckets."""
    width = 1
    while stop > first and (stop - 1) // width - first // width + 1 > max(columns, 1):
        width *= 2
    return width


@dataclass
class Pyramid:
    """The points of one series with the levels above them. Points are only added at the end, or cut from it."""

    values: Floats = field(default_factory=lambda: np.empty(0))
    levels: list[Floats] = field(default_factory=list)
    _waiting: list[Floats] = field(default_factory=list)

    @classmethod
    def stored(cls, values: Floats, levels: Floats) -> Pyramid:
        """Return the pyramid that was stored as its values and its levels, one behind the other."""
        ends = np.cumsum([0, *level_sizes(len(values))])
        return cls(values, [levels[:, a:b] for a, b in itertools.pairwise(ends)])

    def as_stored(self) -> tuple[Floats, Floats]:
        """Return the values and all levels in one array of shape [4, blocks]."""
        self._join()
        return self.values, np.concatenate([np.empty((4, 0)), *self.levels], axis=1)

    def __len__(self) -> int:
        return len(self.values) + sum(map(len, self._waiting))

    def add(self, values: Floats) -> None:
        """Add points. They are joined to the others when a window needs them: most series are never looked at."""
        self._waiting.append(values)

    def cut(self, points: int) -> None:
        """Keep only the first `points` points."""
        self._join()
        self.values = self.values[:points]
        self.levels = [level[:, :size] for level, size in zip(self.levels, level_sizes(points), strict=False)]

    def window(self, first: int, stop: int, columns: int) -> tuple[Ints, Floats]:
        """
        Return where each bucket of the points [first, stop) begins, and its [4, buckets] minimum, maximum, sum, count.

        A bucket has `bucket_width` points, and begins at a multiple of it, so buckets stay the same while a run adds points;
        the first and the last one may be partial.
        """
        self._join()
        width = bucket_width(first, stop, columns)
        starts = np.arange(first - first % width, stop, width, dtype=np.int64).clip(min=first)
        if width == 1:
            values = self.values[first:stop]
            finite = np.isfinite(values)
            filled = [np.where(finite, values, other) for other in (np.inf, -np.inf, 0.0)]
            return starts, np.stack([*filled, finite.astype(np.float64)])
        if width < BASE:
            return starts, reduced(self.values[first:stop], starts - first)
        whole, end = -(-first // width), stop // width  # the blocks that are inside the window
        if whole >= end:  # one or two partial buckets
            return starts, reduced(self.values[first:stop], starts - first)
        level = self.levels[(width // BASE).bit_length() - 1][:, whole:end]
        head, tail = self.values[first : whole * width], self.values[end * width : stop]
        parts = [reduced(part, np.zeros(min(len(part), 1), np.int64)) for part in (head, tail)]
        return starts, np.concatenate([parts[0], level, parts[1]], axis=1)

    def _join(self) -> None:
        """Append the points that wait, and add the blocks that they complete."""
        if not self._waiting:
            return
        self.values = np.concatenate([self.values, *self._waiting])
        self._waiting.clear()
        below = self.values
        for number, blocks in enumerate(level_sizes(len(self.values))):
            if number == len(self.levels):
                self.levels.append(np.empty((4, 0)))
            have = self.levels[number].shape[1]
            if blocks > have:
                new = (
                    _lowest(below[have * BASE : blocks * BASE])
                    if number == 0
                    else _halved(below[:, 2 * have : 2 * blocks])
                )
                self.levels[number] = np.concatenate([self.levels[number], new], axis=1)
            below = self.levels[number]
