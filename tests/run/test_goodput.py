"""Where the time went: each microsecond of a run counts once, whatever process died."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shoal.data.order.ledger import Header, Ledger, checksum
from shoal.data.order.order import sample_at
from shoal.run.goodput import MEANINGS, Account, Clock, account, in_words, table
from shoal.run.jsonl import PatientLines, whole_lines
from tests.cli.commands import Place

SECOND = 1_000_000


class Life:
    """One life of a run, with a clock that the test advances in seconds."""

    def __init__(self, path: Path, began: float, age: float = 0) -> None:
        self.now = 0
        times = round(began * SECOND), round(age * SECOND)
        self.clock = Clock(path, every_seconds=1e6, now=lambda: self.now, began=times)

    def passes(self, seconds: float) -> None:
        self.now += round(seconds * SECOND)

    def steps(self, first: int, last: int, seconds: float) -> None:
        for step in range(first, last + 1):
            self.passes(seconds)
            self.clock.reached(step)


def seconds(found: Account) -> dict[str, float]:
    return {category: each / SECOND for category, each in found.spent.items() if each}


def test_a_life_in_which_nothing_goes_wrong(tmp_path: Path) -> None:
    life = Life(tmp_path / "time.jsonl", began=1000, age=4)
    life.passes(3)
    life.clock.begin(0)
    life.steps(1, 1, 10)
    life.steps(2, 4, 2)
    with life.clock.spend("data"):
        life.passes(0.5)
    with life.clock.spend("end"):
        life.passes(1)
        with life.clock.spend("evaluation"):
            life.passes(5)
        with life.clock.spend("checkpoint"):
            life.passes(0.25)
        life.passes(1)
    life.clock.close()
    found = account(tmp_path / "time.jsonl")
    expected = {
        "start": 7, "compile": 8, "step": 8, "data": 0.5, "evaluation": 5, "checkpoint": 0.25, "end": 2
    }  # fmt: skip
    assert seconds(found) == expected
    assert (found.lives, found.step, found.total) == (1, 4, round(30.75 * SECOND))
    assert found.goodput == 8 / 30.75
    assert in_words(found).startswith("goodput 26.0%: step 8.0s, compile 8.0s, start 7.0s, evaluation 5.0s, ")


def test_a_restart_takes_steps_again_and_what_lies_between_is_idle(tmp_path: Path) -> None:
    path = tmp_path / "time.jsonl"
    life = Life(path, began=1000)
    life.clock.begin(0)
    life.steps(1, 10, 2)
    life.passes(1)  # half of step 11
    life.clock.write()  # and SIGKILL
    life = Life(path, began=1030, age=3)
    life.clock.begin(6)
    life.steps(7, 12, 2)
    life.clock.close()
    found = account(path)
    assert seconds(found) == {"step": 24, "lost": 9, "idle": 9, "start": 3}
    assert (found.lives, found.step, found.total) == (2, 12, 45 * SECOND)


def test_between_two_lines_steps_are_taken_to_be_equally_long(tmp_path: Path) -> None:
    path = tmp_path / "time.jsonl"
    life = Life(path, began=0)
    life.clock.begin(0)
    life.steps(1, 8, 1)
    life.clock.write()
    life.steps(9, 12, 5)
    life.clock.write()
    life = Life(path, began=28)
    life.clock.begin(11)
    life.clock.write()
    assert seconds(account(path)) == {"step": 23, "lost": 5}
    life = Life(path, began=28)
    life.clock.begin(4)
    life.clock.close()
    assert seconds(account(path)) == {"step": 4, "lost": 24}


def test_a_rollback_within_a_life_is_lost_also_within_a_second(tmp_path: Path) -> None:
    life = Life(tmp_path / "time.jsonl", began=0)
    life.clock.begin(0)
    life.steps(1, 10, 1)
    life.clock.begin(4)
    life.steps(5, 20, 1)
    life.passes(3)
    life.clock.begin(20)  # a step cut short
    life.clock.close()
    assert seconds(account(tmp_path / "time.jsonl")) == {"step": 20, "lost": 9}


def test_a_step_that_no_line_tells_of_is_not_lost(tmp_path: Path) -> None:
    """Kill a run after a save, before the line with the saved step is written."""
    path = tmp_path / "time.jsonl"
    life = Life(path, began=0)
    life.clock.begin(0)
    life.steps(1, 5, 1)
    life.passes(0.5)
    life.clock.write()
    life = Life(path, began=7)
    life.clock.begin(6)
    life.steps(7, 8, 1)
    life.clock.close()
    assert seconds(account(path)) == {"step": 7.5, "idle": 1.5}


def test_lives_that_never_take_a_step(tmp_path: Path) -> None:
    path = tmp_path / "time.jsonl"
    for began in (0, 10, 20):
        life = Life(path, began=began, age=2)
        life.passes(3)
        life.clock.write()
    found = account(path)
    assert seconds(found) == {"start": 15, "idle": 10}
    assert (found.lives, found.step, found.goodput) == (3, 0, 0)
    assert account_of_nothing(tmp_path).total == 0


def account_of_nothing(folder: Path) -> Account:
    (folder / "empty.jsonl").touch()
    found = account(folder / "empty.jsonl")
    assert table(found)
    assert in_words(found).startswith("goodput 0.0%")
    return found


def test_a_clock_that_is_set_back_counts_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "time.jsonl"
    life = Life(path, began=100)
    life.clock.begin(0)
    life.steps(1, 10, 1)
    life.clock.write()
    life = Life(path, began=108, age=5)
    life.clock.begin(10)
    life.steps(11, 12, 1)
    life.clock.close()
    found = account(path)
    assert seconds(found) == {"step": 12, "start": 3}
    assert found.total == (115 - 100) * SECOND


@pytest.mark.parametrize("seed", range(20))
def test_sums_are_the_time_between_the_first_start_and_the_last_line(tmp_path: Path, seed: int) -> None:
    """Random lives, against a model that remembers each step's time and adds up those of the steps that were kept."""
    draw = random.Random(seed)
    path, now, saved = tmp_path / "time.jsonl", 5_000.0, 0
    took: dict[int, float] = {}
    lost = idle = 0.0
    end = now
    for _ in range(6):
        idle += now - end
        life = Life(path, began=now, age=draw.randrange(8))
        life.passes(draw.randrange(5))
        life.clock.begin(saved)
        lost += sum(each for step, each in took.items() if step > saved)
        took = {step: each for step, each in took.items() if step <= saved}
        step = saved
        for _ in range(draw.randrange(3, 30)):
            with life.clock.spend(draw.choice(["data", "evaluation", "checkpoint"])):
                life.passes(draw.random())
            step += 1
            took[step] = draw.choice([1, 2, 5]) if step > saved + 2 else 1
            life.steps(step, step, took[step])
            life.clock.write()
            saved = step if draw.random() < 0.2 else saved
        end = life.clock._life / SECOND + sum(life.clock._spent.values()) / SECOND
        now = end + draw.randrange(10)
    found = account(path)
    assert found.total == round(end * SECOND) - 5_000 * SECOND
    assert found.spent["idle"] == round(idle * SECOND)
    assert found.spent["lost"] == round(lost * SECOND)
    assert found.spent["step"] == round(sum(took.values()) * SECOND)


