"""Comparisons of two results, against scipy's test of the same numbers and against what is known of drawn ones."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

import pytest

from shoal.bench.result import Row
from shoal.bench.versus import Versus, compare_results
from shoal.errors import ShoalError
from tests.bench.test_result import result

FACTS = {"processes": 1, "threads": 1}


def drawn(seed: int, middle: float, spread: float, count: int = 6) -> list[float]:
    rng = random.Random(seed)
    return [middle * math.exp(rng.gauss(0, spread)) for _ in range(count)]


def versus(a: Sequence[float], b: Sequence[float], figure: str = "tokens_per_second", level: float = 0.01) -> Versus:
    of_a, of_b = (result([Row("shoal", FACTS, {figure: values})]) for values in (a, b))
    return compare_results(of_a, of_b, noise=0.02, level=level)


def test_the_interval_is_that_of_welchs_test() -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = drawn(1, 1000, 0.02), drawn(2, 1040, 0.05, count=4)
    test = stats.ttest_ind([math.log(v) for v in b], [math.log(v) for v in a], equal_var=False)
    theirs = test.confidence_interval(0.95)
    [ours] = versus(a, b, level=0.05).judged
    assert ours.interval == pytest.approx((math.exp(theirs.low), math.exp(theirs.high)))
    assert ours.difference.p == pytest.approx(test.pvalue)


def test_two_repeats_on_each_side_have_a_closed_form() -> None:
    """With equal variances v of 2 values, t has 2 degrees of freedom: its quantile is (2p - 1) / sqrt(2 p (1 - p))."""
    a, b = [100.0, 110.0], [190.0, 209.0]
    p = 0.995
    quantile = (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    half = quantile * math.sqrt(math.log(1.1) ** 2 / 2 / 2 * 2)
    [ours] = versus(a, b).judged
    assert ours.interval == pytest.approx((1.9 * math.exp(-half), 1.9 * math.exp(half)))
    assert ours.verdict == "cannot tell"
    assert versus(a, b, level=0.2).judged[0].verdict == "faster"


@pytest.mark.parametrize(
    ("figure", "factor", "verdict", "worse"),
    [
        ("tokens_per_second", 1.2, "faster", False),
        ("tokens_per_second", 0.8, "slower", True),
        ("tokens_per_second", 1.001, "same", False),
        ("step_seconds", 1.2, "slower", True),
        ("step_seconds", 0.8, "faster", False),
        ("allocated_bytes", 0.8, "less", False),
        ("of_product", 0.8, "worse", True),
    ],
)
def test_the_verdict_follows_the_drawn_difference(figure: str, factor: float, verdict: str, worse: bool) -> None:
    found = versus(drawn(3, 1000, 0.01), drawn(4, factor * 1000, 0.01), figure)
    assert [each.verdict for each in found.judged] == [verdict]
    assert found.is_worse == worse


def test_equal_machines_are_rarely_called_different() -> None:
    different = sum(
        versus(drawn(2 * n, 1000, 0.03), drawn(2 * n + 1, 1000, 0.03), level=0.05).judged[0].difference.is_real
        for n in range(400)
    )
    assert different <= 0.05 * 400 + 3 * math.sqrt(400 * 0.05 * 0.95)


def test_what_differs_is_named() -> None:
    row = Row("shoal", FACTS, {"tokens_per_second": drawn(1, 1000, 0.01)})
    a = result([row, Row("peer", {}, {"tokens_per_second": [1.0]})])
    b = result(
        [dataclasses.replace(row, facts=FACTS | {"threads": 8})], instructions="AVX512", versions={"torch": "2.14.0"},
        hardware={**a.hardware, "cores": 64}, recipe={**a.recipe, "options": {"train.dtype": "bfloat16"}},
    )  # fmt: skip
    said = "\n".join(compare_results(a, b, noise=0.02, level=0.01).lines())
    for words in (
        "warning: not the same hardware: cores 2 in A, 64 in B; instructions AVX2 in A, AVX512 in B",
        "warning: not the same config: train.dtype float32 in A, bfloat16 in B",
        "warning: not the same case, shoal: threads 1 in A, 8 in B",
        "versions: torch 2.13.0 in A, 2.14.0 in B",
        "only in A: peer",
    ):
        assert words in said
    assert not compare_results(a, a, noise=0.02, level=0.01).warnings


def test_other_benchmarks_and_other_rows_are_rejected() -> None:
    row = Row("shoal", FACTS, {"tokens_per_second": [1.0]})
    with pytest.raises(ShoalError, match="A is of shoal bench speed and B of shoal bench io"):
        compare_results(result([row]), result([row], verb="bench io"), noise=0.02, level=0.01)
    with pytest.raises(ShoalError, match="no row in common"):
        compare_results(result([row]), result([Row("else", {}, row.figures)]), noise=0.02, level=0.01)
