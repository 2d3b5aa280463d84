"""
`shoal compare A.json B.json`: two results of the same benchmark, row by row: is B faster, slower, the same, or is it unknown? No torch.

A figure's repeats are compared on a logarithmic scale, by Welch's t-test, as runs are (report/compare/difference.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shoal.bench.result import FIGURES, Result, Row
from shoal.bench.table import table
from shoal.errors import ShoalError
from shoal.report.compare.difference import Difference, Value, between

WORDS: Final = {"bytes": ("less", "more"), "": ("better", "worse")}  # by unit; all others are speeds
SPEED: Final = ("faster", "slower")
# Facts of a row that are measured, and not chosen
MEASURED: Final = frozenset({"split", "parts", "allocated_by_rank", "different_tokens", "devices", "shares_cores"})
SAME: Final = 0.05  # relative difference that is too small to matter
SHOWN: Final = 12  # differences in a warning


@dataclass(frozen=True)
class Judged:
    """A figure of a row in both results. a, b: medians. difference: of logarithms, B - A."""

    row: str
    figure: str
    a: float
    b: float
    difference: Difference

    @property
    def verdict(self) -> str:
        """
        Return "faster" or "slower", "less" or "more", "better" or "worse" beyond noise; else "same" if the interval is within
        `SAME`, or "cannot tell".
        """
        if not self.difference.is_real:
            low, high = self.interval
            return "same" if low > 1 - SAME and high < 1 + SAME else "cannot tell"
        return WORDS.get(FIGURES[self.figure].unit, SPEED)[not self.is_better]

    @property
    def is_better(self) -> bool:
        """Whether B has the better value, beyond noise."""
        return self.difference.is_real and (self.difference.estimate > 0) == (FIGURES[self.figure].better == "more")

    @property
    def is_worse(self) -> bool:
        """Whether B has the worse value, beyond noise."""
        return self.difference.is_real and not self.is_better

    @property
    def interval(self) -> tuple[float, float]:
        """The interval of the ratio B / A."""
        low, high = map(math.exp, self.difference.interval)
        return low, high


@dataclass(frozen=True)
class Versus:
    """The comparison of two results. warnings: differences of hardware or config, which may be the cause. notes: others."""

    a: Result
    b: Result
    judged: Sequence[Judged]
    warnings: Sequence[str]
    notes: Sequence[str]

    @property
    def is_worse(self) -> bool:
        """Whether any figure of B is worse, beyond noise."""
        return any(each.is_worse for each in self.judged)

    def lines(self) -> list[str]:
        """Return the comparison in words and a table."""
        return [*(f"warning: {each}" for each in self.warnings), *_table(self.judged), "", *self.notes]

    def as_json(self) -> dict[str, Any]:
        """Return the comparison for `--json`."""
        rows = [
            {"row": j.row, "figure": j.figure, "unit": FIGURES[j.figure].unit, "a": j.a, "b": j.b, "verdict": j.verdict,
             "ratio": math.exp(j.difference.estimate), "ratio_interval": list(j.interval), **j.difference.as_json()}
            for j in self.judged
        ]  # fmt: skip
        return {"benchmark": self.a.verb, "rows": rows, "warnings": list(self.warnings), "notes": list(self.notes)}


def compare_results(a: Result, b: Result, *, noise: float, level: float) -> Versus:
    """
    Compare two results of one benchmark.

    noise: standard deviation between runs, relative, that is assumed for figures with one repeat on each side. level: the
    probability of calling an equal figure different. Raises `ShoalError` if they are of different benchmarks, or have no row
    in common.
    """
    if a.verb != b.verb:
        raise ShoalError(f"A is of shoal {a.verb} and B of shoal {b.verb}; compare results of the same benchmark")
    theirs = {row.name: row for row in b.rows}
    both = [(row, theirs[row.name]) for row in a.rows if row.name in theirs]
    judged = [each for mine, other in both for each in _judge(mine, other, noise, level)]
    if not judged:
        raise ShoalError(f"the results have no row in common: A has {_names(a)}; B has {_names(b)}")
    return Versus(a, b, judged, list(_warnings(a, b, both)), list(_notes(a, b, judged)))


def _names(result: Result) -> str:
    return "; ".join(row.name for row in result.rows)


def _judge(mine: Row, other: Row, noise: float, level: float) -> Iterator[Judged]:
    """Yield each figure of a row for which a better value exists, and which both results have."""
    for name, values in mine.figures.items():
        figure = FIGURES.get(name)
        if figure is None or figure.better is None or not other.figures.get(name) or not values:
            continue
        if min(*values, *other.figures[name]) <= 0:  # no logarithm
            continue
        logs = [[Value(math.log(v)) for v in each] for each in (values, other.figures[name])]
        difference = between(logs[0], logs[1], assumed_noise=noise, level=level)
        yield Judged(mine.name, name, mine.median(name), other.median(name), difference)


def _warnings(a: Result, b: Result, both: Sequence[tuple[Row, Row]]) -> Iterator[str]:
    """Yield what differs, and may be the cause of any difference of speed."""
    hardware = [{**each.hardware, "instructions": each.instructions} for each in (a, b)]
    if said := _apart(*hardware):
        yield f"not the same hardware: {said}; any difference may be the hardware's"
    if said := _apart(a.recipe["options"], b.recipe["options"]):
        yield f"not the same config: {said}"
    for mine, other in both:
        chosen = [{k: v for k, v in row.facts.items() if k not in MEASURED} for row in (mine, other)]
        if said := _apart(*chosen):
            yield f"not the same case, {mine.name}: {said}"


def _notes(a: Result, b: Result, judged: Sequence[Judged]) -> Iterator[str]:
    """Yield what else a reader of the verdicts must know."""
    versions = [{"commit": each.commit, **each.versions} for each in (a, b)]
    yield f"versions: {_apart(*versions) or 'the same'}"
    for name, one, other in (("A", a, b), ("B", b, a)):
        names = {row.name for row in other.rows}
        if alone := [row.name for row in one.rows if row.name not in names]:
            yield f"only in {name}: {'; '.join(alone)}"
    first = judged[0].difference
    yield f"{1 - first.level:.0%} intervals of the ratio B / A: {first.how.replace('runs', 'repeats').replace('run', 'repeat')}"
    if any(each.verdict == "cannot tell" for each in judged):
        yield f"cannot tell: the interval has 1 in it, and more than {SAME:.0%} on a side; more --repeats make it shorter"
    yield (
        "intervals cover noise between repeats, not a machine that was busier during one of the two; ratios to a matrix product or a "
        "peer, measured in the same run, cancel that"
    )


def _apart(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """Return the values that differ, by name; empty if none does."""
    keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    said = [f"{key} {_value(a, key)} in A, {_value(b, key)} in B" for key in keys[:SHOWN]]
    more = f"; and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return "; ".join(said) + more


def _value(values: Mapping[str, Any], key: str) -> str:
    return str(values[key]) if values.get(key) not in (None, "") else "none"


def _table(judged: Sequence[Judged]) -> list[str]:
    columns: dict[str, list[str]] = {title: [] for title in ("row", "figure", "A", "B", "B / A", "interval", "B is")}
    for each in judged:
        low, high = each.interval
        cells = (
            each.row, each.figure.replace("_", " "), _number(each.a, each.figure), _number(each.b, each.figure),
            f"{math.exp(each.difference.estimate):.3f}", f"{low:.3f} to {high:.3f}", each.verdict,
        )  # fmt: skip
        for column, cell in zip(columns.values(), cells, strict=True):
            column.append(cell)
    return table(columns, left=("row", "figure", "B is"))


def _number(value: float, figure: str) -> str:
    if FIGURES[figure].unit == "bytes":
        return f"{value / 2**20:,.1f} MiB"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