def test_a_line_that_was_cut_short_is_left_out_and_nothing_grows_onto_it(tmp_path: Path) -> None:
    path = tmp_path / "time.jsonl"
    life = Life(path, began=0, age=1)
    life.clock.begin(0)
    life.steps(1, 5, 1)
    life.clock.write()
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for cut in range(1, len(last)):
        path.write_bytes(whole[:-cut])
        assert account(path).total <= 6 * SECOND
        lines = PatientLines(path)
        lines.add({"life": 9 * SECOND, "step": None, "reached": 0, "spent": {"start": 1}})
        lines.close()
        assert account(path).lives == 2


def test_a_full_disk_stops_nothing_and_its_seconds_are_kept(tmp_path: Path) -> None:
    """A limit on file size simulates a full disk."""
    path = tmp_path / "time.jsonl"
    limit, signals = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        life = Life(path, began=0)
        life.clock.begin(0)
        life.steps(1, 5, 1)
        life.clock.write()
        size = path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limit[1]))
        life.steps(6, 10, 1)
        life.clock.write()
        life.clock.begin(7)
        life.clock.write()
        assert path.stat().st_size == size
        assert life.clock._lines is not None
        assert "cannot be written: " in str(life.clock._lines.problem)
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        life.steps(8, 9, 1)
        life.clock.write()
        assert life.clock._lines.problem is None
        life.clock.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, signals)
    assert seconds(account(path)) == {"step": 9, "lost": 3}


