"""
The lines of one kind of a log as columns: steps, tokens and seconds of each, and a pyramid for each value. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shoal.report.curves.numbers import Block
from shoal.report.curves.pyramid import Floats, Ints, Pyramid
from shoal.report.curves.stored import StoredArrays

NOT_SERIES: Final = ("step", "tokens", "replica")
NULL_IS_A_POINT: Final = ("grad_norm",)  # null if float16 overflowed: there was a gradient, and it was not finite


@dataclass
class Series:
    """
    One value of the lines.

    rows: the line of each point, ascending; None if point i is of line i.
    """

    pyramid: Pyramid = field(default_factory=Pyramid)
    rows: Ints | None = None
    _waiting: list[Ints] = field(default_factory=list)

    def add(self, rows: Ints, values: Floats) -> None:
        """Add points at these rows."""
        have = len(self.pyramid)
        if self.rows is None and (not len(rows) or rows[0] != have or rows[-1] != have + len(rows) - 1):
            self.rows = np.arange(have, dtype=np.int64)
        if self.rows is not None:
            self._waiting.append(rows)
        self.pyramid.add(values)

    def all_rows(self) -> Ints:
        """Return the row of every point."""
        if self.rows is None:
            return np.arange(len(self.pyramid), dtype=np.int64)
        if self._waiting:
            self.rows = np.concatenate([self.rows, *self._waiting])
            self._waiting.clear()
        return self.rows

    def cut(self, rows: int) -> None:
        """Keep the points of the first `rows` rows."""
        points = int(np.searchsorted(self.all_rows(), rows))
        self.pyramid.cut(points)
        if self.rows is not None:
            self.rows = self.rows[:points]


class Table:
    """
    The lines of one kind: of steps or of evaluations.

    `step`, `tokens` and `seconds` have one entry a line; `seconds` is the time in steps so far, from `step_seconds`.
    """

    def __init__(
        self, stored: StoredArrays | None = None, name: str = "", series: Mapping[str, str] | None = None
    ) -> None:
        self._stored, self._stored_series = stored, dict(series or {})
        self.step: Ints = self._array(f"{name}.step", np.int64)
        self.tokens: Ints = self._array(f"{name}.tokens", np.int64)
        self.seconds: Floats = self._array(f"{name}.seconds", np.float64)
        self._series: dict[str, Series] = {}

    def _array(self, name: str, dtype: Any) -> NDArray[Any]:
        return self._stored.array(name) if self._stored else np.empty(0, dtype)

    def __len__(self) -> int:
        return len(self.step)

    @property
    def names(self) -> list[str]:
        """The names of the series."""
        return [*self._stored_series, *(name for name in self._series if name not in self._stored_series)]

    def series(self, name: str) -> Series:
        """Return a series, read from the cache when it is first asked for; an empty one if there is none."""
        if name not in self._series:
            self._series[name] = self._read(self._stored_series[name]) if name in self._stored_series else Series()
        return self._series[name]

    def _read(self, key: str) -> Series:
        assert self._stored is not None
        pyramid = Pyramid.stored(self._stored.array(f"{key}.values"), self._stored.array(f"{key}.levels"))
        rows = f"{key}.rows"
        return Series(pyramid, self._stored.array(rows) if rows in self._stored else None)

    def as_arrays(self, name: str) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
        """Return the key of each series, and the arrays to store."""
        arrays: dict[str, NDArray[Any]] = {
            f"{name}.step": self.step,
            f"{name}.tokens": self.tokens,
            f"{name}.seconds": self.seconds,
        }
        keys = {each: f"{name}.{number}" for number, each in enumerate(self.names)}
        for each, key in keys.items():
            series = self.series(each)
            arrays[f"{key}.values"], arrays[f"{key}.levels"] = series.pyramid.as_stored()
            if series.rows is not None:
                arrays[f"{key}.rows"] = series.all_rows()
        return keys, arrays

    def cut_from(self, step: int) -> None:
        """Drop the lines of `step` and of later steps: they were taken again."""
        rows = int(np.searchsorted(self.step, step))
        if rows == len(self):
            return
        for name in self.names:
            self.series(name).cut(rows)
        self.step, self.tokens, self.seconds = self.step[:rows], self.tokens[:rows], self.seconds[:rows]

    def add(self, blocks: list[Block]) -> None:
        """Add lines, whose steps ascend and come after those that are here."""
        lines = np.sort(np.concatenate([block.lines for block in blocks]))
        rows_of = [np.searchsorted(lines, block.lines) for block in blocks]
        base = len(self)
        step, tokens = np.empty(len(lines), np.int64), np.empty(len(lines), np.int64)
        step_seconds = np.zeros(len(lines))
        points: dict[str, list[tuple[Ints, Floats]]] = {}
        for block, rows in zip(blocks, rows_of, strict=True):
            for name, values in _columns(block):
                points.setdefault(name, []).append((rows + base, values))
            step[rows], tokens[rows] = _integers(block, "step"), _integers(block, "tokens")
            if "step_seconds" in block.names:
                step_seconds[rows] = block.values[:, block.names.index("step_seconds")]
        for name, parts in points.items():
            rows, values = (np.concatenate(each) for each in zip(*parts, strict=True))
            order = np.argsort(rows, kind="stable")
            self.series(name).add(rows[order], values[order])
        self._add_axes(step, tokens, step_seconds)

    def _add_axes(self, step: Ints, tokens: Ints, step_seconds: Floats) -> None:
        last, spent = (self.step[-1], self.seconds[-1]) if len(self) else (0, 0.0)
        taken = np.diff(step, prepend=last)
        lasted = np.where(np.isfinite(step_seconds) & (step_seconds > 0), step_seconds, 0.0) * taken
        self.step = np.concatenate([self.step, step])
        self.tokens = np.concatenate([self.tokens, tokens])
        self.seconds = np.concatenate([self.seconds, np.cumsum(np.concatenate([[spent], lasted]))[1:]])


def _columns(block: Block) -> Iterator[tuple[str, Floats]]:
    """Yield the values of the series that a block has points of; null is a point only for those of `NULL_IS_A_POINT`."""
    for column, name in enumerate(block.names):
        if name not in NOT_SERIES and (name not in block.nulls or name in NULL_IS_A_POINT):
            yield name, block.values[:, column]


def _integers(block: Block, name: str) -> Ints:
    if name not in block.names:
        return np.zeros(len(block.lines), np.int64)
    values = block.values[:, block.names.index(name)]
    return np.where(np.isfinite(values), values, 0.0).astype(np.int64)
