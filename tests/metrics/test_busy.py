"""The time that a process is busy, without waits: on a clock that the test advances, and on a device behind its host."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shoal.metrics import busy as module
from shoal.metrics.busy import Busy
from shoal.run.phases import Phases


class Turned:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.now = 100.0

    def go_on(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Turned:
    turned = Turned()
    monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=lambda: turned.now))
    # replaces the wait for a collective, and takes the given seconds
    monkeypatch.setattr(dist.Work, "wait", lambda work, seconds=0.0: turned.go_on(seconds))
    return turned


def waited(seconds: float) -> None:
    """Wait in a collective."""
    dist.Work.wait(None, seconds)  # type: ignore[arg-type]


def take(busy: Busy, clock: Turned, *phases: tuple[str, float, float]) -> None:
    """Take a step with these phases: (name, seconds of work, seconds of waiting)."""
    observed = Phases([busy])
    busy.begin()
    for name, own, wait in phases:
        with observed(name):
            clock.go_on(own)
            waited(wait)


def test_waiting_is_left_out_of_every_phase_and_of_what_is_between(clock: Turned) -> None:
    busy = Busy(torch.device("cpu"), 2)
    take(busy, clock, ("data", 1.0, 0.0), ("forward", 2.0, 5.0), ("forward", 2.0, 0.5), ("reduce", 0.25, 7.0))
    clock.go_on(3.0)  # between steps
    waited(9.0)
    assert busy.seconds() == {}  # the step is not over
    busy.begin()
    assert busy.seconds() == pytest.approx({"data": 1.0, "forward": 4.0, "reduce": 0.25, "between": 3.0})
    assert busy.seconds() == {}  # returned already
    busy.close()


def test_what_is_between_is_not_known_where_something_else_came_there(clock: Turned) -> None:
    busy = Busy(torch.device("cpu"), 1)
    take(busy, clock, ("data", 1.0, 0.0))
    busy.interrupt()
    clock.go_on(60.0)
    take(busy, clock, ("data", 2.0, 0.0))
    assert busy.seconds() == pytest.approx({"data": 1.0})
    with busy.waits.here():  # a wait for others inside a wait for the device counts once
        clock.go_on(4.0)
        waited(1.0)
    clock.go_on(0.5)
    busy.begin()
    assert busy.seconds() == pytest.approx({"data": 2.0, "between": 0.5})
    busy.close()


def test_torch_is_left_as_it_was(clock: Turned) -> None:
    wait = dist.Work.wait
    busy = Busy(torch.device("cpu"), 1)
    assert dist.Work.wait is not wait
    busy.close()
    busy.close()
    assert dist.Work.wait is wait
    off = Busy(torch.device("cpu"), 1, measures=False)
    assert dist.Work.wait is wait
    take(off, clock, ("data", 1.0, 0.0))
    off.begin()
    assert off.seconds() == {}


def test_on_cuda_nobody_waits_for_an_event_and_the_first_turn_stands_for_all(
    clock: Turned, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Event:
        """A fake CUDA event that knows when it was recorded, and is over once `done` is set. It has no `synchronize`."""

        done = False

        def __init__(self, **options: Any) -> None:
            self.at: float | None = None

        def record(self) -> None:
            assert self.at is None
            self.at = clock.now

        def query(self) -> bool:
            return self.done

        def elapsed_time(self, other: Event) -> float:
            assert self.at is not None
            assert other.at is not None
            return 1000 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    busy = Busy(torch.device("cuda"), 3)
    for _ in range(2):
        turns = [(phase, seconds, 0.0) for seconds in (0.5, 8.0, 9.0) for phase in ("forward", "backward")]
        take(busy, clock, ("data", 1.0, 0.0), *turns, ("optimizer", 2.0, 0.0))
    busy.begin()
    assert busy.seconds() == {}
    Event.done = True
    found = busy.seconds()
    assert found == pytest.approx({"data": 1.0, "forward": 1.5, "backward": 1.5, "optimizer": 2.0, "between": 0.0})
    assert busy.seconds() == {}
