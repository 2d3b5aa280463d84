"""The console: lines, colored on a terminal and plain elsewhere. Only one rank prints."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from shoal.run.records import StepRecord
from shoal.system.output import visible

FIRST_LINES: Final = 3  # the first steps are always shown
STEP_LINES: Final = 40  # maximum lines of steps per run: more would bury the important lines
WIDTH: Final = 80  # columns, if the terminal's width is unknown
# Parts dropped from a step's line that is too long, in this order: first those that follow from tokens/s.
DROPPED: Final = ("ms", "mfu", "lr", "memory", "norm", "left")
SECONDS_BETWEEN: Final = 3.0  # between lines of progress if there is no terminal


class Console:
    """Prints on one rank and is silent on the others."""

    def __init__(self, speaks: bool = True, *, on_stderr: bool = False) -> None:
        """on_stderr: print to standard error, because another program reads standard output."""
        self._speaks = speaks
        self._rich = RichConsole(highlight=False, soft_wrap=True, stderr=on_stderr)
        self._steps_shown = 0
        self.on_progress: Callable[[str, int, int], None] = lambda phase, done, total: None
        """Called with each (phase, done, total) of a progress bar too."""

    @property
    def is_terminal(self) -> bool:
        """Return whether lines go to a terminal."""
        return self._rich.is_terminal

    def say(self, text: str = "", style: str = "") -> None:
        """Print a line."""
        if not self._speaks:
            return
        text = visible(text)
        if self.is_terminal:
            self._rich.print(text, style=style or None, markup=False)
        else:
            print(text, file=self._rich.file, flush=True)

    def show(self, what: Table | Text) -> None:
        """Print a table or a styled text, broken between words; plain and unbroken elsewhere than on a terminal."""
        if self._speaks:
            self._rich.print(what, soft_wrap=isinstance(what, Text) and not self.is_terminal)

    def note(self, text: str) -> None:
        """Print a dim line: worth knowing, no action needed."""
        self.say(text, "dim")

    def warn(self, text: str) -> None:
        """Print a line that the user should act on."""
        self.say(f"note: {text}", "yellow")

    def step(self, record: StepRecord, total_steps: int, left_seconds: float | None, every: int | None = None) -> None:
        """
        Print the line of a step that is one of the first few, the last, or a multiple of `every` (None uses `step_interval`).
        """
        step = record.step
        due = step % (every or step_interval(total_steps)) == 0 or step == total_steps
        if not due and self._steps_shown >= FIRST_LINES:
            return
        self._steps_shown += 1
        self.say(step_line(record, total_steps, left_seconds, shutil.get_terminal_size((WIDTH, 24)).columns))

    @contextmanager
    def progress(self, title: str, *, steady: bool = False) -> Iterator[Any]:
        """
        Show a progress bar on a terminal, occasional lines elsewhere; call the yielded function with (phase, done, total).

        steady: print a line every few seconds, however long the work takes.
        """
        with self._bar(title, steady) as bar:

            def show(phase: str, done: int, total: int) -> None:
                bar(phase, done, total)
                self.on_progress(phase, done, total)

            yield show

    @contextmanager
    def _bar(self, title: str, steady: bool) -> Iterator[Callable[[str, int, int], None]]:
        """Yield what shows the progress."""
        if not self._speaks:
            yield lambda phase, done, total: None
        elif self.is_terminal:
            with Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeRemainingColumn(),
                console=self._rich,
                transient=True,
            ) as bar:
                yield _Bar(bar, title)
        else:
            yield _Lines(title, lambda text: print(text, file=self._rich.file, flush=True), steady)


class _Bar:
    def __init__(self, bar: Progress, title: str) -> None:
        self._bar, self._title, self._task = bar, title, bar.add_task(title)

    def __call__(self, phase: str, done: int, total: int) -> None:
        text = visible(f"{self._title}: {phase}")
        self._bar.update(self._task, description=text, completed=done, total=max(total, 1))


class _Lines:
    """
    Names each phase when it begins and again while it lasts: every few seconds, then less often unless `steady`.

    With `steady` there is one phase, whose text changes.
    """

    def __init__(
        self, title: str, say: Callable[[str], None], steady: bool, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._title, self._say, self._steady, self._now = title, say, steady, now
        self._phase, self._since, self._due = "", 0.0, 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = self._now()
        if phase != self._phase and not (self._steady and self._phase):
            self._phase, self._since, self._due = phase, now, now
        if now < self._due:
            return
        self._due = now + max(SECONDS_BETWEEN, 0.0 if self._steady else (now - self._since) / 10)
        percent = f" {100 * done // total}%" if total else ""
        self._say(visible(f"{self._title}: {phase}{percent}"))


def step_interval(total_steps: int) -> int:
    """Return the steps between lines: 1, 2, 5, 10, 20, ..., so that a run has at most `STEP_LINES` lines."""
    power = 1
    while True:
        for each in (1, 2, 5):
            if total_steps <= STEP_LINES * each * power:
                return each * power
        power *= 10


def step_line(record: StepRecord, total_steps: int, left_seconds: float | None, columns: int | None = None) -> str:
    """
    Return a line with loss, learning rate, gradient norm, tokens/s, ms/step, MFU, memory, time left; within `columns` if possible.
    """
    width = len(str(total_steps))
    parts = {
        "step": f"step {record.step:>{width}}/{total_steps}",
        "loss": f"loss {record.loss:.4f}",
        "lr": f"lr {record.lr:.2e}",
        "norm": "norm inf" if record.grad_norm is None else f"norm {record.grad_norm:.2f}",
        "rate": f"{record.tokens_per_second:,.0f} tok/s",
        "ms": f"{1000 * record.step_seconds:,.0f} ms",
        "mfu": "" if record.mfu is None else f"mfu {100 * record.mfu:.1f}%",
        "memory": f"{record.memory_bytes / 2**30:.2f} GiB",
        "left": "" if left_seconds is None else f"{duration(left_seconds)} left",
    }
    for name in ("", *DROPPED):
        parts.pop(name, None)
        line = "  ".join(filter(None, parts.values()))
        if columns is None or len(line) <= columns:
            break
    return line


def duration(seconds: float) -> str:
    """Return "2h05m", "3m20s" or "12s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
