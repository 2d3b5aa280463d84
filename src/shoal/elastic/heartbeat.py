"""
Heartbeats of a worker, and how long it may be silent.

The launcher gives its workers a folder. Each worker keeps a page of 112 bytes there: nine integers of 8 bytes, then the name
of its phase. The page holds the step, the phase, the time of the last heartbeat, the deadline for further progress, whether
the worker waits for other ranks, the number of steps taken, and the step of the newest checkpoint. Both processes map the
page, so a heartbeat is a memory write. Times are readings of CLOCK_MONOTONIC, which all processes of a machine share. No torch.
"""

from __future__ import annotations

import faulthandler
import math
import mmap
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from shoal.config.run_options import Launch
from shoal.mesh.place import is_launched, read_place

FOLDER: Final = "SHOAL_HEARTBEATS"  # set by shoal's launcher: the folder of the pages

# Nine integers of 8 bytes, then the name of the phase: 72 + 40 bytes.
_STEP, _TURN, _SINCE, _UNTIL, _WAITS, _IN_STEP, _TAKEN, _SAVED, _STRICT = range(9)
_NAME, _SIZE = 72, 112
_NANO: Final = 1_000_000_000

SLOWER: Final = 10  # times the slowest recent step: allows for other programs on the same cores, or a slow disk
FLOOR_SECONDS: Final = 20.0  # a machine may pause this long, however short its steps are
RECENT: Final = 100  # steps to learn from
SOONER: Final = 0.9  # of launch.timeout_seconds: find the hang before the others' collectives time out
FEW: Final = 5  # steps needed before a limit is learned
COMPILE: Final = "compile"  # a phase inside any other, in which this process works alone


@dataclass(frozen=True)
class Sign:
    """The contents of a page. Times are in seconds of the monotonic clock; `until` is infinite if the worker is not watched."""

    step: int
    turn: int  # heartbeats since the step began
    phase: str
    since: float
    until: float
    waits: bool = False  # whether it waits for other ranks in a collective; False if unknown
    in_step: bool = False
    taken: int = 0  # steps taken since this worker started
    saved: int = 0  # the step of the newest checkpoint; 0: none known
    strict: bool = False  # a late step is a hang even if this process is busy


class Page:
    """One worker's page, mapped by the worker and by the launcher. Raises `OSError` if it cannot be created."""

    def __init__(self, folder: Path, local_rank: int) -> None:
        with (folder / f"rank-{local_rank}").open("a+b") as file:
            file.truncate(_SIZE)
            self._bytes = mmap.mmap(file.fileno(), _SIZE)
        self._numbers = memoryview(self._bytes)[:_NAME].cast("q")
        self._names: dict[str, bytes] = {}

    def write(self, step: int, turn: int, phase: str) -> None:
        """Record that this worker is now in `phase` of `step`; keep the deadline."""
        name = self._names.get(phase)
        if name is None:
            name = self._names[phase] = phase.encode("ascii")[: _SIZE - _NAME].ljust(_SIZE - _NAME, b"\0")
        numbers = self._numbers
        numbers[_STEP], numbers[_TURN], numbers[_SINCE] = step, turn, time.monotonic_ns()
        numbers[_WAITS] = 0
        self._bytes[_NAME:] = name

    def allow(self, seconds: float, *, in_step: bool = False, strict: bool = False) -> None:
        """Set the deadline for the next step to `seconds` from now; infinity disables watching."""
        self._numbers[_UNTIL] = 0 if math.isinf(seconds) else time.monotonic_ns() + int(seconds * _NANO)
        self._numbers[_IN_STEP], self._numbers[_STRICT] = in_step, strict

    def took(self, steps: int) -> None:
        """Record how many steps this worker has taken since it started."""
        self._numbers[_TAKEN] = steps

    def saved(self, step: int) -> None:
        """Record that a checkpoint of `step` exists."""
        self._numbers[_SAVED] = step

    def waits(self, does: bool) -> None:
        """Record whether this worker waits for other ranks."""
        self._numbers[_WAITS] = does

    def read(self) -> Sign:
        """Return the current contents."""
        step, turn, since, until, waits, in_step, taken, saved, strict = self._numbers.tolist()
        phase = self._bytes[_NAME:].rstrip(b"\0").decode("ascii", "replace")
        end = until / _NANO if until else math.inf
        return Sign(step, turn, phase, since / _NANO, end, bool(waits), bool(in_step), taken, saved, bool(strict))

    def close(self) -> None:
        self._numbers.release()
        self._bytes.close()


class Patience:
    """The time limit of a step, learned from previous steps."""

    def __init__(self, first: float, fixed: float | None = None) -> None:
        """first: limit in seconds until enough steps are known; fixed: limit after the first step, instead of learning."""
        self._first, self._fixed = first, fixed
        self._recent: deque[float] = deque(maxlen=RECENT)

    def learn(self, seconds: float) -> None:
        """Record how long a step took."""
        self._recent.append(seconds)

    def allowance(self) -> float:
        """Return the limit for the next step, in seconds."""
        if self._fixed is not None:
            return self._fixed if self._recent else max(self._first, self._fixed)
        if len(self._recent) < FEW:
            return self._first
        slowest = max(self._recent)
        # At most a collective's timeout, or the workers would end before the hang is found; but always twice the slowest
        # step, for steps that take nearly that long.
        return max(FLOOR_SECONDS, min(SLOWER * slowest, self._first), 2 * slowest)


