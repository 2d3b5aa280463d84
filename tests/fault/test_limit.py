"""When a run stops before its time limit: compared with formulas, on a clock that the test advances."""

from __future__ import annotations

import time

import pytest

from shoal.fault.limit import ENDS, FLOOR_SECONDS, RECENT, SLOW_DISK, STARTED, STEPS, TimeLimit


class Clock:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_margin_is_two_saves_some_steps_and_a_floor() -> None:
    clock = Clock()
    limit = TimeLimit(clock.now + 1000, int(7 * SLOW_DISK), clock)
    assert limit.margin() == 2 * 7 + FLOOR_SECONDS  # a guess from the bytes
    limit.saved(3.0)
    assert limit.margin() == 2 * 3 + FLOOR_SECONDS  # replaced by the measured time
    for seconds in (1.0, 4.0, 2.0):
        clock.now += seconds
        assert not limit.is_due()
    limit.saved(2.0)
    assert limit.margin() == 2 * 3 + STEPS * 4 + FLOOR_SECONDS
    for _ in range(RECENT):
        clock.now += 0.5
        limit.is_due()
    assert limit.margin() == 2 * 3 + STEPS * 0.5 + FLOOR_SECONDS


@pytest.mark.parametrize(("step", "save"), [(1.0, 5.0), (0.25, 30.0), (20.0, 100.0)])
def test_it_is_due_at_the_last_step_that_leaves_the_margin(step: float, save: float) -> None:
    clock = Clock()
    ends = clock.now + 1000.0
    limit = TimeLimit(ends, 0, clock)
    limit.saved(save)
    margin = 2 * save + STEPS * step + FLOOR_SECONDS
    while True:
        clock.now += step
        if limit.is_due():
            break
    assert ends - margin <= clock.now < ends - margin + step


def test_the_option_counts_from_the_launcher_and_comes_before_slurm() -> None:
    slurm = {ENDS: str(time.time() + 600)}
    begun = time.monotonic() - 540  # restarted nine minutes after the launcher began
    assert TimeLimit.open(9.1, 0, {STARTED: str(begun), **slurm}).is_due()
    assert not TimeLimit.open(60.0, 0, {STARTED: str(begun), **slurm}).is_due()
    assert not TimeLimit.open(1.0, 0, {}).is_due()  # without a launcher, the limit counts from now


def test_without_an_option_it_is_slurms_or_none() -> None:
    assert not TimeLimit.open(None, 0, {}).is_due()
    assert not TimeLimit.open(None, 0, {ENDS: str(time.time() + 600)}).is_due()
    assert TimeLimit.open(None, 0, {ENDS: str(time.time() + FLOOR_SECONDS - 1)}).is_due()
    assert TimeLimit.open(None, int(600 * SLOW_DISK), {ENDS: str(time.time() + 600)}).is_due()
