"""Student's t distribution, against closed forms and scipy."""

from __future__ import annotations

import math

import pytest

from shoal.report.compare import student


@pytest.mark.parametrize("t", [-30.0, -2.5, -0.1, 0.0, 0.3, 1.0, 7.0, 400.0])
def test_closed_forms(t: float) -> None:
    assert student.cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, abs=1e-13)
    assert student.cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), abs=1e-13)
    assert student.cdf(t, math.inf) == pytest.approx(0.5 * (1 + math.erf(t / math.sqrt(2))), abs=1e-13)
    for many in (9e6, 1e9):
        assert student.cdf(t, many) == pytest.approx(student.cdf(t, math.inf), abs=1e-7)


def test_quantiles_of_tables() -> None:
    # Two-sided 1% and 5% points, as printed in tables of the distribution
    for df, p, printed in (
        (4, 0.995, 4.604),
        (8, 0.995, 3.355),
        (1, 0.975, 12.706),
        (30, 0.975, 2.042),
        (math.inf, 0.995, 2.576),
    ):
        assert student.quantile(p, df) == pytest.approx(printed, abs=5e-4)
        assert student.quantile(1 - p, df) == -student.quantile(p, df)
    assert student.quantile(0.5, 3) == 0


@pytest.mark.ci
def test_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for df in (1, 1.7, 3, 8.2, 45, 1000):
        for p in (1e-6, 0.005, 0.2, 0.8, 0.975, 0.9999):
            assert student.quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-9)
            assert student.cdf(stats.t.ppf(p, df), df) == pytest.approx(p, rel=1e-10)