class Heartbeat:
    """
    The worker's side: reports the worker's progress to the launcher, if that is shoal's, and to `tell`.

    In a step, call `begin`, then `beat` at each phase. Between steps (evaluation, saving, the end), call `outside`, repeatedly
    if it takes long.

    tell: a function called with each phase outside steps, with "first step" when the first step begins, and with None when a
    later step begins.
    """

    def __init__(
        self,
        page: Page | None,
        patience: Patience,
        outside_seconds: float,
        tell: Callable[[str | None], None] = lambda phase: None,
        *,
        strict: bool = False,
    ) -> None:
        self._page, self._patience, self._outside_seconds, self._tell = page, patience, outside_seconds, tell
        self._step, self._turn, self._phase, self._begun = 0, 0, "start", math.nan
        self.taken = 0  # steps taken; the first one compiles
        self.strict = strict  # a late step is a hang even if this process is busy
        self.on_progress: Callable[[str, int, int], None] = lambda phase, done, total: None
        """Called with (phase, done, total) by work outside steps that knows its size."""
        self._left = self._compiles_since = math.nan  # seconds left for the phase that a compilation interrupted

    @classmethod
    def open(cls, launch: Launch, tell: Callable[[str | None], None] = lambda phase: None) -> Self:
        """Open this worker's page."""
        folder = os.environ.get(FOLDER)
        page = Page(Path(folder), read_place().local_rank) if folder is not None and is_launched() else None
        seconds = SOONER * launch.timeout_seconds
        return cls(page, Patience(seconds, launch.hang_seconds), seconds, tell, strict=launch.hang_seconds is not None)

    def begin(self, step: int, phase: str = "data") -> None:
        """Begin a step and end the previous one."""
        self._end_step()
        self._tell(None if self.taken else "first step")
        self._step, self._turn, self._phase, self._begun = step, 0, phase, time.monotonic()
        if self._page is not None:
            self._page.write(step, 0, phase)
            self._page.allow(self._patience.allowance(), in_step=True, strict=self.strict)

    def beat(self, phase: str) -> None:
        """Report that the step reached `phase`."""
        if self._page is not None:
            self._turn, self._phase = self._turn + 1, phase
            self._page.write(*self.place)

    @property
    def place(self) -> tuple[int, int, str]:
        """(step, heartbeats since the step began, phase) of the last heartbeat."""
        return self._step, self._turn, self._phase

    def device_reached(self, step: int, turn: int, phase: str) -> None:
        """Report the progress of the device, for which the host waits; keep the deadline."""
        if self._page is not None:
            self._page.write(step, turn, phase)

    def compiles(self, *, begins: bool) -> None:
        """
        Report that a compilation inside a phase begins or ends.

        A compilation gets the time limit of work outside steps. The step keeps its remaining time, and its learned
        duration excludes the compilation.
        """
        if self._page is None:
            return
        now = time.monotonic()
        if begins:
            self._left, self._compiles_since = self._page.read().until - now, now
            self._page.write(self._step, self._turn, COMPILE)
            self._page.allow(self._outside_seconds)
        else:
            self._begun += now - self._compiles_since
            self._page.write(*self.place)
            self._page.allow(max(0.0, self._left), in_step=not math.isnan(self._begun), strict=self.strict)

    def waits(self, does: bool) -> None:
        """Report whether this worker waits for other ranks: a worker that waits is not the cause of a hang."""
        if self._page is not None:
            self._page.waits(does)

    def outside(self, phase: str, step: int | None = None) -> None:
        """Report work outside steps: starting, evaluating, saving, closing."""
        self._end_step()
        self._tell(phase)
        self._step = self._step if step is None else step
        self.beat(phase)
        if self._page is not None:
            self._page.allow(self._outside_seconds)

    def saved(self, step: int) -> None:
        """Report a checkpoint of `step`, from which the run can resume."""
        if self._page is not None:
            self._page.saved(step)

    def _end_step(self) -> None:
        """End the step, if there is one, and learn how long it took."""
        if math.isnan(self._begun):
            return
        if self.taken:
            self._patience.learn(time.monotonic() - self._begun)
        self.taken, self._begun = self.taken + 1, math.nan
        if self._page is not None:
            self._page.took(self.taken)

    def rest(self) -> None:
        """Stop watching this worker; its progress is still reported."""
        self._outside_seconds = math.inf
        if self._page is not None:
            self._page.allow(math.inf)


def stacks_file(folder: Path, local_rank: int) -> Path:
    """Return the file to which a worker writes its stack traces."""
    return folder / f"stacks-{local_rank}.txt"


def leave_stacks_when_asked() -> None:
    """Register a SIGUSR2 handler that writes all threads' stacks to `stacks_file`, even while Python waits in C."""
    folder = os.environ.get(FOLDER)
    if folder is not None and is_launched():
        file = stacks_file(Path(folder), read_place().local_rank).open("w", encoding="utf-8")
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
