"""
The order of a blend: which row of which source is at each position, and its inverse. No torch, no state.

    position -> (source, sample of this source) -> row

Sources with weights take turns in a fixed periodic pattern. After any number of positions, the samples of each source
differ from its quota (its share of the positions) by less than one. `order.py` then gives the row of a source's n-th sample.
Sources without weights are one shuffled whole: each row once per epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from math import ceil, gcd, inf

import numpy as np
import numpy.typing as npt

from shoal.data.order.order import Ints, position_of, sample_at

MAX_PERIOD = 1 << 16  # shares are rounded to 1/65,536 if the weights have no smaller common denominator


@dataclass(frozen=True)
class Stage:
    """The shares of the sources from position `first` on: whole numbers, 0 for a source that is not read."""

    first: int
    shares: tuple[int, ...]


def shares_of(weights: Sequence[float]) -> tuple[int, ...]:
    """
    Return whole numbers in the ratio of `weights`, with a sum of at most MAX_PERIOD.

    The ratio is exact if it has such a sum; otherwise each share is rounded, to at least 1 for a positive weight.
    Raises ValueError if a weight is negative or all are 0.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    if min(exact) < 0 or not total:
        raise ValueError(f"weights must not be negative, nor all 0: {list(weights)}")
    scale = np.lcm.reduce([each.denominator for each in exact], dtype=object)
    whole = [int(each * scale) for each in exact]
    whole = [each // gcd(*whole) for each in whole]
    if sum(whole) <= MAX_PERIOD:
        return tuple(whole)
    parts = [each * MAX_PERIOD / total for each in exact]
    found = [max(int(part), 1 if part else 0) for part in parts]
    # The largest remainders are rounded up. The sum may exceed MAX_PERIOD by the tiny shares that were raised to 1.
    by_remainder = sorted(range(len(parts)), key=lambda i: int(parts[i]) - parts[i])
    for source in by_remainder[: max(0, MAX_PERIOD - sum(found))]:
        found[source] += 1
    return tuple(found)


class _Segment:
    """Positions [first, ...) in which the sources take turns by fixed shares, in a pattern of `period` positions."""

    def __init__(self, first: int, shares: Sequence[int], taken: Sequence[int], owed: Sequence[Fraction]) -> None:
        """
        Lay out the pattern.

        taken: samples of each source before `first`. owed: how far each source is behind its quota there.
        """
        self.first, self.shares, self.taken, self.owed = first, tuple(shares), tuple(taken), tuple(owed)
        self.period = sum(shares)
        self._source = np.array(_pattern(self.shares, self.owed), np.int64)
        # place of each position among those of its source in the period, and the inverse
        self._slots = [np.flatnonzero(self._source == source) for source in range(len(shares))]
        self._place: Ints = np.zeros(self.period, np.int64)
        for slots in self._slots:
            self._place[slots] = np.arange(len(slots))

    def at(self, positions: Ints) -> tuple[Ints, Ints]:
        """Return the source at each position, and the number of this sample among the samples of its source."""
        turn, slot = np.divmod(positions - self.first, self.period)
        source: Ints = self._source[slot]
        shares, taken = np.array(self.shares, np.int64), np.array(self.taken, np.int64)
        return source, np.asarray(taken[source] + turn * shares[source] + self._place[slot], np.int64)

    def position_of(self, source: int, samples: Ints) -> Ints:
        """Return the positions of a source's samples, in this segment if it lasts long enough."""
        turn, place = np.divmod(samples - self.taken[source], self.shares[source])
        positions: Ints = self.first + turn * self.period + self._slots[source][place]
        return positions

    def taken_at(self, positions: Ints) -> Ints:
        """Return how many samples of each source come before each position, [positions, sources]."""
        turn, slot = np.divmod(positions - self.first, self.period)
        within = np.stack([np.searchsorted(slots, slot) for slots in self._slots], axis=-1)
        taken: Ints = np.array(self.taken) + turn[..., None] * np.array(self.shares) + within
        return taken

    def owed_at(self, position: int) -> list[Fraction]:
        """Return how far each source is behind its quota at `position`, in samples."""
        passed = position - self.first
        return [
            owed + Fraction(share * passed, self.period) - (now - before)
            for owed, share, now, before in zip(
                self.owed, self.shares, self.taken_at(np.array(position)).tolist(), self.taken, strict=True
            )
        ]


def _pattern(shares: Sequence[int], owed: Sequence[Fraction]) -> list[int]:
    """
    Return the source at each position of a period, so that each source stays within one sample of its quota.

    The j-th sample of a source must not come before its quota exceeds j - 1, nor after its quota reaches j: each has a
    release and a deadline. The released sample with the earliest deadline goes first (Steiner and Yeomans 1993,
    https://doi.org/10.1287/mnsc.39.6.728; Tijdeman 1980, https://doi.org/10.1016/0012-365X(80)90269-1).
    """
    period = sum(shares)
    windows = {source: _windows(share, period, owed[source]) for source, share in enumerate(shares) if share}
    waiting = {source: next(window) for source, window in windows.items()}
    found = []
    for slot in range(period):
        released = [s for s, (release, _) in waiting.items() if release <= slot] or list(waiting)
        source = min(released, key=lambda s: (waiting[s][1], s))
        found.append(source)
        following = next(windows[source], None)
        if following is None:
            del waiting[source]
        else:
            waiting[source] = following
    return found


def _windows(share: int, period: int, owed: Fraction) -> Iterator[tuple[int, int]]:
    """Yield the first and the last slot allowed for each sample of a source: its quota at slot n is n share/period + owed."""
    up, down = owed.numerator, owed.denominator
    for sample in range(share):
        release = (sample * down - up) * period // (share * down)
        deadline = -(-((sample + 1) * down - up) * period // (share * down)) - 1
        yield max(0, release), min(period - 1, deadline)


class Blend:
    """
    The rows of several sources in the order of training.

    seed: the order's seed. sizes: rows of each source; a row's number counts the rows of the sources before it.
    stages: the shares by position, the first from position 0 on; none for sources without weights. max_epochs: how
    often each source may be read at most; inf for no limit. A source that has been read so often is dropped, and the
    others keep their ratio.

    Raises ValueError if the stages do not begin at 0 or are not in order, or a share is invalid.
    """

    def __init__(
        self, seed: int, sizes: Sequence[int], stages: Sequence[Stage] = (), max_epochs: Sequence[float] = ()
    ) -> None:
        self.seed, self.sizes, self.stages = seed, tuple(sizes), tuple(stages)
        self.max_epochs = tuple(max_epochs) or (inf,) * len(self.sizes)
        firsts = [stage.first for stage in self.stages]
        if firsts and (firsts[0] != 0 or firsts != sorted(set(firsts))):
            raise ValueError(f"stages must begin at 0 and ascend: {firsts}")
        self._sizes = np.array(self.sizes, np.int64)
        self._offsets = np.array([0, *accumulate(self.sizes)], np.int64)
        self.num_rows = int(self._offsets[-1])
        self.end: float = inf if self.stages else min(self.max_epochs) * self.num_rows
        """First position without a row, because no source may be read again."""
        self._segments = self._lay_out() if self.stages else []
        self._firsts = np.array([segment.first for segment in self._segments], np.int64)

    @cached_property
    def _limits(self) -> list[float]:
        """How many samples of each source may be taken."""
        return [size * epochs for size, epochs in zip(self.sizes, self.max_epochs, strict=True)]

    def _lay_out(self) -> list[_Segment]:
        """Return a segment for each stage, and a further one wherever a source is used up."""
        segments: list[_Segment] = []
        taken, owed = [0] * len(self.sizes), [Fraction(0)] * len(self.sizes)
        stops: list[float] = [*(stage.first for stage in self.stages[1:]), inf]
        for stage, stop in zip(self.stages, stops, strict=True):
            first: float = stage.first
            while first < stop:
                shares = [s if t < limit else 0 for s, t, limit in zip(stage.shares, taken, self._limits, strict=True)]
                if not any(shares):
                    self.end = first
                    return segments
                segment = _Segment(int(first), _reduced(shares), taken, _handed_on(shares, owed))
                segments.append(segment)
                first = min(stop, self._used_up(segment))
                if first < inf:
                    taken, owed = segment.taken_at(np.array(int(first))).tolist(), segment.owed_at(int(first))
        return segments

    def _used_up(self, segment: _Segment) -> float:
        """Return the position after which the first source of a segment has reached its limit."""
        ends = [
            int(segment.position_of(source, np.array(ceil(limit) - 1))) + 1
            for source, limit in enumerate(self._limits)
            if segment.shares[source] and limit < inf
        ]
        return min(ends, default=inf)

    def rows_at(self, positions: npt.ArrayLike) -> Ints:
        """Return the row at each of `positions`; same shape. Raises ValueError for a position from `end` on."""
        at = np.atleast_1d(np.asarray(positions, np.int64))
        if at.size and at.max() >= self.end:
            raise ValueError(f"no source may be read again from position {self.end:.0f} on")
        if not self._segments:
            return sample_at(self.seed, positions, self.num_rows)
        rows = np.empty(at.shape, np.int64)
        which = np.searchsorted(self._firsts, at, side="right") - 1
        for index in np.unique(which):
            here = which == index
            rows[here] = self._rows(*self._segments[index].at(at[here]))
        return rows.reshape(np.shape(positions))

    def _rows(self, sources: Ints, samples: Ints) -> Ints:
        own = sample_at(self.seed, samples, self._sizes[sources], sources)
        return own + self._offsets[sources]

    def sources_of(self, rows: npt.ArrayLike) -> Ints:
        """Return the source of each row."""
        return np.searchsorted(self._offsets, np.asarray(rows, np.int64), side="right") - 1

    def locate(self, row: int) -> tuple[int, int]:
        """Return the source of a row, and the row's number there."""
        source = int(self.sources_of(row))
        return source, row - self.first_row(source)

    def first_row(self, source: int) -> int:
        """Return the number of a source's first row."""
        return int(self._offsets[source])

    @property
    def lanes(self) -> tuple[int, ...]:
        """Rows that are shuffled together: those of each source or, without weights, of all."""
        return self.sizes if self.stages else (self.num_rows,)

    def taken_at(self, positions: npt.ArrayLike) -> Ints:
        """Return how many samples of each lane come before each position, [positions, lanes]."""
        at = np.atleast_1d(np.asarray(positions, np.int64))
        if not self._segments:
            return at[:, None].copy()
        taken = np.empty((len(at), len(self.sizes)), np.int64)
        which = np.searchsorted(self._firsts, at, side="right") - 1
        for index in np.unique(which):
            taken[which == index] = self._segments[index].taken_at(at[which == index])
        return taken

    def positions_of(self, rows: npt.ArrayLike, stop: int) -> tuple[Ints, Ints]:
        """
        Return where rows are trained on below position `stop`, once per epoch of their source.

        rows: at least one, all of one source. Two arrays of equal length: an index into `rows`, and a position, ascending.
        """
        wanted = np.atleast_1d(np.asarray(rows, np.int64))
        source = int(self.sources_of(wanted[0])) if self._segments else 0
        size, first = (self.sizes[source], self.first_row(source)) if self._segments else (self.num_rows, 0)
        stop = int(min(stop, self.end))
        samples = int(self.taken_at(stop)[0, source])
        epochs = np.arange(-(-samples // size))
        found = position_of(self.seed, wanted[:, None] - first, epochs, size, source)
        index, epoch = np.nonzero(found < samples)
        positions = self._positions(source, found[index, epoch])
        order = np.argsort(positions, kind="stable")
        return index[order], positions[order]

    def _positions(self, source: int, samples: Ints) -> Ints:
        """Return the position of each of these samples of a source."""
        if not self._segments:
            return samples
        positions = np.empty(len(samples), np.int64)
        # later segments overwrite: the last that reads the source, and begins with at most as many samples, holds
        for segment in self._segments:
            here = np.flatnonzero(samples >= segment.taken[source]) if segment.shares[source] else ()
            if len(here):
                positions[here] = segment.position_of(source, samples[here])
        return positions


def _reduced(shares: Sequence[int]) -> list[int]:
    """Return the shares divided by their greatest common divisor."""
    divisor = gcd(*shares)
    return [share // divisor for share in shares]


def _handed_on(shares: Sequence[int], owed: Sequence[Fraction]) -> list[Fraction]:
    """Return what each source is owed; what sources without a share were owed goes to the others, by their shares."""
    left = sum((o for share, o in zip(shares, owed, strict=True) if not share), Fraction(0))
    return [o + left * share / sum(shares) if share else Fraction(0) for share, o in zip(shares, owed, strict=True)]
