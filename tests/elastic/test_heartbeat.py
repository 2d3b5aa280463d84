"""Heartbeats: the launcher reads what the worker wrote; the time limits of steps."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.config.run_options import Launch
from shoal.elastic.heartbeat import (
    COMPILE,
    FEW,
    FLOOR_SECONDS,
    FOLDER,
    RECENT,
    SLOWER,
    SOONER,
    Heartbeat,
    Page,
    Patience,
    leave_stacks_when_asked,
    stacks_file,
)  # fmt: skip
from shoal.fault.compiling import told_of_compilations
from shoal.mesh.place import LOCKED_BY


@pytest.fixture
def listening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Page:
    """Return the launcher's view of rank 1's page, in the environment of rank 1."""
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in {**place, FOLDER: str(tmp_path), LOCKED_BY: str(os.getppid())}.items():
        monkeypatch.setenv(name, value)
    return Page(tmp_path, 1)


def test_a_page_says_where_the_worker_is_and_until_when(listening: Page) -> None:
    heart = Heartbeat.open(Launch(timeout_seconds=600.0))
    before = time.monotonic()
    heart.begin(7)
    heart.beat("forward")
    heart.beat("backward")
    sign = listening.read()
    assert (sign.step, sign.turn, sign.phase) == (7, 2, "backward")
    assert before <= sign.since <= time.monotonic()
    assert before + SOONER * 600 <= sign.until <= time.monotonic() + SOONER * 600
    heart.outside("evaluate")
    assert (listening.read().step, listening.read().phase) == (7, "evaluate")
    heart.rest()
    assert listening.read().until == math.inf


def test_steps_are_learned_after_the_first_whatever_comes_after_each(listening: Page) -> None:
    """Replica checks after every step do not disturb the limits."""
    heart = Heartbeat.open(Launch(hang_seconds=5.0, timeout_seconds=600.0))

    def allowed() -> float:
        return listening.read().until - listening.read().since

    for step in (1, 2):  # the first step compiles, so its duration is ignored
        heart.begin(step)
        assert allowed() == pytest.approx(SOONER * 600, abs=1)
        heart.outside("save")
        assert allowed() == pytest.approx(SOONER * 600, abs=1)
    heart.begin(3)
    assert allowed() == pytest.approx(5, abs=1)
    heart.outside("save")
    assert allowed() == pytest.approx(SOONER * 600, abs=1)
    heart.begin(4)
    assert allowed() == pytest.approx(5, abs=1)


def test_what_comes_between_two_steps_is_no_part_of_either(listening: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    heart = Heartbeat.open(Launch(timeout_seconds=600.0))
    for step in range(1, FEW + 2):  # each step takes 4 s, followed by an evaluation of 500 s
        heart.begin(step)
        now += 4.0
        heart.outside("evaluation")
        now += 500.0
    assert heart._patience.allowance() == SLOWER * 4.0


def test_a_compilation_has_room_and_leaves_its_step_the_time_that_was_left(
    listening: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(time, "monotonic_ns", lambda: int(now * 1e9))
    heart = Heartbeat.open(Launch(timeout_seconds=600.0))
    for step in range(1, FEW + 2):
        heart.begin(step)
        now += 4.0
    heart.begin(FEW + 2)
    assert listening.read().until == pytest.approx(now + SLOWER * 4)
    heart.beat("forward")
    now += 10.0
    heart.compiles(begins=True)
    assert listening.read().phase == COMPILE
    assert listening.read().until == pytest.approx(now + SOONER * 600)
    now += 300.0
    heart.compiles(begins=False)
    sign = listening.read()
    assert (sign.step, sign.turn, sign.phase) == (FEW + 2, 1, "forward")
    assert sign.until == pytest.approx(now + SLOWER * 4 - 10)
    heart.begin(FEW + 3)
    assert listening.read().until == pytest.approx(now + SLOWER * 10)  # step FEW + 2 took 10 s without compiling


def test_torchs_compiler_says_when_it_compiles_also_again(listening: Page) -> None:
    """Use a compiler backend that reads the heartbeat page; a new shape compiles again."""
    import torch

    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        seen.append(listening.read().phase)
        return graph.forward

    @torch.compile(backend=look, dynamic=False)
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    heart = Heartbeat.open(Launch())
    heart.begin(7)
    heart.beat("forward")
    with told_of_compilations(heart, compiles=True):
        for size in (3, 3, 4):
            double(torch.ones(size))
            assert listening.read().phase == "forward"
    double(torch.ones(5))  # the callbacks are removed
    assert seen == [COMPILE, COMPILE, "forward"]


def test_nobody_listens_and_nothing_happens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    Heartbeat.open(Launch()).begin(1)
    monkeypatch.setenv(FOLDER, str(tmp_path))  # set by another launcher, whose worker this process is not
    monkeypatch.setenv(LOCKED_BY, "0")
    Heartbeat.open(Launch()).begin(1)
    leave_stacks_when_asked()
    assert not list(tmp_path.iterdir())


def test_patience_is_ten_times_the_slowest_recent_step_between_bounds() -> None:
    patience = Patience(600.0)
    for _ in range(FEW):
        assert patience.allowance() == 600
        patience.learn(0.1)
    assert patience.allowance() == FLOOR_SECONDS
    patience.learn(5.0)
    assert patience.allowance() == SLOWER * 5
    patience.learn(90.0)
    assert patience.allowance() == 600  # capped by a collective's timeout
    patience.learn(400.0)
    assert patience.allowance() == 800  # unless steps are slower
    for _ in range(RECENT):
        patience.learn(3.0)
    assert patience.allowance() == SLOWER * 3


def test_a_number_in_the_config_holds_after_the_first_step() -> None:
    patience = Patience(600.0, 4.0)
    assert patience.allowance() == 600
    patience.learn(100.0)
    assert patience.allowance() == 4


def test_stacks_are_left_where_the_launcher_looks(listening: Page, tmp_path: Path) -> None:
    """Run in a separate process, since pytest uses faulthandler too."""
    import subprocess
    import sys

    code = (
        "import os, signal, threading\n"
        "from shoal.elastic.heartbeat import leave_stacks_when_asked\n"
        "leave_stacks_when_asked()\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "os.kill(os.getpid(), signal.SIGUSR2)\n"
    )
    environment = {**os.environ, LOCKED_BY: str(os.getpid())}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    text = stacks_file(tmp_path, 1).read_text()
    assert text.count("most recent call first") == 2
    assert "in wait" in text
