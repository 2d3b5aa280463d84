"""What a person sees: lines, coloured on a terminal and plain elsewhere. Only one rank speaks."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Console:
    """Says things on one rank and keeps quiet on the others."""

    def __init__(self, speaks: bool = True, *, on_stderr: bool = False) -> None:
        """on_stderr: where standard output is for another program."""
        self._speaks = speaks
        self._rich = RichConsole(highlight=False, soft_wrap=True, stderr=on_stderr)

    @property
    def is_terminal(self) -> bool:
        return self._rich.is_terminal

    def say(self, text: str = "", style: str = "") -> None:
        """One line."""
        if not self._speaks:
            return
        if self.is_terminal:
            self._rich.print(text, style=style or None, markup=False)
        else:
            print(text, file=self._rich.file, flush=True)

    def note(self, text: str) -> None:
        """A line that is good to know and not in the way."""
        self.say(text, "dim")

    def warn(self, text: str) -> None:
        """A line that somebody should act on."""
        self.say(f"note: {text}", "yellow")

    def step(self, record: Mapping[str, Any], total_steps: int, left_seconds: float | None) -> None:
        """The line of a step, from the record that goes to `metrics.jsonl`."""
        self.say(step_line(record, total_steps, left_seconds))

    @contextmanager
    def progress(self, title: str) -> Iterator[Any]:
        """A bar on a terminal, a line now and then elsewhere; call the result with (phase, done, total)."""
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
            yield _Lines(title)


class _Bar:
    def __init__(self, bar: Progress, title: str) -> None:
        self._bar, self._title, self._task = bar, title, bar.add_task(title)

    def __call__(self, phase: str, done: int, total: int) -> None:
        self._bar.update(self._task, description=f"{self._title}: {phase}", completed=done, total=max(total, 1))


class _Lines:
    """Each phase is named once, and every quarter of it."""

    def __init__(self, title: str) -> None:
        self._title, self._last = title, ("", -1)

    def __call__(self, phase: str, done: int, total: int) -> None:
        quarter = 4 * done // max(total, 1)
        if (phase, quarter) != self._last:
            self._last = (phase, quarter)
            print(f"{self._title}: {phase} {25 * quarter}%", flush=True)


def step_line(record: Mapping[str, Any], total_steps: int, left_seconds: float | None) -> str:
    """Loss, learning rate, gradient norm, tokens/s, ms/step, MFU, memory, time left."""
    width = len(str(total_steps))
    parts = [
        f"step {record['step']:>{width}}/{total_steps}",
        f"loss {record['loss']:.4f}",
        f"lr {record['lr']:.2e}",
        "norm inf" if record["grad_norm"] is None else f"norm {record['grad_norm']:.2f}",
        f"{record['tokens_per_second']:,.0f} tok/s",
        f"{1000 * record['step_seconds']:,.0f} ms",
        *([f"mfu {100 * record['mfu']:.1f}%"] if record.get("mfu") is not None else []),
        f"{record['memory_bytes'] / 2**30:.2f} GiB",
    ]
    if left_seconds is not None:
        parts.append(f"{duration(left_seconds)} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """ "2h05m", "3m20s", "12s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def error(text: str) -> None:
    """The one message of a `ShoalError`, on standard error."""
    print(f"shoal: {text}", file=sys.stderr, flush=True)
