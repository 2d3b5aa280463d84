"""Faults in real training runs: the final weights are the same, and nothing is left over."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.case import POSSIBLE, STEPS, Case, drawn, ends_the_workers, few, others
from tests.chaos.trial import MARK, Laboratory, Trace, judge_events, steps_left_out


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    return Laboratory(tmp_path_factory.mktemp("chaos"))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", few(), ids=lambda case: f"{case.processes} processes")
def test_a_run_lives_through_some_of_each_kind(laboratory: Laboratory, case: Case) -> None:
    verdict = laboratory.try_out(case, f"few-{few().index(case)}")
    assert not verdict.problems, f"{verdict.output}\n{verdict.explain(case)}"


@pytest.mark.ci
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", others(), ids=lambda case: f"run {others().index(case)}")
def test_a_run_lives_through_every_other_fault(laboratory: Laboratory, case: Case) -> None:
    verdict = laboratory.try_out(case, f"others-{others().index(case)}")
    assert not verdict.problems, f"{verdict.output}\n{verdict.explain(case)}"


def test_every_fault_in_every_phase_is_there() -> None:
    faults = [(f.phase, f.fault) for case in (*few(), *others()) for f in case.faults]
    assert set(faults) == {(phase, fault) for phase, faults in POSSIBLE.items() for fault in faults}


def test_a_seed_is_a_case() -> None:
    cases = [drawn(seed) for seed in range(200)]
    assert cases == [drawn(seed) for seed in range(200)]
    faults = {(f.phase, f.fault) for case in cases for f in case.faults}
    assert faults == {(phase, fault) for phase, faults in POSSIBLE.items() for fault in faults}
    assert {c.processes for c in cases} == {2, 3, 4}


def test_lives_and_steps_grow_together() -> None:
    """Otherwise a fault would be planned for a life that has passed its step, and never happen."""
    for case in (*few(), *others(), *map(drawn, range(500))):
        life = 0
        for fault in case.faults:
            assert fault.life == life
            life += ends_the_workers(fault.phase, fault.fault)
        steps = [fault.step for fault in case.faults if fault.step]
        assert steps == sorted(set(steps))
        assert not steps or steps[-1] <= STEPS - 40


def test_a_step_that_is_taken_again_is_no_longer_left_out() -> None:
    lines = [
        {"event": "started", "step": 0}, {"event": "left out", "step": 5}, {"event": "left out", "step": 9},
        {"event": "saved", "step": 8}, {"event": "started", "step": 8}, {"event": "left out", "step": 12},
    ]  # fmt: skip
    assert steps_left_out(lines) == (5, 12)
    assert steps_left_out([*lines, {"event": "went back", "step": 14, "to": 4}]) == ()


def test_what_did_not_happen_or_was_not_said_is_a_problem() -> None:
    case = few()[0]
    faults = [{"event": "fault", **planned, "came": 1} for planned in case.plan]
    said = [{"event": event, "step": 18} for event in case.must_say.elements()]
    assert judge_events(case, [*faults, *said]) == []
    assert judge_events(case, [*faults[1:], *said]) == [f"did not happen: {case.plan[0]}"]
    [twice] = judge_events(case, [*faults, faults[0], *said])
    assert "or twice" in twice
    [unseen] = judge_events(case, [*faults, *(line for line in said if line["event"] != "left out")])
    assert unseen.endswith("appears 0 times in the events, for 1 faults")
    [once_more] = judge_events(case, [*faults, *said, {"event": "crashed"}])
    assert once_more == "the workers ended 4 times, for 3 faults"


LEAVES_ALL = """
import socket, sys, tempfile
from multiprocessing.shared_memory import SharedMemory
listening = socket.create_server(("127.0.0.1", 0))
shared = SharedMemory(create=True, size=100)
print(listening.getsockname()[1], tempfile.mkdtemp(prefix="shoal-"), shared.name, flush=True)
sys.stdin.read()
shared.unlink()
"""


def test_a_process_a_port_a_folder_and_shared_memory_that_are_left_are_found(tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = os.environ | {MARK: str(temporary), "TMPDIR": str(temporary)}
    process = subprocess.Popen(
        [sys.executable, "-c", LEAVES_ALL], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    port, folder, shared = process.stdout.readline().split()
    trace = Trace(temporary)
    trace.look()
    assert trace.ports == {int(port)}
    left = trace.left_over()
    assert f"process {process.pid} is left over: " in left[0]
    assert f"port {port} is still listening" in left
    assert {f"{folder} is left over", f"/dev/shm/{shared} is left over"} <= set(left)
    process.communicate()
    assert trace.left_over() == [f"{folder} is left over"]
