"""The search behind auto: what is tried within the limit, the table it prints, and a trial's real processes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from shoal.bench.choose import Search, lines, run_search, this_machine
from shoal.bench.timed_steps import time_steps
from shoal.bench.worker_process import end
from shoal.config.data_options import Data
from shoal.config.options import Config, Model, Train
from shoal.config.run_options import Launch
from shoal.errors import LaunchError
from shoal.plan.choice.candidates import Candidates, Timing, Trial, find_candidates
from shoal.plan.machine import GIB, find_machine
from shoal.plan.speed.rates import Rates

MACHINE = find_machine("2xcpu-4GB", 1)
BOTH = {"parallel": "here", "train.micro_batch": "there"}
TINY = Config(
    model=Model(dim=32, num_layers=1, num_heads=2, max_seq_len=32, vocab_size=257),
    data=Data(corpus="dummy", dummy_documents=60, tokenizer="bytes", seq_len=32),
    train=Train(global_batch=16, micro_batch=8, dtype="float32", steps=1, device="cpu"),
    launch=Launch(processes=1, threads=1, name="tiny"),
)


class Clock:
    """A clock that only trials move; each takes `start` seconds and its steps."""

    def __init__(self, start: float = 5.0) -> None:
        self.start, self.time = start, 0.0
        self.limits: list[float] = []
        self.failing: dict[int, Timing] = {}  # by number of the trial

    def now(self) -> float:
        return self.time

    def trial(self, trial: Trial, limit: float) -> Timing:
        number = len(self.limits)
        self.limits.append(limit)
        assert trial.candidate.choice is not None
        seconds = 10 * trial.candidate.choice.seconds.middle
        done = max(0, min(3 + trial.steps, int((limit - self.start) / seconds)))
        timing = self.failing.get(number) or (
            Timing(seconds, done) if done else Timing(None, why=f"no step in {limit:.0f} s", too_slow=True)
        )
        self.time += min(limit, self.start + (3 + trial.steps) * seconds)
        return timing


def candidates(config: Config = TINY) -> Candidates:
    return find_candidates(config, MACHINE, BOTH, (Rates(MACHINE, 4), ()))


def search(clock: Clock, limit: float = 60.0) -> Search:
    return run_search(candidates(), clock.trial, limit, clock.now)


def test_the_fastest_that_was_measured_is_chosen_and_said() -> None:
    found = search(Clock())
    assert len(found.tried) == 3
    assert found.chosen is found.tried[0].candidate
    said = lines(found, BOTH, MACHINE)
    assert said[0].startswith("parallel auto and train.micro_batch auto: 9 candidates on 2 processes, 3 tried in ")
    assert [line.split("  ")[1] for line in said[2:5]] == [str(t.candidate) for t in found.tried]
    assert said[-1].startswith(f"chosen: {found.chosen}, the fastest measured, ")
    assert "Stopped: 3 were measured. The run keeps it, also when it resumes." in said[-1]


@pytest.mark.parametrize(
    "why", [Timing(None, why="0.1 GB more could not be allocated", out_of_memory=True), Timing(None, why="a bug")]
)
def test_a_candidate_that_fails_is_dropped_and_said(why: Timing) -> None:
    clock = Clock()
    clock.failing[0] = why
    found = search(clock)
    assert found.chosen is not found.tried[0].candidate
    row = lines(found, BOTH, MACHINE)[2]
    assert row.strip().startswith(str(found.tried[0].candidate))
    assert row.endswith(f"  {why.why}")


def test_the_limit_holds_however_slow_the_machine_is() -> None:
    for start in (0.1, 3.0, 12.0, 25.0, 40.0, 500.0):
        clock = Clock(start)
        search(clock)
        assert clock.time <= 60.0 + 1e-6
        assert all(limit > 0 for limit in clock.limits)


def test_no_trial_begins_that_could_not_end() -> None:
    clock = Clock(25.0)
    found = search(clock)
    assert len(found.tried) == 2  # 25 s of 60 each
    assert found.why_over == "launch.auto_seconds 60 leaves no time for another"
    assert all(t.is_measured for t in found.tried)


def test_without_time_the_plan_decides() -> None:
    found = search(Clock(), 0.0)
    assert str(found.chosen) == str(candidates().listed[0])
    assert lines(found, BOTH, MACHINE)[-1] == f"chosen by the plan alone: {found.chosen}"


def test_if_none_was_measured_the_first_that_may_fit_is_chosen() -> None:
    clock = Clock()
    clock.failing = {n: Timing(None, why="out of memory", out_of_memory=True) for n in range(9)}
    found = search(clock)
    assert not any(t.is_measured for t in found.tried)
    assert "although no step of it was measured" in lines(found, BOTH, MACHINE)[-1]


def test_a_trial_that_fails_says_why_in_one_line(tmp_path: Path) -> None:
    config = TINY.replace("data", folder=str(tmp_path / "data")).replace("model", vocab_size=100)
    timing = time_steps(config, 3, _folder(tmp_path), 120.0, cuda=False)
    assert timing.seconds is None
    assert "vocab_size" in timing.why
    assert (timing.out_of_memory, timing.too_slow) == (False, False)


@pytest.mark.parametrize("limit", [0.01, 2.0])
def test_a_trial_ends_at_its_limit_with_all_its_processes(limit: float, tmp_path: Path) -> None:
    """After two seconds, workers usually exist, and still import torch."""
    config = TINY.replace("data", folder=str(tmp_path / "data")).replace("launch", processes=2)
    timing = time_steps(config, 3, _folder(tmp_path), limit, cuda=False)
    assert timing.too_slow or timing.seconds
    assert not timing.out_of_memory
    left = [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
    assert left == []  # a dead process has no command line


def test_an_ended_process_has_given_back_its_memory() -> None:
    """The first thread of a killed process is gone long before the last, which frees the memory."""
    works = "import threading; held = bytearray(2**28)\n"
    works += "for _ in range(8): threading.Thread(target=threading.Event().wait).start()\n"
    works += "print('ready', flush=True)"
    starts = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {works!r}])"
    process = subprocess.Popen([sys.executable, "-c", starts], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    [worker] = psutil.Process(process.pid).children()
    end(process)
    with contextlib.suppress(psutil.NoSuchProcess):
        assert (worker.status(), worker.num_threads()) == (psutil.STATUS_ZOMBIE, 1)


@pytest.mark.parametrize(
    ("name", "said", "peak"),
    [("NVIDIA H100 80GB HBM3", "H100-80GB", 989e12), ("NVIDIA Whatever", "NVIDIA Whatever", 150e12)],
)
def test_gpus_have_the_memory_that_is_free_now(
    name: str, said: str, peak: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = subprocess.CompletedProcess([], 0, json.dumps([name, 30 * GIB]))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    machine = this_machine(TINY.replace("train", device="cuda").replace("launch", processes=4), 4)
    assert (machine.name, machine.cuda, machine.world_size) == (said, True, 4)
    assert machine.usable_bytes < machine.memory_bytes == 30 * GIB
    assert machine.flops == pytest.approx(peak, rel=0.05)


def test_unknown_memory_of_gpus_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise subprocess.CalledProcessError(1, "python")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(LaunchError, match="set the sizes instead of auto"):
        this_machine(TINY.replace("train", device="cuda"), 1)


def test_processes_on_a_cpu_share_the_memory_that_is_available() -> None:
    one, two = (this_machine(TINY.replace("launch", processes=n), 0).memory_bytes for n in (1, 2))
    assert 0 <= two < one < psutil.virtual_memory().total


def _folder(path: Path) -> Path:
    (folder := path / "trial").mkdir()
    return folder