def test_a_folder_that_is_not_there_raises_nothing(tmp_path: Path) -> None:
    clock = Clock(tmp_path / "none" / "time.jsonl")
    clock.begin(0)
    clock.reached(1)
    clock.close()
    clock.close()
    for silent in (Clock(None), Clock(None)):
        silent.begin(0)
        silent.reached(1)
        silent.close()
    with pytest.raises(ValueError, match="unknown category lunch; use one of step, start"):
        clock.spend("lunch").__enter__()


def test_a_step_costs_a_few_microseconds(tmp_path: Path) -> None:
    clock = Clock(tmp_path / "time.jsonl")
    clock.begin(0)
    begun = time.process_time()
    for step in range(1, 20_001):
        with clock.spend("data"):
            pass
        clock.reached(step)
    took = (time.process_time() - begun) / 20_000
    clock.close()
    assert took < 20e-6


def test_a_killed_process_leaves_all_but_a_second(tmp_path: Path) -> None:
    path = tmp_path / "time.jsonl"
    code = (
        "import sys, time; from pathlib import Path; from shoal.run.goodput import Clock\n"
        "clock = Clock(Path(sys.argv[1])); clock.begin(0); clock.reached(1); clock.reached(2); print(flush=True)\n"
        "clock.spend('evaluation').__enter__(); time.sleep(60)"  # one blocking call: only the thread writes
    )
    begun = time.time()
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    started = time.time()
    while account(path).spent["evaluation"] <= 1.0 * SECOND:
        time.sleep(0.05)
    process.kill()
    killed = time.time()
    process.wait()
    process.stdout.close()
    found = account(path)
    life = next(whole_lines(path))["life"] / SECOND
    assert begun - 0.05 <= life <= started
    assert killed - 1.3 < life + found.total / SECOND <= killed + 0.01
    assert found.spent["start"] >= 0.5 * (started - begun) * SECOND  # includes imports
    assert found.spent["evaluation"] > 1.0 * SECOND
    assert set(found.spent) == set(MEANINGS)
    assert os.path.getsize(path) < 5000


def test_neither_record_needs_torch() -> None:
    code = "import sys, shoal.run.goodput, shoal.data.order.ledger; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_commands(tmp_path: Path) -> None:
    """`shoal goodput` and `shoal ledger` take a run by name or by path."""
    place = Place(tmp_path)
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    assert "runs/none is not a run" in place.refused("goodput", "none")
    (run / "config.yaml").write_text("{}\n")
    assert "has no time.jsonl" in place.refused("goodput", "mine")
    assert "has no ledger.jsonl" in place.refused("ledger", "mine")
    life = Life(run / "time.jsonl", began=1000, age=1)
    life.clock.begin(0)
    life.steps(1, 4, 0.75)
    life.clock.close()
    ledger = Ledger(run / "ledger.jsonl")
    header = Header(rows=10, seed=0, global_batch=4, copies=1, data_id="tokens")
    ledger.begin(header, 0, 0)
    ledger.record(1, 0, 4, checksum(sample_at(0, range(4), 10), 40))
    assert "step                 3.000   75.0%  training" in place.good("goodput", "mine")
    found = json.loads(place.good("goodput", str(run), "--json"))
    assert (found["goodput"], found["total_seconds"], sum(found["seconds"].values())) == (0.75, 4, 4)
    assert "PASS" in place.good("ledger", "mine")
    assert json.loads(place.good("ledger", "mine", "--json"))["passed"]
    ledger.record(2, 4, 8, 1)
    code, output = place.run("ledger", "mine")
    assert code == 1
    assert "FAIL" in output
    code, output = place.run("ledger", "mine", "--json")
    assert (code, json.loads(output)["first_wrong"]) == (1, 2)
