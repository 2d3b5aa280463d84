"""Tests of two groups, against scipy where it is installed, and their error rates by simulation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
import pytest

from shoal.report.compare.difference import Value, between
from shoal.report.compare.series import mean_of
from tests.report.compare.simulated import ar1

A, B = (1.00, 1.02, 0.99, 1.01, 1.005), (0.98, 0.97, 0.99, 0.975, 0.96)


def values(logs: Iterable[float]) -> list[Value]:
    return [Value(x) for x in logs]


@pytest.mark.ci
def test_unpaired_is_welch() -> None:
    stats = pytest.importorskip("scipy.stats")
    mine = between(values(A), values(B[:4]), assumed_noise=1.0)
    theirs = stats.ttest_ind(B[:4], A, equal_var=False)
    assert mine.p == pytest.approx(theirs.pvalue, rel=1e-9)
    interval = theirs.confidence_interval(0.99)
    assert mine.interval == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert mine.estimate == pytest.approx(np.mean(B[:4]) - np.mean(A))


@pytest.mark.ci
def test_paired_takes_the_shorter_interval_at_half_the_level() -> None:
    stats = pytest.importorskip("scipy.stats")
    together = [x - 0.01 + 1e-4 * i for i, x in enumerate(A)]  # moves with A
    mine = between(values(A), values(together), paired=True, assumed_noise=1.0)
    theirs = stats.ttest_rel(together, A)
    assert mine.paired
    assert mine.p == pytest.approx(2 * theirs.pvalue, rel=1e-9)
    interval = theirs.confidence_interval(0.995)
    assert mine.interval == pytest.approx((interval.low, interval.high), rel=1e-9)
    apart = between(values(A), values([2.01 - x for x in A]), paired=True, assumed_noise=1.0)  # moves against A
    assert not apart.paired
    assert apart.p == 1


def test_one_run_against_many_takes_their_noise() -> None:
    mine = between(values(A[:1]), values(B), assumed_noise=1.0)
    noise = float(np.std(B, ddof=1))
    assert mine.error == pytest.approx(noise * math.sqrt(1 + 1 / 5))
    assert (mine.df, mine.assumed) == (4, False)
    assert between(values(B), values(A[:1]), assumed_noise=1.0).estimate == pytest.approx(-mine.estimate)


def test_one_run_against_one_is_judged_by_the_assumed_noise() -> None:
    noisy = [Value(0.0, 1e-4, 5), Value(0.03, 1e-4, 5)]
    mine = between(noisy[:1], noisy[1:], assumed_noise=0.01)
    assert mine.error == pytest.approx(math.sqrt(1e-4 + 1e-4 + 2 * 0.01**2))
    assert mine.assumed
    assert not mine.is_real
    assert between([Value(0.0)], [Value(0.03)], assumed_noise=0.001).is_real
    assert between([Value(0.0)], [Value(0.0)], assumed_noise=0.0).p == 1


def test_detectable_is_the_power_of_simulated_groups() -> None:
    draws = np.random.default_rng(3)
    measured = dataclasses.replace(between(values(A), values(B), assumed_noise=1.0), run_noise=0.01)
    lower = math.log1p(-measured.detectable(5))
    found = sum(
        between(
            values(0.01 * draws.standard_normal(5)), values(lower + 0.01 * draws.standard_normal(5)), assumed_noise=1
        ).is_real
        for _ in range(300)
    )
    assert 0.7 < found / 300 < 0.9  # 0.8
    needed = measured.runs_to_show(0.01)
    assert needed is not None
    assert measured.detectable(needed) <= 0.01 < measured.detectable(needed - 1)


@pytest.mark.parametrize("follows", [0.0, 0.5])
def test_batch_means_know_the_noise_of_a_mean(follows: float) -> None:
    """The variance from one series, on average, is that of means of many series, although neighbors depend on each other."""
    draws = np.random.default_rng(4)
    found = [mean_of(ar1(draws, 200, follows), falls=False) for _ in range(200)]
    truth = np.var([each.log for each in found], ddof=1)
    assert np.mean([each.variance for each in found]) == pytest.approx(truth, rel=0.35)


def test_a_straight_fall_is_no_noise() -> None:
    falling = np.linspace(3, 2, 100)
    assert mean_of(falling, falls=True).variance == pytest.approx(0, abs=1e-20)
    assert mean_of(falling, falls=False).variance > 1e-4
