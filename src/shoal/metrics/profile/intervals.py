"""Arithmetic of intervals of time: pairs (start, stop), in any unit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return disjoint intervals in order that cover the same time; empty ones are dropped."""
    covered: list[Interval] = []
    for start, stop in sorted(intervals):
        if stop <= start:
            continue
        if covered and start <= covered[-1][1]:
            covered[-1] = (covered[-1][0], max(stop, covered[-1][1]))
        else:
            covered.append((start, stop))
    return covered


def intersection(left: Sequence[Interval], right: Sequence[Interval]) -> list[Interval]:
    """Return the time that both cover. Each must be disjoint and in order, as `union` returns it."""
    common: list[Interval] = []
    i = j = 0
    while i < len(left) and j < len(right):
        start, stop = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if start < stop:
            common.append((start, stop))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return common


def without(whole: Interval, holes: Iterable[Interval]) -> list[Interval]:
    """Return the parts of `whole` outside of all `holes`."""
    left, start = [], whole[0]
    for begin, end in union(holes):
        if begin > start:
            left.append((start, min(begin, whole[1])))
        start = max(start, end)
    if start < whole[1]:
        left.append((start, whole[1]))
    return [each for each in left if each[0] < each[1]]


def length(intervals: Iterable[Interval]) -> float:
    """Return the total length of disjoint intervals."""
    return sum(stop - start for start, stop in intervals)
