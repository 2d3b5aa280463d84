"""The live view of a run, drawn at fixed sizes from synthetic records and from a running one."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from shoal.errors import RunError
from shoal.report.live.lines import Lines, summary
from shoal.report.live.screen import watch
from shoal.report.live.sight import Gatherer
from shoal.report.live.state import Follower, Phase, State, newest_first
from shoal.report.live.table import table
from shoal.report.live.view import Sight, event_line, frame
from shoal.run.folder import RunFolder
from shoal.run.goodput import account
from shoal.run.records import forget_after, read_metrics
from tests.cli.commands import Place
from tests.report.synthetic import write_run

SIZES = [(60, 20), (80, 24), (120, 40), (200, 60), (40, 10), (20, 5), (300, 100)]
SPIKE = 3_100


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Return a run of more steps than the view keeps in memory, with a spike early and a slow rank."""
    folder = tmp_path_factory.mktemp("runs") / "long"
    return write_run(folder, 12_000, seed=3, spikes=(SPIKE,), ranks=8, slow={5: "backward"}, restarts=(4_000,))


@pytest.fixture
def running(tmp_path: Path) -> Iterator[RunFolder]:
    """Return a run whose lock this process holds."""
    run = write_run(tmp_path / "running", 40, seed=1, finished=False)
    events = [json.loads(line) | {"total_steps": 100} for line in run.events_file.read_text().splitlines()]
    run.events_file.write_text("".join(f"{json.dumps(event)}\n" for event in events))
    run.lock()
    yield run
    run.release()


def text_of(sight: Sight, width: int, height: int) -> list[str]:
    return [line.plain for line in frame(sight, width, height)]


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("ascii_only", [False, True])
def test_every_line_fits(long_run: RunFolder, width: int, height: int, ascii_only: bool) -> None:
    sight = dataclasses.replace(Gatherer(long_run).look(whole=True), ascii_only=ascii_only)
    lines = text_of(sight, width, height)
    assert len(lines) == height
    assert max(map(cell_len, lines)) <= width
    if ascii_only:
        assert "".join(lines).replace("…", "").isascii()


def test_the_numbers_are_those_of_the_records_with_units(long_run: RunFolder) -> None:
    metrics = read_metrics(long_run.metrics_file)
    last, evaluation = metrics.steps[-1], metrics.evaluations[-1]
    text = "\n".join(text_of(Gatherer(long_run).look(whole=True), 80, 24))
    assert f"loss {last.loss:.4f} nats/token" in text
    assert f"held-out {evaluation.val_loss:.4f} at step 12,000" in text
    assert f"speed {last.tokens_per_second:,.0f} tokens/s" in text
    assert f"step {1000 * last.step_seconds:,.0f} ms" in text
    assert f"MFU {100 * last.mfu:.1f}%" in text
    assert f"lr {last.lr:.2e}" in text
    assert f"goodput {100 * account(long_run.time_file).goodput:.1f}%" in text
    assert "step 12,000/12,000" in text
    assert "1 restart" in text
    assert re.search(r"memory +\d\.\d\d GiB", text)
    for phase in ("forward", "backward"):
        assert re.search(rf"{phase} \d+\.\d%", text)


@pytest.mark.parametrize(("width", "height"), [(60, 20), (80, 24), (200, 60)])
def test_a_spike_of_one_step_is_seen_at_every_size(long_run: RunFolder, width: int, height: int) -> None:
    lines = frame(Gatherer(long_run).look(whole=True), width, height)
    first = next(at for at, line in enumerate(lines) if line.plain.startswith("loss  nats/token")) + 1
    left = (width - 3) * 3 // 5 if width >= 130 else width
    expected = 8 + SPIKE * (left - 8) // 12_000
    top = lines[first]
    red = {at for span in top.spans if "red" in str(span.style) for at in range(span.start, span.end) if at > 12}
    assert any(abs(at - expected) <= 1 and top.plain[at] != " " for at in red)


def test_a_large_terminal_shows_every_rank_and_the_slow_one(long_run: RunFolder) -> None:
    lines = text_of(Gatherer(long_run).look(whole=True), 200, 60)
    head = next(at for at, line in enumerate(lines) if re.search(r"rank +GiB +peak +busy", line))
    rows = [line.split()[-10:] for line in lines[head + 1 : head + 9]]  # rank, GiB, peak, busy, and six phases
    assert [row[0] for row in rows] == list("01234567")
    busy = [int(row[3]) for row in rows]
    assert busy.index(max(busy)) == 5
    assert "held-out loss" in "\n".join(lines)


def test_a_log_rewritten_at_a_resume_is_followed(running: RunFolder) -> None:
    gatherer = Gatherer(running)
    assert gatherer.look(whole=True).state.loss is not None
    kept = [r.loss for r in read_metrics(running.metrics_file).steps if r.step <= 20]
    forget_after(running.metrics_file, 20)
    sight = gatherer.look(whole=True)
    assert sight.state.loss == kept[-1]
    assert sight.series["loss"].steps[-1] == 20


def test_a_run_that_lives_has_time_left(running: RunFolder) -> None:
    state = Follower(running).look()
    assert (state.condition, state.total_steps) == ("running", 100)
    seconds = read_metrics(running.metrics_file).steps[-1].step_seconds
    assert state.left_seconds == pytest.approx((100 - state.step) * seconds, rel=0.5)


