"""
Where the time of a run went, across restarts. No torch.

The first rank writes about one line per second to `time.jsonl`. Each line has the totals so far of a life (one process, from
start to end):

    {"life": when it began, "step": the last step taken, "reached": spent["step"] when that step ended, "spent": {category: time}}

and "begin": true if steps continue from an earlier one: at a start and at a rollback.

Times are whole microseconds, so sums are exact. A life's categories add up to its time; the gap from its last line to the
beginning of the next life is idle. So all time is accounted for; a killed process loses the record of one second, which
counts as idle.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import psutil

from shoal.run.console import duration
from shoal.run.jsonl import PatientLines, whole_lines

MEANINGS: Final = {
    "step": "training: steps that count",
    "start": "from a process's start to its first step: imports, building the model, reading a checkpoint",
    "compile": "the first step's time beyond the second's, and the comparison with eager code",
    "data": "waiting for the loader",
    "evaluation": "validation loss",
    "checkpoint": "steps waiting for a save",
    "end": "after the last step: a sample and the summary",
    "lost": "steps repeated after a restart or rollback, or cut short",
    "idle": "between two lives: no process ran",
}
SPENT: Final = tuple(category for category in MEANINGS if category not in ("lost", "idle"))


def _now() -> int:
    """Return microseconds of a monotonic clock."""
    return time.perf_counter_ns() // 1000


def process_start() -> tuple[int, int]:
    """Return when this process started, before any import, and its age, both in microseconds."""
    began = psutil.Process().create_time()
    seconds = time.time() - began
    if hasattr(time, "CLOCK_BOOTTIME"):
        # psutil adds the boot time, which is rounded to seconds; without it the age is precise to 10 ms
        seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - (began - psutil.boot_time())
    age = max(0, int(seconds * 1e6))
    return time.time_ns() // 1000 - age, age


class Clock:
    """
    Charges each microsecond of this process to one category: "start" at first, "step" after `begin`, another inside `spend`.

    path: `time.jsonl`, written by a thread so that no step waits for a disk; None disables writing. Never raises `OSError`.
    now: a clock in microseconds. began: (microseconds since 1970 when this process started, its age in microseconds).
    """

    def __init__(
        self,
        path: Path | None,
        *,
        every_seconds: float = 1.0,
        now: Callable[[], int] = _now,
        began: tuple[int, int] | None = None,
    ) -> None:
        self._life, age = process_start() if began is None else began
        self._now, self._mark = now, now()
        self._spent = dict.fromkeys(SPENT, 0) | {"start": age}
        self._category = self._before = "start"
        self._step: int | None = None
        self._reached = 0
        self._first: int | None = None  # the first step's time, until there is a second one
        self._steps_taken = 0
        self._lock = threading.Lock()
        self._lines = None if path is None else PatientLines(path)
        self._turns: list[dict[str, Any]] = []  # lines that must be written: before and after each rollback
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._write_on, args=(every_seconds,), name="clock", daemon=True)
        if self._lines is not None:
            self.write()
            self._thread.start()

    def begin(self, step: int) -> None:
        """Record that steps continue after `step`: at the start and after a rollback."""
        with self._lock:
            self._charge()
            if self._step is not None:
                self._turns.append(self._line())
            else:
                self._category = "step"
            self._step, self._reached = step, self._spent["step"]
            self._turns.append(self._line() | {"begin": True})

    def reached(self, step: int) -> None:
        """Record that `step` is over."""
        with self._lock:
            self._charge()
            spent = self._spent
            if self._steps_taken == 0:
                self._first = spent["step"]
                spent["compile"] += self._first
                spent["step"] = 0
            elif self._first is not None:
                usual = min(self._first, spent["step"])  # the part of the first step that was not compilation
                spent["compile"] -= usual
                spent["step"] += usual
                self._first = None
            self._steps_taken += 1
            self._step, self._reached = step, spent["step"]

    def spend(self, category: str) -> _Spending:
        """Charge the time inside the block to a category: `with clock.spend("evaluation"): ...`. May be nested."""
        return _Spending(self, category)

    def enter(self, phase: str) -> None:
        """Charge a phase of a step to the category of that name, if there is one."""
        if phase in self._spent:
            self._before = self.switch(phase)

    def leave(self, phase: str) -> None:
        """Charge again to the category that was charged before that phase."""
        if phase in self._spent:
            self.switch(self._before)

    def switch(self, category: str) -> str:
        """Charge time to `category` from now on; return the previous one. Raises ValueError if there is no such category."""
        if category not in self._spent:
            raise ValueError(f"unknown category {category}; use one of {', '.join(self._spent)}")
        with self._lock:
            self._charge()
            before, self._category = self._category, category
        return before

    def write(self) -> None:
        """Write the totals so far."""
        if self._lines is None:
            return
        with self._lock:
            self._charge()
            turns, line = list(self._turns), self._line()
        if self._lines.offer(*turns, line):
            with self._lock:
                del self._turns[: len(turns)]

    def close(self) -> None:
        """Write the last line. May be called twice."""
        self._closed.set()
        if self._lines is not None:
            if self._thread.is_alive():
                self._thread.join()
            self.write()
            self._lines.close()
            self._lines = None

    def _charge(self) -> None:
        now = self._now()
        self._spent[self._category] += now - self._mark
        self._mark = now

    def _line(self) -> dict[str, Any]:
        spent = {category: each for category, each in self._spent.items() if each}
        return {"life": self._life, "step": self._step, "reached": self._reached, "spent": spent}

    def _write_on(self, every_seconds: float) -> None:
        while not self._closed.wait(every_seconds):
            self.write()


class _Spending:
    """The context manager of `spend`: a class, since a generator would be three times slower."""

    __slots__ = ("_before", "_category", "_clock")

    def __init__(self, clock: Clock, category: str) -> None:
        self._clock, self._category, self._before = clock, category, ""

    def __enter__(self) -> None:
        self._before = self._clock.switch(self._category)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._clock.switch(self._before)


# --- reading the lines ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Account:
    """
    All the time of a run so far.

    spent: microseconds by category of `MEANINGS`; they add up to `total`, from the first life's beginning to the last line.
    If the system's clock was set back, time that two lives share is counted once.
    """

    spent: Mapping[str, int]
    lives: int
    step: int

    @property
    def total(self) -> int:
        """Return the total in microseconds."""
        return sum(self.spent.values())

    @property
    def goodput(self) -> float:
        """Return the share of the time in steps that count, in [0, 1]."""
        return self.spent["step"] / max(self.total, 1)

    def as_json(self) -> dict[str, Any]:
        """Return the account in seconds, for `--json`."""
        return {
            "goodput": self.goodput,
            "total_seconds": self.total / 1e6,
            "seconds": {category: each / 1e6 for category, each in self.spent.items()},
            "lives": self.lives,
            "step": self.step,
        }


@dataclass
class _Kept:
    """
    The time of steps that were not repeated later.

    Step `steps[i]` ended after `times[i]` microseconds of kept steps; steps between two entries count as equally long.
    """

    steps: list[int] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    lost: int = 0
    _now: int = 0  # microseconds of kept steps, including the step in progress
    _last_spent: int = 0  # on this life's steps, in its last line

    def go_back(self, step: int) -> None:
        """Count everything after `step` as lost."""
        if not self.steps:
            self.steps, self.times = [step], [self._now]
            return
        # A step later than any written line: the line for it is missing, and nothing is lost.
        at = self._now if step > self.steps[-1] else self._time_of(step)
        self.lost += self._now - at
        cut = bisect.bisect_left(self.steps, step)
        self.steps[cut:], self.times[cut:] = [step], [at]
        self._now = at

    def go_on(self, step: int, reached: int, spent: int) -> None:
        """Add a line: this life has spent `spent` on steps so far, and `reached` until the end of `step`."""
        self._now += spent - self._last_spent
        self._last_spent = spent
        # After a life's first step alone, its share of compilation is unknown and none of it counts as "step".
        if step > self.steps[-1] and reached > 0:
            self.steps.append(step)
            self.times.append(max(self.times[-1], self._now - (spent - reached)))

    def start_life(self) -> None:
        """Begin a life: its lines count from zero."""
        self._last_spent = 0

    def _time_of(self, step: int) -> int:
        right = bisect.bisect_left(self.steps, step)
        if right == 0 or self.steps[right] == step:
            return self.times[right]
        (a, b), (begin, end) = self.steps[right - 1 : right + 1], self.times[right - 1 : right + 1]
        return begin + (end - begin) * (step - a) // (b - a)


def account(path: Path, devices: Callable[[int], int] = lambda life: 1) -> Account:
    """
    Return the account in `time.jsonl`. Raises `OSError` if there is no such file.

    devices: the number of devices of a life, by its beginning as in the file; the account is then in device-microseconds. The
    time between two lives counts for the devices of the earlier one.
    """
    spent = dict.fromkeys(MEANINGS, 0)
    kept = _Kept()
    lives, step, taken = 0, None, 0
    end: int | None = None
    life: dict[str, Any] = {}
    number = before = 1
    for line in whole_lines(path):
        if line["life"] != life.get("life"):
            end = _close_life(spent, life, end, number, before)
            kept.start_life()
            lives += 1
            before, number = number, devices(line["life"])
            step = None
        life = line
        if line["step"] is None:
            continue
        if "begin" in line or step is None:
            kept.go_back(line["step"])
        step = taken = line["step"]
        kept.go_on(step, number * line["reached"], number * line["spent"].get("step", 0))
    _close_life(spent, life, end, number, before)
    spent["step"] -= kept.lost
    spent["lost"] = kept.lost
    return Account(spent, lives, taken)


def _close_life(
    spent: dict[str, int], last: Mapping[str, Any], end: int | None, devices: int, before: int
) -> int | None:
    """
    Add a life's last line, and the idle time since `end`, when the previous life ended; return when this life ended.

    devices: how many this life had; before: how many the previous life had.
    """
    if not last:
        return end
    begun: int = last["life"]
    own: int = sum(last["spent"].values())
    for category, each in last["spent"].items():
        spent[category] += each * devices
    if end is None or begun >= end:
        spent["idle"] += 0 if end is None else (begun - end) * before
        return begun + own
    twice: int = min(end - begun, last["spent"].get("start", 0))
    spent["start"] -= twice * devices
    return end + own - twice


def in_words(account: Account) -> str:
    """Return the account in a line: "goodput 93.1%: step 5m12s, start 9.2s, data 4.0s"."""
    parts = sorted(((each, category) for category, each in account.spent.items()), reverse=True)
    shown = [f"{c} {_seconds(each / 1e6)}" for each, c in parts if 1000 * each >= account.total]
    return f"goodput {100 * account.goodput:.1f}%: {', '.join(shown)}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f}s" if seconds < 10 else duration(seconds)


def table(account: Account) -> list[str]:
    """Return lines for a terminal: seconds and percent by category, largest first, and the total."""
    total = account.total
    rows = sorted(account.spent.items(), key=lambda item: -item[1])
    lines = [f"{'':12}{'seconds':>14}{'share':>8}"]
    lines += [f"{c:12}{each / 1e6:>14,.3f}{100 * each / max(total, 1):>7.1f}%  {MEANINGS[c]}" for c, each in rows]
    lives = "one life" if account.lives == 1 else f"{account.lives} lives"
    lines.append(
        f"{'all':12}{total / 1e6:>14,.3f}{100:>7.1f}%  {duration(total / 1e6)} in {lives}, to step {account.step}"
    )
    return lines
