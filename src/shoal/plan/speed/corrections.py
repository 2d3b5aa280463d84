"""
What measured steps teach about predicted ones: factors for the parts of a step's time and for its memory, and how far to trust
the next prediction.

The logarithm of a step's time is normal around that of its corrected parts. The factors' logarithms have a normal prior around 0,
wide for a machine that was not measured. Their most likely values after all measured steps, and the matrix of their covariances,
come from Gauss-Newton steps (Bishop 2006, Pattern Recognition and Machine Learning, sections 3.3 and 4.4). Memory is alike, with
one factor. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from shoal.plan.speed.seconds import Part

# Standard deviations of the logarithms before any measured step: of the factor that all parts share, of each part's own, and of
# a step around its corrected parts; by whether the machine was calibrated
SHARED, OWN, AROUND = {True: 0.1, False: 0.35}, {True: 0.15, False: 0.3}, {True: 0.1, False: 0.15}
# The same of memory, by whether it is a GPU's, on which none was measured yet. On CPUs real runs took what was counted
MEMORY_SHARED, MEMORY_AROUND = {True: 0.04, False: 0.003}, {True: 0.04, False: 0.003}
WEAK: Final = 0.5  # of the parts that are known worst: of messages, Python, idling
UNSURE: Final = ("overhead", "host", "bubble", "tp", "cp", "pp", "shard", "replicate")
TRUST: Final = 4.0  # how many measured steps the prior of `AROUND` counts as
MOST: Final = 2.0  # times the prior of `AROUND` that the spread may become: a larger error of one step is its factors'
Z90: Final = 1.645  # 90% of a normal distribution lie within this many standard deviations
# Gauss-Newton steps, of which the first only move the factors: a spread from the errors before them would explain all errors
TURNS, FIRST = 10, 4


@dataclass(frozen=True)
class Interval:
    """A predicted number, and the bounds of its 90% interval."""

    middle: float
    low: float
    high: float

    def scaled(self, factor: float) -> Interval:
        """Return the interval of the number times `factor`."""
        return Interval(self.middle * factor, self.low * factor, self.high * factor)

    def holds(self, measured: float) -> bool:
        """Return whether a measured value is inside."""
        return self.low <= measured <= self.high


@dataclass(frozen=True)
class Seen:
    """A measured step: its predicted parts without correction, and its seconds. memory: measured over counted; None if unknown."""

    parts: Mapping[Part, float]
    seconds: float
    memory: float | None = None


class Corrections:
    """The factors that fit the measured steps best."""

    def __init__(self, seen: Sequence[Seen], *, calibrated: bool) -> None:
        """calibrated: whether the predicted parts come from rates that were measured on the machine."""
        self._names: list[str] = sorted({part for each in seen for part in each.parts})
        self.seen = len(seen)
        self._memory = [math.log(each.memory) for each in seen if each.memory]
        self._calibrated = calibrated
        self._spread = AROUND[calibrated]
        priors = [self._prior(None), *map(self._prior, self._names)]
        self._logs = [0.0] * len(priors)
        self._covariance = _diagonal([p**2 for p in priors])
        if seen:
            self._fit(seen, priors)

    def _prior(self, part: str | None) -> float:
        if part is None:
            return SHARED[self._calibrated]
        return WEAK if part in UNSURE else OWN[self._calibrated]

    def _fit(self, seen: Sequence[Seen], priors: Sequence[float]) -> None:
        count = len(priors)
        for turn in range(TURNS):
            around, squares = 1 / self._spread**2, 0.0
            precision = _diagonal([p**-2 for p in priors])
            pull = [-log / p**2 for log, p in zip(self._logs, priors, strict=True)]
            for each in seen:
                total, shares = self._corrected(each.parts)
                off = math.log(each.seconds / total)
                # a step that its own factors follow says little about others: leverage is the step's weight in its own fit
                leverage = min(0.95, around * _form(self._covariance, shares)) if turn else 0.0
                squares += off**2 / (1 - leverage)
                for i in range(count):
                    pull[i] += around * shares[i] * off
                    for j in range(count):
                        precision[i][j] += around * shares[i] * shares[j]
            self._covariance = _inverted(precision)
            self._logs = [
                log + sum(a * b for a, b in zip(row, pull, strict=True))
                for log, row in zip(self._logs, self._covariance, strict=True)
            ]
            if turn < FIRST:
                continue
            prior = AROUND[self._calibrated] ** 2
            self._spread = min(
                MOST * AROUND[self._calibrated], math.sqrt((TRUST * prior + squares) / (TRUST + len(seen)))
            )

    def _corrected(self, parts: Mapping[Part, float]) -> tuple[float, list[float]]:
        """Return the sum of the corrected parts, and how its logarithm grows with each factor's."""
        common = math.exp(self._logs[0])
        scaled = [
            common * math.exp(log) * parts.get(name, 0.0)  # type: ignore[call-overload]
            for name, log in zip(self._names, self._logs[1:], strict=True)
        ]
        total = sum(scaled) + common * sum(seconds for part, seconds in parts.items() if part not in self._names)
        return total, [1.0, *(each / total for each in scaled)]

    def factor(self, part: Part) -> float:
        """Return by what a part's seconds are multiplied."""
        own = self._logs[1 + self._names.index(part)] if part in self._names else 0.0
        return math.exp(self._logs[0] + own)

    def predict(self, parts: Mapping[Part, float]) -> Interval:
        """Return the seconds of a step."""
        total, shares = self._corrected(parts)
        variance = self._spread**2 + _form(self._covariance, shares)
        for part, seconds in parts.items():
            if part not in self._names:
                variance += (self._prior(part) * seconds * math.exp(self._logs[0]) / total) ** 2
        far = math.exp(Z90 * math.sqrt(variance))
        return Interval(total, total / far, total * far)

    def memory(self, counted: int, *, cuda: bool) -> Interval:
        """Return the bytes that a rank needs at once, of which a rehearsal counted `counted`. cuda: whether of a GPU."""
        logs, count = self._memory, len(self._memory)
        mean = sum(logs) / count if count else 0.0
        prior = MEMORY_AROUND[cuda] ** 2
        spread = (TRUST * prior + sum((log - mean) ** 2 for log in logs)) / (TRUST + count)
        precision = MEMORY_SHARED[cuda] ** -2 + count / spread
        middle = counted * math.exp(count / spread * mean / precision)
        far = math.exp(Z90 * math.sqrt(spread + 1 / precision))
        return Interval(middle, middle / far, middle * far)


def _form(matrix: Sequence[Sequence[float]], vector: Sequence[float]) -> float:
    """Return the quadratic form v^T M v."""
    return sum(v * sum(a * b for a, b in zip(row, vector, strict=True)) for v, row in zip(vector, matrix, strict=True))


def _diagonal(values: Sequence[float]) -> list[list[float]]:
    return [[value if i == j else 0.0 for j in range(len(values))] for i, value in enumerate(values)]


def _inverted(matrix: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return the inverse of a symmetric positive definite matrix, by Gauss-Jordan elimination."""
    size = len(matrix)
    rows = [[*row, *unit] for row, unit in zip(matrix, _diagonal([1.0] * size), strict=True)]
    for i in range(size):
        pivot = rows[i][i]
        rows[i] = [value / pivot for value in rows[i]]
        for j in range(size):
            if j != i:
                factor = rows[j][i]
                rows[j] = [a - factor * b for a, b in zip(rows[j], rows[i], strict=True)]
    return [row[size:] for row in rows]
