"""Curves and bars made of characters. Each column shows the lowest and the highest value in it, so no spike is lost. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

BLOCKS: Final = "▁▂▃▄▅▆▇█"
BLOCKS_ASCII: Final = "_.-=+*#@"
_DOTS: Final = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # braille, left and right column, from the top
_BEGINNING: Final = 0.1  # share of the steps whose values do not set the scale: a loss starts far above
_LOG_RATIO: Final = 4.0  # above this ratio of the highest to the lowest value the scale is logarithmic

Column = tuple[float, float] | None  # lowest and highest value; None before the first and after the last


@dataclass(frozen=True)
class Series:
    """Values over steps: step `steps[i]` has values from `low[i]` to `high[i]`. Steps ascend."""

    steps: Sequence[int]
    low: Sequence[float]
    high: Sequence[float]

    @classmethod
    def of(cls, points: Sequence[tuple[int, float | None]]) -> Series:
        """Return the series of single values; skips None, NaN and Inf."""
        kept = [(step, value) for step, value in points if value is not None and math.isfinite(value)]
        values = [value for _, value in kept]
        return cls([step for step, _ in kept], values, values)

    def last(self, count: int) -> Series:
        """Return the last values only."""
        return Series(self.steps[-count:], self.low[-count:], self.high[-count:])

    def columns(self, count: int) -> list[Column]:
        """Return `count` columns of equal width in steps; a column without a value repeats the last value before it."""
        found: list[Column] = [None] * count
        ends: list[Column] = [None] * count
        if len(self.steps):
            first, span = self.steps[0], max(1, self.steps[-1] - self.steps[0])
            for step, low, high in zip(self.steps, self.low, self.high, strict=True):
                at = min(count - 1, int(step - first) * count // span)
                here = found[at]
                found[at] = (low, high) if here is None else (min(here[0], low), max(here[1], high))
                ends[at] = (low, high)
        for at in range(1, count):
            if found[at] is None:
                found[at] = ends[at] = ends[at - 1]
        return found


@dataclass(frozen=True)
class Scale:
    """Maps values to heights from 0 to 1; values outside are drawn at the edge."""

    bottom: float
    top: float
    logarithmic: bool = False

    @classmethod
    def of(cls, columns: Sequence[Column], *, from_zero: bool = False, spikes: Sequence[bool] = ()) -> Scale:
        """
        Return the scale of all columns after the first tenth, whose values may be far above.

        spikes: columns that take at most half of the height, so that they do not flatten the others.
        """
        begin = int(len(columns) * _BEGINNING)
        later = [(c, at < len(spikes) and spikes[at]) for at, c in enumerate(columns) if c is not None and at >= begin]
        top = max((c[1] for c, _ in later), default=1.0)
        usual = max((c[1] for c, spike in later if not spike), default=top)
        bottom = 0.0 if from_zero else min((c[0] for c, _ in later), default=0.0)
        if usual > bottom:
            top = min(top, usual + (usual - bottom))
        return cls(bottom, top, logarithmic=bottom > 0 and top / bottom > _LOG_RATIO)

    def height(self, value: float) -> float:
        """Return the height of a value."""
        bottom, top = self.bottom, self.top
        if top <= bottom:
            return 0.5
        if self.logarithmic:
            value, bottom, top = (math.log(max(each, self.bottom)) for each in (value, bottom, top))
        return min(1.0, max(0.0, (value - bottom) / (top - bottom)))


def blocks(columns: Sequence[Column], *, ascii_only: bool = False, from_zero: bool = False) -> str:
    """Return a line of one character for each column, as high as the highest value in it."""
    ramp = BLOCKS_ASCII if ascii_only else BLOCKS
    scale = Scale.of(columns, from_zero=from_zero)
    return "".join(" " if c is None else ramp[round(scale.height(c[1]) * (len(ramp) - 1))] for c in columns)


def chart(columns: Sequence[Column], rows: int, scale: Scale, *, ascii_only: bool = False) -> list[str]:
    """
    Return `rows` lines that draw each column from its lowest to its highest value.

    In braille, two columns share a character, and a line has four rows of dots.
    """
    down, across = (1, 1) if ascii_only else (4, 2)
    cells = [[0] * -(-len(columns) // across) for _ in range(rows)]
    for x, (bottom, top) in enumerate(_spans(columns, rows * down, scale)):
        for y in range(bottom, top + 1):
            row, dot = divmod(rows * down - 1 - y, down)
            cells[row][x // across] |= 1 if ascii_only else _DOTS[x % across][dot]
    if ascii_only:
        return ["".join(" #"[cell] for cell in row) for row in cells]
    return ["".join(chr(0x2800 + cell) if cell else " " for cell in row) for row in cells]


def _spans(columns: Sequence[Column], heights: int, scale: Scale) -> list[tuple[int, int]]:
    """Return the lowest and highest dot of each column; (0, -1) draws none. A column reaches the one before it, so lines are unbroken."""
    spans: list[tuple[int, int]] = []
    for column in columns:
        if column is None:
            spans.append((0, -1))
            continue
        bottom, top = (round(scale.height(value) * (heights - 1)) for value in column)
        before = spans[-1] if spans else (0, -1)
        if before[1] >= before[0]:
            bottom, top = min(bottom, before[1] + 1), max(top, before[0] - 1)
        spans.append((bottom, top))
    return spans


def outliers(columns: Sequence[Column], *, neighbors: int = 8, times: float = 8.0) -> list[bool]:
    """Return which columns reach far above those around them: `times` their robust spread."""
    found: list[bool] = []
    for at, column in enumerate(columns):
        around = [
            c[1]
            for c in (*columns[max(0, at - neighbors) : at], *columns[at + 1 : at + 1 + neighbors])
            if c is not None
        ]
        if column is None or len(around) < neighbors:
            found.append(False)
            continue
        middle = sorted(around)[len(around) // 2]
        spread = sorted(abs(value - middle) for value in around)[len(around) // 2]
        found.append(column[1] > middle + times * max(spread, 0.005 * abs(middle)))
    return found


def bar(share: float, width: int, *, ascii_only: bool = False) -> str:
    """Return a bar that is filled to `share`, from 0 to 1."""
    filled = round(min(1.0, max(0.0, share)) * width)
    full, empty = ("#", "-") if ascii_only else ("█", "░")
    return full * filled + empty * (width - filled)


def stacked(shares: Sequence[float], width: int) -> list[int]:
    """Return the cells of each part of a bar: they add up to `width` if the shares add up to 1."""
    ends, total = [], 0.0
    for share in shares:
        total += share
        ends.append(round(min(1.0, total) * width))
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
