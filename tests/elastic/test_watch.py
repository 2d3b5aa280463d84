"""Which rank hangs, and whether to restart, from hand-written pages and real processes."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from shoal.elastic.crashes import Crashes, first_death, how_it_died
from shoal.elastic.heartbeat import COMPILE, FOLDER, Page, Sign
from shoal.elastic.watch import Hang, Pauses, RankStatus, Watch, count_ties, find_culprit
from shoal.errors import EXIT_LOST_PEER


def look(rank: int, step: int, turn: int, since: float, state: str = "sleeping") -> RankStatus:
    return RankStatus(rank, Sign(step, turn, "forward", since, math.inf), state)


@pytest.mark.parametrize(
    "others",
    [
        [look(0, 12, 3, 5.0), look(2, 12, 3, 4.0)],
        [look(0, 12, 1, 5.0), look(2, 11, 0, 1.0)],
    ],
)
def test_a_process_that_cannot_run_is_the_one_however_far_it_is(others: list[RankStatus]) -> None:
    for state in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_DISK_SLEEP):
        assert find_culprit([*others, look(1, 12, 4, 9.0, state)]).rank == 1


def test_else_it_is_the_one_least_far_and_silent_longest() -> None:
    assert find_culprit([look(0, 12, 3, 1.0), look(1, 11, 9, 2.0)]).rank == 1
    assert find_culprit([look(0, 12, 3, 1.0), look(1, 12, 2, 2.0)]).rank == 1
    assert find_culprit([look(0, 12, 3, 2.0), look(1, 12, 3, 1.0)]).rank == 1


def test_who_waits_for_others_is_not_the_one() -> None:
    waiting = RankStatus(0, Sign(12, 3, "reduce", 1.0, math.inf, waits=True), "sleeping")
    assert find_culprit([waiting, look(1, 12, 3, 2.0)]).rank == 1
    assert find_culprit([waiting, look(1, 12, 4, 2.0)]).rank == 0  # rank 1 is further advanced


def test_it_is_said_where_others_are_at_the_very_place() -> None:
    """Count ranks with the culprit's progress: on GPUs nothing shows which of them waits for which, so the culprit is a guess."""
    three = [look(0, 12, 3, 2.0), look(1, 12, 3, 1.0), look(2, 12, 3, 3.0)]
    assert count_ties(find_culprit(three), three) == 2
    assert count_ties(three[0], [three[0], look(1, 12, 4, 1.0), look(2, 12, 3, 2.0, psutil.STATUS_STOPPED)]) == 0
    assert "2 others" in str(Hang(1, 12, "reduce", 20.0, "", "", None, 2))
    assert "other" not in str(Hang(1, 12, "reduce", 20.0, "", "", None))


def test_a_machine_that_slept_has_no_culprit() -> None:
    pauses = Pauses(0.0)
    for now in (0.1, 0.2, 300.2, 300.3, 302.3):
        pauses.tick(now)
    assert pauses.since(0.15) == pytest.approx(302)
    assert pauses.since(301) == pytest.approx(2)
    assert pauses.since(302.3) == 0


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    monkeypatch.setenv(FOLDER, "")  # restored after the test
    monkeypatch.setattr("shoal.elastic.watch.STACKS_SECONDS", 0.2)  # these processes write no stacks
    watch = Watch(tmp_path / "stacks", tmp_path)
    yield watch
    watch.close()


def until(pid: int, status: str) -> None:
    while psutil.Process(pid).status() != status:
        time.sleep(0.01)


