"""Curves of characters: what is highest is seen in every width."""

from __future__ import annotations

import random

import pytest

from shoal.report.live.spark import BLOCKS, Scale, Series, bar, blocks, chart, outliers, stacked


def dots(lines: list[str], column: int) -> set[int]:
    """Return the rows of dots, counted from the top, that are set in a column of a braille chart."""
    bits = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))[column % 2]
    codes = [ord(line[column // 2]) for line in lines]
    codes = [0 if code == ord(" ") else code - 0x2800 for code in codes]
    return {4 * row + at for row, code in enumerate(codes) for at, bit in enumerate(bits) if code & bit}


@pytest.mark.parametrize("count", [10, 60, 143])
def test_a_spike_of_one_step_reaches_the_top(count: int) -> None:
    draw = random.Random(7)
    for _ in range(10):
        spike = draw.randrange(600, 5_000)
        values = [3.0 + draw.gauss(0, 0.02) for _ in range(5_000)]
        values[spike] = 5.0
        series = Series.of(list(enumerate(values)))
        columns = series.columns(count)
        at = spike * count // 4_999
        assert max(range(count), key=lambda each: columns[each][1]) == at  # type: ignore[index]
        assert blocks(columns)[at] == BLOCKS[-1]
        marked = outliers(columns)
        lines = chart(columns, 5, Scale.of(columns, spikes=marked))
        assert 0 in dots(lines, at)
        assert count < 30 or marked[at]


def test_columns_hold_the_extremes_of_their_steps() -> None:
    draw = random.Random(1)
    points = [(step, draw.random()) for step in range(0, 1000, 3)]
    columns = Series.of(points).columns(50)
    for at, column in enumerate(columns):
        inside = [value for step, value in points if min(49, step * 50 // 999) == at]
        assert column == (min(inside), max(inside))


def test_few_points_are_held_until_the_next() -> None:
    series = Series.of([(10, 1.0), (20, None), (30, float("nan")), (40, 2.0)])
    assert series.columns(6) == [(1.0, 1.0)] * 5 + [(2.0, 2.0)]
    assert Series.of([]).columns(3) == [None] * 3
    assert blocks([None, (1.0, 1.0), (2.0, 2.0)]) == " ▁█"


def test_a_spike_does_not_flatten_the_curve() -> None:
    columns = [(2.0 + 0.001 * at, 2.0 + 0.001 * at) for at in range(100)]
    columns[60] = (2.06, 50.0)
    scale = Scale.of(columns, spikes=outliers(columns))
    assert scale.height(2.099) >= 0.45
    assert scale.height(50.0) == 1.0


def test_a_line_is_unbroken() -> None:
    columns = [(float(value), float(value)) for value in (0, 0, 10, 10, 3, 3)]
    lines = chart(columns, 3, Scale(0.0, 10.0))
    for left, right in zip(range(5), range(1, 6), strict=True):
        reach = dots(lines, left), dots(lines, right)
        assert min(abs(a - b) for a in reach[0] for b in reach[1]) <= 1
    assert [line.count("#") > 0 for line in chart(columns, 3, Scale(0.0, 10.0), ascii_only=True)] == [True] * 3


def test_bars() -> None:
    assert bar(0.5, 10) == "█████░░░░░"
    assert bar(2.0, 3, ascii_only=True) == "###"
    assert stacked([0.334, 0.333, 0.333], 10) == [3, 4, 3]
    assert sum(stacked([0.1] * 10, 73)) == 73
