"""
Whether two groups of runs differ in a measured value beyond noise, from one value per run. Formulas in docs/SEEING.md.

Values are logarithms, so a difference is relative: exp(difference) - 1. A run's value is the mean of its last part; what
differs between runs that only differ in their seed is *run noise*, and this is what a difference must exceed. How a run's
value is estimated from its own noisy steps is *step noise*.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from shoal.report.compare import student

LEVEL: Final = 0.01  # probability of calling two groups different that are not
POWER: Final = 0.8  # probability of finding a difference of the size that `detectable` returns


@dataclass(frozen=True)
class Value:
    """A run's value, as a logarithm, and the variance of its estimate from the run's own steps, with its degrees of freedom."""

    log: float
    variance: float = 0.0
    df: float = math.inf


@dataclass(frozen=True)
class Difference:
    """
    The difference B - A of two groups: an estimate, its standard error with degrees of freedom, and its interval at `level`.

    All are differences of logarithms. how: the test, in words. run_noise: standard deviation between runs of one group.
    assumed: whether `run_noise` is an assumption and not measured, because no group has two runs. paired: whether runs were
    compared in pairs. tests: how many tests this one was chosen from, each of which gets its share of the level.
    """

    estimate: float
    error: float
    df: float
    how: str
    run_noise: float
    assumed: bool
    sizes: tuple[int, int]
    level: float = LEVEL
    paired: bool = False
    tests: int = 1

    @property
    def interval(self) -> tuple[float, float]:
        """The interval that covers the true difference with probability 1 - level."""
        half = student.quantile(1 - self.level / self.tests / 2, self.df) * self.error
        return self.estimate - half, self.estimate + half

    @property
    def p(self) -> float:
        """Probability of a difference at least this large if there is none."""
        if self.error == 0:
            return float(self.estimate == 0)
        return min(1.0, 2 * self.tests * student.cdf(-abs(self.estimate) / self.error, self.df))

    @property
    def is_real(self) -> bool:
        """Whether the groups differ beyond noise: zero is outside the interval."""
        low, high = self.interval
        return low > 0 or high < 0

    def detectable(self, runs: int) -> float:
        """Return the smallest relative difference that `runs` > 1 runs on each side would show, with probability `POWER`."""
        df = runs - 1 if self.paired else 2 * runs - 2
        factor = student.quantile(1 - self.level / self.tests / 2, df) + student.quantile(POWER, df)
        return math.expm1(factor * self.run_noise * math.sqrt(2 / runs))

    def runs_to_show(self, relative: float, most: int = 1000) -> int | None:
        """Return how many runs on each side would show a relative difference; None if more than `most`."""
        return next((n for n in range(2, most + 1) if self.detectable(n) <= relative), None)

    def as_json(self) -> dict[str, Any]:
        """Return the difference for `--json`, in fractions: 0.01 is 1%."""
        low, high = map(math.expm1, self.interval)
        return {
            "difference": math.expm1(self.estimate), "interval": [low, high], "level": self.level, "p": self.p,
            "is_real": self.is_real, "test": self.how, "standard_error": self.error,
            "degrees_of_freedom": None if math.isinf(self.df) else self.df, "run_noise": self.run_noise,
            "run_noise_assumed": self.assumed, "runs": list(self.sizes),
        }  # fmt: skip


def between(
    a: Sequence[Value], b: Sequence[Value], *, paired: bool = False, assumed_noise: float, level: float = LEVEL
) -> Difference:
    """
    Return the difference B - A of two groups of runs.

    paired: whether a[i] and b[i] belong together: the same seed and the same data. assumed_noise: standard deviation between
    runs, used only if no group has two runs, because then it cannot be measured.
    """
    if paired and len(a) > 1:
        return _shorter(_paired(a, b, level), _welch(a, b, level))
    if len(a) > 1 and len(b) > 1:
        return _welch(a, b, level)
    if len(a) > 1 or len(b) > 1:
        return _one_against_many(a, b, level)
    return _one_against_one(a[0], b[0], assumed_noise, level)


def _shorter(one: Difference, other: Difference) -> Difference:
    """
    Return the test with the shorter interval, at half the level, so that choosing it is paid for (Bonferroni).

    Pairs are the better test if what a seed and its batches do to a run is the same in both groups; if it is not, the
    unpaired test has twice the degrees of freedom. Which of them holds shows in the runs alone.
    """
    both = [dataclasses.replace(test, tests=2) for test in (one, other)]
    return min(both, key=lambda test: test.interval[1] - test.interval[0])


def _logs(values: Sequence[Value]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([v.log for v in values])


def _paired(a: Sequence[Value], b: Sequence[Value], level: float) -> Difference:
    """Return the paired t-test: the differences of pairs have one mean and one variance."""
    n, apart = len(a), _logs(b) - _logs(a)
    error = float(apart.std(ddof=1)) / math.sqrt(n)
    how = f"paired t-test of {n} pairs with the same seed and data"
    noise = float(apart.std(ddof=1)) / math.sqrt(2)
    return Difference(float(apart.mean()), error, n - 1, how, noise, False, (n, n), level, paired=True)


def _welch(a: Sequence[Value], b: Sequence[Value], level: float) -> Difference:
    """Return Welch's t-test, with the degrees of freedom of Satterthwaite."""
    of_a, of_b = (float(_logs(g).var(ddof=1)) / len(g) for g in (a, b))
    df = _satterthwaite([(of_a, len(a) - 1), (of_b, len(b) - 1)])
    noise = math.sqrt((of_a * len(a) + of_b * len(b)) / 2)
    how = f"Welch's t-test of {len(a)} runs against {len(b)}"
    return Difference(_apart(a, b), math.sqrt(of_a + of_b), df, how, noise, False, (len(a), len(b)), level)


def _one_against_many(a: Sequence[Value], b: Sequence[Value], level: float) -> Difference:
    """Return a t-test that takes the noise between runs from the group that has several."""
    many = a if len(a) > 1 else b
    noise = float(_logs(many).std(ddof=1))
    how = f"t-test of one run against {len(many)}, whose noise is taken for both"
    error = noise * math.sqrt(1 + 1 / len(many))
    return Difference(_apart(a, b), error, len(many) - 1, how, noise, False, (len(a), len(b)), level)


def _one_against_one(a: Value, b: Value, noise: float, level: float) -> Difference:
    """Return the difference of two runs: measured step noise, and an assumed bound of the noise between runs."""
    parts = [(a.variance, a.df), (b.variance, b.df), (2 * noise**2, math.inf)]
    how = f"one run against one, with an assumed run-to-run standard deviation of {100 * noise:.2g}%"
    error = math.sqrt(sum(variance for variance, _ in parts))
    return Difference(b.log - a.log, error, _satterthwaite(parts), how, noise, True, (1, 1), level)


def _apart(a: Sequence[Value], b: Sequence[Value]) -> float:
    return float(_logs(b).mean() - _logs(a).mean())


def _satterthwaite(parts: Sequence[tuple[float, float]]) -> float:
    """Return the degrees of freedom of a sum of independent variances, each with its own."""
    squares = sum(variance**2 / df for variance, df in parts)
    return math.inf if squares == 0 else sum(variance for variance, _ in parts) ** 2 / squares
