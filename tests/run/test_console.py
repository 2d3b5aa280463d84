"""The console: which steps are shown, in how many columns, long phases, and no foreign control characters."""

from __future__ import annotations

import dataclasses
import io
import itertools

import pytest

from shoal.run.console import STEP_LINES, Console, _Lines, step_interval, step_line
from shoal.run.narrator import Narrator
from shoal.run.records import StepRecord
from shoal.system.output import on_one_line, say_error, visible

RECORD = StepRecord(
    step=7, tokens=100, loss=3.21, lr=3e-4, grad_norm=0.55, tokens_per_second=123_263.0, step_seconds=0.905, mfu=0.388,
    memory_bytes=3 << 30,
)  # fmt: skip


def test_a_step_fits_the_width_by_leaving_out_what_matters_least() -> None:
    whole = step_line(RECORD, 20_000, 12_000.0)
    assert "905 ms  mfu 38.8%  3.00 GiB  3h20m left" in whole
    seen = [step_line(RECORD, 20_000, 12_000.0, columns) for columns in range(len(whole), 0, -1)]
    assert all(len(line) <= columns for columns, line in zip(range(len(whole), 45, -1), seen, strict=False))
    kept = [[name for name in ("ms", "mfu", "lr", "GiB", "norm", "left") if f" {name}" in line] for line in seen]
    assert [k for k, before in zip(kept[1:], kept, strict=False) if k != before] == [
        ["mfu", "lr", "GiB", "norm", "left"], ["lr", "GiB", "norm", "left"], ["GiB", "norm", "left"], ["norm", "left"],
        ["left"], [],
    ]  # fmt: skip
    assert seen[-1] == "step     7/20000  loss 3.2100  123,263 tok/s"  # never dropped
    assert "mfu" not in step_line(dataclasses.replace(RECORD, mfu=None), 20_000, None)


@pytest.mark.parametrize("total", [1, 40, 41, 80, 81, 600, 4_000, 100_000, 10**7])
def test_a_run_has_some_forty_steps_on_the_console(total: int, capsys: pytest.CaptureFixture[str]) -> None:
    interval = step_interval(total)
    assert int(str(interval).rstrip("0") or 1) in (1, 2, 5)
    assert total / interval <= STEP_LINES
    assert interval == 1 or total / interval > STEP_LINES / 2.5
    console = Console()
    for step in sorted({*range(1, 50), *range(interval, total + 1, interval), total}):
        if step <= total:
            console.step(dataclasses.replace(RECORD, step=step), total, None)
    shown = [
        int(line.split()[1].partition("/")[0])
        for line in capsys.readouterr().out.replace("step ", "step").replace("step", "step ").splitlines()
    ]
    assert shown == sorted({1, 2, 3, *range(interval, total + 1, interval), total} & set(range(total + 1)))


def test_how_often_can_be_said(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    for step in range(1, 11):
        console.step(dataclasses.replace(RECORD, step=step), 10, None, 4)
    assert [line.split("/")[0].split()[-1] for line in capsys.readouterr().out.splitlines()] == [
        "1",
        "2",
        "3",
        "4",
        "8",
        "10",
    ]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_takes_long_is_named_while_it_lasts_and_when_it_is_over() -> None:
    said, clock = list[tuple[float, str]](), Clock()
    narrator = Narrator(lambda text: said.append((clock.now, text)), clock)
    narrator.begin("quick")
    for tenth in range(1, 1000):
        clock.now = tenth / 10
        if clock.now == 0.5:
            narrator.begin("a second")
        elif clock.now == 2.0:
            narrator.begin("loading")
        elif clock.now == 80.0:
            narrator.begin(None)
        narrator.begin("loading") if 2.0 < clock.now < 80.0 else None  # repeating it changes nothing
        narrator.look()
    assert said == [
        (2.0, "a second: 1.5 s"), (4.0, "loading ..."), (12.0, "loading: 10s so far"), (32.0, "loading: 30s so far"),
        (62.0, "loading: 1m00s so far"), (80.0, "loading: 1m18s"),
    ]  # fmt: skip


@pytest.mark.parametrize("steady", [True, False])
def test_progress_without_a_terminal_has_a_line_every_few_seconds(steady: bool) -> None:
    said, clock = list[float](), Clock()
    lines = _Lines("scoring", lambda text: said.append(clock.now), steady, clock)
    for second in range(301):
        clock.now = float(second)
        lines(f"{second} tokens" if steady else "tokens", second, 300)
    gaps = [b - a for a, b in itertools.pairwise(said)]
    assert gaps[0] == 3
    assert max(gaps) == 3 if steady else 20 < max(gaps) < 40


def test_what_a_terminal_would_obey_is_shown() -> None:
    hostile = "a\x1b[31mred\x07\r\x9b2J\u202eb\x7f\udcffé漢\n\tc"
    assert visible(hostile) == "a\\x1b[31mred\\x07\\r\\x9b2J\\u202eb\\x7f\\udcffé漢\n\tc"
    assert on_one_line(hostile).endswith("漢\\n\\tc")


def test_all_that_a_console_says_passes_there(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    for say in (console.say, console.note, console.warn, say_error):
        say("x\x1b]0;owned\x07")
    with console.progress("preparing") as progress:
        progress("\x1b[2J", 1, 2)
    both = capsys.readouterr()
    assert "\x1b" not in both.out + both.err
    assert (both.out + both.err).count("\\x1b") == 5
    assert isinstance(io.StringIO(both.out).readline(), str)
