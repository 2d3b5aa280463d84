"""A run's curves as arrays, the value of their last part, and how far the noise of its steps blurs that value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from shoal.errors import RunError
from shoal.report.compare.difference import Value
from shoal.report.runs.facts import RunFacts
from shoal.run.records import Evaluation, read_metrics

LAST_PART: Final = 0.25  # of the tokens that all runs have trained on
FEWEST: Final = 8  # records in the last part below which a run is not compared
FIRST_RECORDS: Final = 10  # not counted in speed, because they compile, warm caches and fill queues
FIRST_SHARE: Final = 0.2  # but at most this share of all records
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Series:
    """
    The curves of one run.

    steps, tokens, loss, grad_norm, speed (tokens/s), seconds (of a step): one entry per record, in order of steps.
    """

    facts: RunFacts
    steps: Array
    tokens: Array
    loss: Array
    grad_norm: Array
    speed: Array
    seconds: Array
    evaluations: tuple[Evaluation, ...]

    @classmethod
    def read(cls, facts: RunFacts) -> Series:
        """Return the curves of a run. Raises `RunError` if it has no steps."""
        metrics = read_metrics(facts.folder.metrics_file)
        if not metrics.steps:
            raise RunError(f"{facts.folder.path} has no steps in metrics.jsonl yet: there is nothing to compare")
        names = ("step", "tokens", "loss", "grad_norm", "tokens_per_second", "step_seconds")
        column = {name: np.array([getattr(r, name) for r in metrics.steps], dtype=np.float64) for name in names}
        return cls(
            facts, column["step"], column["tokens"], column["loss"], column["grad_norm"], column["tokens_per_second"],
            column["step_seconds"], tuple(metrics.evaluations),
        )  # fmt: skip

    def log_loss(self, first: float, last: float) -> Array:
        """Return the logarithms of the losses of records with `first` < tokens <= `last`."""
        return np.log(self.loss[(self.tokens > first) & (self.tokens <= last)])

    def log_speed(self) -> Array:
        """Return the logarithms of tokens/s, without the first records."""
        return np.log(self.speed[min(FIRST_RECORDS, math.floor(FIRST_SHARE * len(self.speed))) :])


def mean_of(values: Array, *, falls: bool) -> Value:
    """
    Return the mean of a series of logarithms, with the variance of that mean by batch means.

    Neighboring values depend on each other, so the variance comes from the means of about sqrt(n) batches, which are longer
    than the dependence. falls: whether the series has a trend that belongs to it, as a loss does; a line is then removed.
    """
    batches = max(3, min(30, math.isqrt(len(values))))
    length = len(values) // batches
    if length == 0:
        return Value(float(values.mean()), math.inf, 1)
    means = values[len(values) - batches * length :].reshape(batches, length).mean(axis=1)
    at = np.arange(batches) - (batches - 1) / 2
    line = at * (at @ means) / (at @ at) if falls else 0.0
    rest = means - means.mean() - line
    df = batches - 2 if falls else batches - 1
    return Value(float(values.mean()), float(rest @ rest) / df / batches, df)


def common_tokens(runs: Sequence[Series]) -> float:
    """Return the tokens up to which every run has records."""
    return float(min(run.tokens[-1] for run in runs))


def last_losses(runs: Sequence[Series]) -> list[Value] | None:
    """Return the mean log loss of each run over the last part of the tokens that all have; None if one has too few records."""
    last = common_tokens(runs)
    found = [run.log_loss((1 - LAST_PART) * last, last) for run in runs]
    return None if min(map(len, found)) < FEWEST else [mean_of(each, falls=True) for each in found]


def loss_apart(a: Series, b: Series) -> Value | None:
    """Return the mean difference of log loss B - A over the last part, step by step; None if too few steps are in both."""
    last = common_tokens([a, b])
    _, of_a, of_b = np.intersect1d(a.tokens, b.tokens, return_indices=True)
    keep = (a.tokens[of_a] > (1 - LAST_PART) * last) & (a.tokens[of_a] <= last)
    if keep.sum() < FEWEST:
        return None
    return mean_of(np.log(b.loss[of_b[keep]]) - np.log(a.loss[of_a[keep]]), falls=True)


def held_out(runs: Sequence[Series], field: str) -> list[Value] | None:
    """
    Return the mean logarithm of `field` of each run over the evaluations of the last part; None if no evaluation is common.

    An evaluation counts if every run has one after as many tokens, which is either the last of all finished runs or of none:
    the last one reads all held-out text.
    """
    by_tokens = [{e.tokens: e for e in run.evaluations if getattr(e, field)} for run in runs]
    ends = [run.facts.state == "finished" and max(each, default=0) for run, each in zip(runs, by_tokens, strict=True)]
    first = (1 - LAST_PART) * common_tokens(runs)
    common = [t for t in by_tokens[0] if t > first and all(t in each for each in by_tokens)]
    common = [t for t in common if len({t == end for end in ends}) == 1]
    if not common:
        return None
    return [Value(sum(math.log(getattr(each[t], field)) for t in common) / len(common)) for each in by_tokens]


def speeds(runs: Sequence[Series]) -> list[Value] | None:
    """Return the mean log tokens/s of each run, without its first records; None if one has too few records."""
    found = [run.log_speed() for run in runs]
    return None if min(map(len, found)) < FEWEST else [mean_of(each, falls=False) for each in found]


def quarters_apart(run: Series) -> float:
    """Return the standard deviation of log tokens/s between the quarters of a run: how much its speed drifts."""
    quarters = [part.mean() for part in np.array_split(run.log_speed(), 4) if len(part)]
    return float(np.std(quarters, ddof=1)) if len(quarters) > 1 else 0.0


@dataclass(frozen=True)
class Parting:
    """The first step that both runs recorded with another loss or gradient norm; `step` is None if all are equal, bit by bit."""

    step: int | None
    compared: int
    a: float | None = None
    b: float | None = None
    what: str = "loss"


def first_parting(a: Series, b: Series) -> Parting:
    """Return where two runs part: the first recorded step whose loss or gradient norm differs in any bit."""
    steps, of_a, of_b = np.intersect1d(a.steps, b.steps, return_indices=True)
    for what in ("loss", "grad_norm"):  # of one step, a loss that differs is the earlier cause
        x, y = getattr(a, what)[of_a], getattr(b, what)[of_b]
        found = np.flatnonzero((x != y) & ~(np.isnan(x) & np.isnan(y)))
        at = int(found[0]) if len(found) else None
        if what == "loss":
            first = (
                Parting(None, len(steps))
                if at is None
                else Parting(int(steps[at]), len(steps), float(x[at]), float(y[at]), what)
            )
        elif at is not None and (first.step is None or steps[at] < first.step):
            first = Parting(int(steps[at]), len(steps), float(x[at]), float(y[at]), what)
    return first
