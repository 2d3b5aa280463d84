"""Who is at fault, and what remains without the bad nodes."""

from __future__ import annotations

import itertools
import random

import pytest

from shoal.doctor.examine import judge_clocks
from shoal.doctor.findings import Finding, Report, blame, differing, odd_ones

NODES = ("a", "b", "c", "d")


def both(*pairs: tuple[str, str]) -> set[tuple[str, str]]:
    return {p for a, b in pairs for p in ((a, b), (b, a))}


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (set(), []),
        ({("a", "b")}, [("a", "b")]),
        (both(("b", "d")), [("b", "d")]),
        ({("a", "c"), ("b", "c"), ("d", "c")}, [("c",)]),
        (both(("a", "b"), ("a", "c"), ("a", "d")), [("a",)]),
        (both(("a", "b"), ("c", "d")), [("a", "b"), ("c", "d")]),
        ({("a", "c"), ("b", "c"), ("d", "c"), ("a", "b")}, [("c",), ("a", "b")]),
        (set(itertools.permutations(NODES, 2)), [()]),
    ],
)
def test_blame(bad: set[tuple[str, str]], expected: list[tuple[str, ...]]) -> None:
    assert blame(bad, NODES) == expected


def test_two_nodes_share_the_blame() -> None:
    assert blame({("a", "b")}, ("a", "b")) == [("a", "b")]
    assert blame(set(), ()) == []


def test_the_usual_value_is_that_of_most() -> None:
    assert odd_ones({"a": 1, "b": 1, "c": 2}) == (1, {"c": 2})
    assert odd_ones({"a": 1, "b": 2}) == (1, {"a": 1, "b": 2})
    assert odd_ones({"a": 1, "b": 2, "c": 3}) == (1, {"b": 2, "c": 3})
    assert odd_ones({"a": 1, "b": 1}) == (1, {})
    assert odd_ones({}) == (None, {})
    assert [f.nodes for f in differing("mtu", "MTU", {"a": 1500, "b": 9000}, "set one")] == [("a", "b")]


def test_healthy_nodes_are_as_many_as_possible() -> None:
    for seed in range(200):
        draw = random.Random(seed)
        report = Report(NODES)
        pairs = [p for p in itertools.combinations(NODES, 2) if draw.random() < 0.3]
        report.add(Finding("slow-pair", pair, "slow") for pair in pairs)
        report.add(Finding("shm", (n,), "small") for n in NODES if draw.random() < 0.2)
        sick = {f.nodes[0] for f in report.findings if len(f.nodes) == 1}
        sets = (set(c) for k in range(5) for c in itertools.combinations(NODES, k))
        good = [s for s in sets if not s & sick and not any(set(p) <= s for p in pairs)]
        healthy = set(report.healthy())
        assert healthy in good
        assert len(healthy) == max(map(len, good))


def test_warnings_do_not_count_and_repeats_are_dropped() -> None:
    report = Report(NODES, seconds=1.5)
    report.add([Finding("no-requeue", (), "may not", is_warning=True), Finding("shm", ("b",), "small")])
    report.add([Finding("shm", ("b",), "small again"), Finding("shm", ("c",), "small")])
    assert [(f.fault, f.nodes) for f in report.faults] == [("shm", ("b",)), ("shm", ("c",))]
    assert report.healthy() == ["a", "d"]
    assert not report.concerns_all()
    assert report.lines() == [
        "b: shm: small", "c: shm: small", "warning: no-requeue: may not", "2 faults found on 2 of 4 nodes (1.5 s)",
    ]  # fmt: skip
    assert report.as_json()["findings"][0] == {
        "fault": "no-requeue", "nodes": [], "text": "may not", "warning": True,
    }  # fmt: skip
    report.add([Finding("disk-full", (), "full")])
    assert report.concerns_all()


def test_clocks_are_compared_with_most() -> None:
    assert judge_clocks({"a": 0.0, "b": 0.9, "c": -0.1}) == []
    # this machine's own clock is an hour behind: all nodes agree with each other
    assert judge_clocks({"a": 3600.0, "b": 3600.2, "c": 3600.1}) == []
    assert [f.nodes for f in judge_clocks({"a": 3600.0, "b": 3600.2, "c": 0.1})] == [("c",)]
    assert [f.nodes for f in judge_clocks({"a": 0.0, "b": 5.0})] == [("a", "b")]
    assert judge_clocks({}) == []
