"""What a CPU's steps take beyond their operations, found from the times of small models' steps."""

from __future__ import annotations

import itertools

import pytest

from shoal.bench.small_steps import CASES, LEAST, _config, _counted, _fitted
from shoal.plan.machine import machine_of
from shoal.plan.rehearse.work import Kind
from shoal.plan.speed.rates import OWN, Rates

COSTS: dict[Kind, float] = {
    "turn": 1e-3,
    "step": 4e-3,
    "dispatch": 1e-4,
    "again": 2e-3,
    "call": 2e-5,
    "function": 1.5e-4,
}


def test_the_costs_of_which_steps_are_made_are_found_again() -> None:
    machine = machine_of("", 1, 1, 0, cuda=False)
    assert machine is not None
    known, counts = zip(
        *(_counted(_config(*case, "float32"), Rates(machine, 4)) for case in CASES), strict=True
    )  # fmt: skip
    measured = [
        seconds + sum(COSTS[kind] * count for kind, count in each.items())
        for seconds, each in zip(known, counts, strict=True)
    ]
    found = {kind: curve.at(()) for kind, curve in _fitted(measured, known, counts).items()}
    assert found == pytest.approx(COSTS, rel=1e-6)


def test_a_block_is_computed_again_once_a_micro_batch() -> None:
    machine = machine_of("", 1, 1, 0, cuda=False)
    assert machine is not None
    for mode, turns in itertools.product(("none", "full", "selective"), (2, 8)):
        _, counts = _counted(_config("llama", mode, 2, turns, "float32"), Rates(machine, 4))
        assert counts["again"] == (0 if mode == "none" else 2 * turns), (mode, turns)
        assert (counts["dispatch"] > 0) == (mode == "selective")
        assert (counts["turn"], counts["step"]) == (turns, 1)


def test_no_cost_is_negative() -> None:
    # steps faster than their operations, and slower the more micro-batches they have
    measured, known = [0.9, 1.9, 0.9], (1.0, 1.0, 1.0)
    counts = tuple({**dict.fromkeys(OWN, 0.0), "step": 1.0, "turn": turns} for turns in (1.0, 11.0, 1.0))
    found = {kind: curve.at(()) for kind, curve in _fitted(measured, known, counts).items()}
    assert all(seconds >= LEAST for seconds in found.values())
    assert found["turn"] == pytest.approx(0.9 / 11, rel=0.2)
