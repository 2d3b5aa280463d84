"""Arithmetic of intervals, compared with sets of whole numbers."""

from __future__ import annotations

import itertools
import random

import pytest

from shoal.metrics.profile.intervals import Interval, intersection, length, union, without


def cells(intervals: list[Interval]) -> set[int]:
    return {cell for start, stop in intervals for cell in range(int(start), int(stop))}


def drawn(chance: random.Random, count: int) -> list[Interval]:
    starts = [chance.randrange(100) for _ in range(count)]
    return [(start, start + chance.randrange(12)) for start in starts]


@pytest.mark.parametrize("seed", range(50))
def test_intervals_are_sets_of_time(seed: int) -> None:
    chance = random.Random(seed)
    left, right = drawn(chance, chance.randrange(20)), drawn(chance, chance.randrange(20))
    one, other = union(left), union(right)
    assert cells(one) == cells(left)
    assert length(one) == len(cells(left))
    assert all(a[1] < b[0] for a, b in itertools.pairwise(one))  # disjoint, in order, not even touching
    assert cells(intersection(one, other)) == cells(left) & cells(right)
    assert length(intersection(one, other)) == len(cells(left) & cells(right))
    assert cells(without((10, 90), right)) == set(range(10, 90)) - cells(right)


def test_nothing_is_nothing() -> None:
    assert union([]) == intersection([], [(0, 1)]) == without((3, 3), []) == []
    assert without((0, 4), [(0, 4)]) == []
