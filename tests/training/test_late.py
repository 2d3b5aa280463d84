"""Reading a step's numbers while the next step runs, as on a GPU: the same run, with each step's own time and split."""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from shoal.config.run_options import Launch
from shoal.elastic.heartbeat import FOLDER, Heartbeat, Page
from shoal.mesh.place import LOCKED_BY
from shoal.metrics import meter
from shoal.metrics.moment import Moment
from shoal.metrics.progress import DeviceProgress
from shoal.run.phases import PHASES
from shoal.run.records import StepRecord
from shoal.training import loop, step
from tests.training.test_equivalence import ALONE, config_in, train_here

STEP_SECONDS = 2.0


class Device(Moment):
    """A fake `Moment` of a device whose steps take two seconds. At the first query it has not come yet."""

    now: ClassVar[float] = 0.0

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._seconds, self.looks = Device.now, 0

    def has_come(self) -> bool:
        self.looks += 1
        return self.looks > 1


def after_a_step(device: torch.device) -> Device:
    Device.now += STEP_SECONDS
    return Device(device)


def test_a_run_that_reads_late_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(name: str) -> list[StepRecord]:
        config = config_in(tmp_path, name, steps=7, eval_every=3, eval_tokens=96)
        return train_here(ALONE, config.replace("metrics", every=1, split_every=1))

    monkeypatch.setattr(meter, "Moment", Device)
    monkeypatch.setattr(step, "Moment", after_a_step)
    at_once = trained("at-once")
    monkeypatch.setattr(loop, "reads_late", lambda device: True)
    late = trained("late")
    for records in (at_once, late):
        assert [r.step for r in records] == list(range(1, 8))
        assert [r.step_seconds for r in records] == [STEP_SECONDS] * 7  # including the last step
        assert [(r.split_seconds or {})["step"] for r in records] == list(range(1, 8))
        assert all((r.split_seconds or {})[phase] > 0 for r in records for phase in PHASES)
    assert [(r.loss, r.grad_norm, r.tokens) for r in late] == [(r.loss, r.grad_norm, r.tokens) for r in at_once]


@pytest.mark.parametrize(
    ("device", "hang_seconds", "strict"), [("cuda", None, True), ("cpu", None, False), ("cpu", 30.0, True)]
)
def test_a_late_step_is_a_hang_where_the_host_only_waits_for_its_device(
    device: str, hang_seconds: float | None, strict: bool
) -> None:
    """A host that waits for a GPU looks busy, so this does not count as progress. On a CPU it does, unless `hang_seconds` is set."""
    heartbeat = Heartbeat.open(Launch(hang_seconds=hang_seconds))
    DeviceProgress(torch.device(device), heartbeat)
    assert heartbeat.strict is strict


def test_a_real_moment_is_when_it_was_made_on_a_cpu() -> None:
    first, second = Moment(torch.device("cpu")), Moment(torch.device("cpu"))
    assert first.has_come()
    second.wait()
    assert second.seconds_since(first) >= 0 >= first.seconds_since(second)


class Slow(Moment):
    """A fake `Moment`: number n has come once `reached` has more than n entries."""

    reached: ClassVar[list[int]] = []
    made: ClassVar[int] = 0

    def __init__(self, device: torch.device) -> None:
        super().__init__(torch.device("cpu"))
        self.number = Slow.made
        Slow.made += 1

    def has_come(self) -> bool:
        return self.number < len(Slow.reached)


def test_a_page_says_where_the_device_is_while_its_host_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", FOLDER: str(tmp_path), LOCKED_BY: str(os.getppid())}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "x")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr("shoal.metrics.progress.Moment", Slow)
    page, heart = Page(tmp_path, 0), Heartbeat.open(Launch())
    progress = DeviceProgress(torch.device("cuda"), heart)
    for number in (4, 5):
        heart.begin(number)
        for phase in ("forward", "backward", "optimizer"):
            progress.enter(phase)
    until = page.read().until
    assert (page.read().step, page.read().phase) == (5, "optimizer")  # where the host is
    seen = []

    def looks(seconds: float) -> None:
        sign = page.read()
        seen.append((sign.step, sign.turn, sign.phase))
        Slow.reached.append(0)

    monkeypatch.setattr("shoal.metrics.progress.time.sleep", looks)
    over = Slow(torch.device("cuda"))
    over.number = 4
    progress.wait(over)
    host = (5, 3, "optimizer")
    assert seen == [host, (4, 1, "forward"), (4, 2, "backward"), (4, 3, "optimizer"), (5, 1, "forward")]
    sign = page.read()
    assert (sign.step, sign.turn, sign.phase) == host  # the page shows the host again
    assert sign.until == until
    assert not math.isinf(until)
