"""Faults in a run that is trained for real: it comes to the same weights, and nothing is left over."""

from __future__ import annotations

import pytest

from tests.chaos.case import POSSIBLE, Case, drawn, every_fault
from tests.chaos.trial import Laboratory

# A few of each kind: what dies, what hangs, what is damaged, what is no number.
FEW = [
    Case(2, 5, "backward", 1, "kill"),
    Case(2, 7, "forward", 1, "nan"),
    Case(3, 5, "optimizer", 1, "flip"),
    Case(2, 5, "write", 1, "full"),
    Case(2, 5, "retention", 0, "tear"),
    Case(2, 8, "reduce", 0, "stop"),
]


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("chaos"))


@pytest.mark.parametrize("case", FEW, ids=str)
def test_a_run_lives_through(laboratory: Laboratory, case: Case) -> None:
    verdict = laboratory.try_out(case, f"few-{FEW.index(case)}")
    assert not verdict.problems, f"{verdict.problems}\n{verdict.output}"
    assert verdict.events.count("started") == (2 if case.restarts else 1)


@pytest.mark.chaos
@pytest.mark.parametrize("case", every_fault(), ids=str)
def test_a_run_lives_through_every_fault(laboratory: Laboratory, case: Case) -> None:
    verdict = laboratory.try_out(case, f"every-{every_fault().index(case)}")
    assert not verdict.problems, f"{verdict.problems}\n{verdict.output}"


def test_a_seed_is_a_case() -> None:
    cases = [drawn(seed) for seed in range(500)]
    assert cases == [drawn(seed) for seed in range(500)]
    assert {(c.phase, c.fault) for c in cases} == {(p, f) for p, faults in POSSIBLE.items() for f in faults}
    assert {c.processes for c in cases} == {2, 3, 4}