@pytest.fixture
def sleepers() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start two processes that ignore SIGUSR2, and wait until they sleep: after printing they run for a moment."""
    code = "import signal, time; signal.signal(signal.SIGUSR2, signal.SIG_IGN); print(flush=True); time.sleep(100)"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
        until(process.pid, psutil.STATUS_SLEEPING)
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def test_a_stopped_process_is_named_when_somebody_is_late(
    watch: Watch, sleepers: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    import os

    pids = {local: process.pid for local, process in enumerate(sleepers)}
    watch.start([4, 5], 600.0)
    pages = [Page(Path(os.environ[FOLDER]), local) for local in pids]
    for local, page in enumerate(pages):
        page.write(12, 2 - local, "forward")
    assert watch.find_hang(pids) is None
    sleepers[0].send_signal(signal.SIGSTOP)
    until(pids[0], psutil.STATUS_STOPPED)
    assert watch.find_hang(pids) is None  # a stopped process is fine until a rank is late
    pages[1].allow(0.0)
    hang = watch.find_hang(pids)
    assert hang is not None
    assert (hang.rank, hang.step, hang.phase, hang.state) == (4, 12, "forward", "stopped (SIGSTOP)")
    assert f"rank 4 did not join: stopped (SIGSTOP) in forward of step 12, 0 s ago; stacks in {hang.stacks}" == str(
        hang
    )
    assert hang.stacks is not None
    assert hang.stacks.parent == tmp_path / "stacks"
    assert f"rank 5: forward of step 12; process {pids[1]} is sleeping" in hang.stacks.read_text()
    watch.start([4, 5], 600.0)  # after a restart, the new workers are not late
    assert watch.find_hang(pids) is None


def found(watch: Watch, pids: dict[int, int]) -> Hang:
    """Return the hang, once activity has been measured."""
    while (hang := watch.find_hang(pids)) is None:
        pass
    return hang


def test_who_compiles_is_waited_for_until_it_is_late_itself(
    watch: Watch, sleepers: list[subprocess.Popen[bytes]]
) -> None:
    import os

    pids = {local: process.pid for local, process in enumerate(sleepers)}
    watch.start([0, 1], 600.0)
    pages = [Page(Path(os.environ[FOLDER]), local) for local in pids]
    pages[0].write(12, 3, "reduce")
    pages[0].allow(0.0)  # it waits for the other rank, and is late
    pages[1].write(12, 1, COMPILE)
    assert watch.find_hang(pids) is None
    pages[1].allow(0.0)
    hang = found(watch, pids)
    assert (hang.rank, hang.phase) == (1, COMPILE)


def test_who_compiles_on_another_machine_is_waited_for(watch: Watch, sleepers: list[subprocess.Popen[bytes]]) -> None:
    import os

    pids = {0: sleepers[0].pid}
    watch.start([0], 600.0)
    Page(Path(os.environ[FOLDER]), 0).allow(0.0)
    there = RankStatus(1, Sign(12, 1, COMPILE, 1.0, math.inf), "running", "node1")
    assert watch.find_hang(pids, lambda: [there]) is None
    assert found(watch, pids).rank == 0


@dataclass
class Death:
    exitcode: int
    timestamp: int


def test_the_first_death_is_not_of_one_that_followed() -> None:
    deaths = {0: Death(EXIT_LOST_PEER, 1), 1: Death(-9, 3), 2: Death(1, 4)}
    assert first_death(deaths)[0] == 1
    aborted = {0: Death(EXIT_LOST_PEER, 1), 1: Death(-signal.SIGABRT, 2), 2: Death(-signal.SIGABRT, 3)}
    assert first_death(aborted)[0] == 1
    assert first_death({**aborted, 3: Death(1, 9)})[0] == 3
    assert how_it_died(-9) == "was killed by SIGKILL"
    assert how_it_died(1) == "ended with code 1"


def test_crashes_count_until_a_step_further_is_taken() -> None:
    crashes = Crashes(3)
    assert [crashes.add(step) for step in (12, 12, 13, 12, 13)] == [False, False, False, False, True]
    assert (crashes.count, crashes.step) == (3, 13)
    assert Crashes(1).add(0)
    going = Crashes(2)
    assert not any(going.add(step) for step in range(100))


BUSY = "import signal\nsignal.signal(signal.SIGUSR2, signal.SIG_IGN)\nprint(flush=True)\nwhile True: pass"
# The work is done by a child program, as with compilers.
STARTS_ONE = (
    "import signal, subprocess, sys\nsignal.signal(signal.SIGUSR2, signal.SIG_IGN)\n"
    "subprocess.run([sys.executable, '-c', 'print(flush=True)\\nimport os, sys\\nwhile os.getppid() == int(sys.argv[1]): pass', str(__import__('os').getpid())])"
)


@pytest.mark.parametrize("code", [BUSY, STARTS_ONE], ids=["itself", "a program of its"])
def test_who_computes_does_not_hang_unless_it_is_in_a_strict_step_like_those_before(
    watch: Watch, sleepers: list[subprocess.Popen[bytes]], code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    from shoal.elastic import watch as module

    monkeypatch.setattr(module, "WORK_SECONDS", 2.0)  # a busy machine leaves the process without a core for a while
    busy = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert busy.stdout is not None
    busy.stdout.readline()
    try:
        pids = {0: busy.pid, 1: sleepers[1].pid}
        watch.start([0, 1], 600.0)
        pages = [Page(Path(os.environ[FOLDER]), local) for local in pids]
        pages[0].write(0, 1, "loading weights")
        pages[1].write(0, 2, "loading weights")  # further advanced: it waits for rank 0
        pages[1].allow(0.0)
        end = time.monotonic() + 2
        while time.monotonic() < end:  # much longer than measuring activity takes
            assert watch.find_hang(pids) is None
        pages[0].took(3)
        pages[0].write(4, 1, "forward")
        pages[0].allow(0.0, in_step=True)  # as on a busy CPU
        pages[1].write(4, 2, "forward")
        pages[1].allow(0.0, in_step=True)
        assert watch.find_hang(pids) is None
        pages[0].allow(0.0, in_step=True, strict=True)
        hang = watch.find_hang(pids)
        assert hang is not None
        assert (hang.rank, hang.phase) == (0, "forward")
    finally:
        busy.kill()
        busy.communicate()


def test_who_sleeps_where_work_may_take_long_hangs(
    watch: Watch, sleepers: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that waits for another rank in a collective sleeps."""
    import os

    from shoal.elastic import watch as module

    monkeypatch.setattr(module, "WORK_SECONDS", 0.6)
    pids = {local: process.pid for local, process in enumerate(sleepers)}
    watch.start([0, 1], 600.0)
    pages = [Page(Path(os.environ[FOLDER]), local) for local in pids]
    for local, page in enumerate(pages):
        page.write(0, 1 + local, "loading weights")
        page.allow(0.0)
    while (hang := watch.find_hang(pids)) is None:
        pass
    assert (hang.rank, hang.phase) == (0, "loading weights")