def test_a_run_whose_process_died_says_so(running: RunFolder) -> None:
    running.release()
    state = Follower(running).look()
    assert state.condition == "crashed"
    assert f"process {os.getpid()}" in state.why
    assert "is gone" in "\n".join(text_of(Sight(state=state, now=time.time()), 80, 24))


def test_a_run_on_another_host_lives_while_it_writes(running: RunFolder) -> None:
    holder = running.holder()
    running.release()
    lock = running.path / "lock"
    lock.write_text(json.dumps(holder | {"host": "node7"}))
    assert Follower(running).look().condition == "running"
    assert Follower(running).look(time.time() + 3600).condition == "crashed"


@pytest.mark.parametrize("phase", ["reading", "tokenizer", "importing torch", "loading weights", "compile"])
def test_phases_before_the_first_step(tmp_path: Path, phase: str) -> None:
    run = RunFolder(tmp_path / "new")
    run.lock()
    note = {"time": time.time(), "phase": phase, "done": 30, "total": 120, "pid": os.getpid()}
    run.now_file.write_text(json.dumps(note))
    sight = Gatherer(run).look(whole=True)
    run.release()
    for width, height in [(60, 20), (80, 24)]:
        text = "\n".join(text_of(sight, width, height))
        assert re.search(rf"now: {phase} █+░+ +25\.0%", text)
        assert "no step recorded yet" in text
    assert "25%" in summary(sight.state)
    assert phase in summary(sight.state)


def test_names_from_files_cannot_move_the_cursor(running: RunFolder) -> None:
    with running.events_file.open("a") as file:
        file.write(json.dumps({"time": 1.0, "event": "\x1b[2J\nevil", "why": "\x1b]0;title\x07"}) + "\n")
    running.now_file.write_text(json.dumps({"time": time.time(), "phase": "\x1b[31mred\n"}))
    text = "".join(text_of(Gatherer(running).look(whole=True), 200, 60))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\n" not in event_line({"event": "a\nb", "time": 1.0}).plain


def test_several_runs_in_a_row_each(long_run: RunFolder, running: RunFolder) -> None:
    sights = [Gatherer(run).look(whole=True) for run in (long_run, running)]
    for width, height in [(60, 10), (110, 12), (200, 30)]:
        lines = [line.plain for line in table(sights, width, height)]
        assert len(lines) == height
        assert max(map(cell_len, lines)) <= width
        assert "long" in lines[1]
        assert "finished" in lines[1]
        assert "12,000/12,000" in lines[1]


def test_plain_lines_come_at_intervals_and_changes() -> None:
    lines = Lines(10.0)
    state = State(name="a", folder="runs/a", condition="running", phase=Phase(name="reading", done=1, total=4))

    def said(at: float, **changes: Any) -> list[str]:
        nonlocal state
        state = dataclasses.replace(state, **changes)
        return list(lines.of(state, at))

    assert said(0.0) == ["a: running  reading 25%"]
    assert said(5.0) == []
    assert said(6.0, phase=Phase(name="training"), step=3, total_steps=8) == ["a: running  step 3/8"]
    assert said(15.9) == []
    assert len(said(16.0)) == 1
    alert = {"rule": "loss_above", "text": "loss 9"}
    assert said(17.0, alerts=[alert]) == ["a: alert: loss 9"]
    assert said(18.0) == []
    assert said(19.0, alerts=[]) == ["a: alert is over: loss_above"]
    assert said(20.0, condition="finished", phase=None) == ["a: finished  step 3/8"]


def test_quiet_lines_are_changes_alone() -> None:
    lines = Lines(1.0, quiet=True)
    state = State(name="a", folder="a", condition="running", phase=Phase(name="training"))
    assert len(list(lines.of(state, 0.0))) == 1
    assert list(lines.of(dataclasses.replace(state, phase=Phase(name="saving")), 50.0)) == []
    assert len(list(lines.of(dataclasses.replace(state, condition="stopped"), 60.0))) == 1


def test_the_command_takes_the_newest_run(tmp_path: Path) -> None:
    place = Place(tmp_path)
    run = write_run(tmp_path / "runs" / "old", 30, seed=1)
    os.utime(run.metrics_file, (1e9, 1e9))
    write_run(tmp_path / "runs" / "new", 50, seed=2)
    assert newest_first(tmp_path / "runs")[0].path.name == "new"
    state = json.loads(place.answer("top", "--json"))
    assert (state["name"], state["step"], state["condition"]) == ("new", 50, "finished")
    assert "did you mean old?" in place.refused("top", "odl")


def test_without_a_terminal_runs_are_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / name, 30, seed=1) for name in ("a", "b")]
    watch(runs[:1], every_seconds=None, once=True)
    assert capsys.readouterr().out.startswith("a: finished  step 30/30  loss ")
    watch(runs, every_seconds=0.1)  # ends by itself: both runs have ended
    assert capsys.readouterr().out.count(": finished  step 30/30") == 2
    watch(runs, every_seconds=0.1, quiet=True)
    assert len(capsys.readouterr().out.splitlines()) == 2
    watch(runs, every_seconds=None, as_json=True)
    assert [state["name"] for state in json.loads(capsys.readouterr().out)] == ["a", "b"]


def test_a_command_without_runs_says_what_to_do(tmp_path: Path) -> None:
    from shoal.commands.live import _newest

    with pytest.raises(RunError, match="name one, or their folder with --runs"):
        _newest(tmp_path)
