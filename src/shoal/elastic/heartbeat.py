"""
Signs of life of a worker, and how long it may be silent.

The launcher gives its workers a folder. In it each keeps a page: the step and phase it is in, since when, until when it must
have come further, whether it waits for others just now, how many steps it has taken, and the newest checkpoint it knows of.
A page is memory that both processes map, so a sign of life is a store to memory.
Times are CLOCK_MONOTONIC's, which is one clock for all processes of a machine. No torch.
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

FOLDER: Final = "SHOAL_HEARTBEATS"  # where our launcher listens

# Eight bytes each, then the phase.
_STEP, _TURN, _SINCE, _UNTIL, _WAITS, _IN_STEP, _TAKEN, _SAVED, _STRICT = range(9)
_NAME, _SIZE = 72, 112
_NANO: Final = 1_000_000_000

SLOWER: Final = 10  # times the slowest of the recent steps: other people's work on the same cores, a disk that pauses
FLOOR_SECONDS: Final = 20.0  # a machine may stand still so long, whatever its steps take
RECENT: Final = 100  # steps
SOONER: Final = 0.9  # of launch.timeout_seconds: who hangs is found before the others' collectives end them
FEW: Final = 5  # steps, before which nothing is known
COMPILE: Final = "compile"  # a phase inside any other: work of this process alone


@dataclass(frozen=True)
class Sign:
    """What a page says. Times in seconds of the monotonic clock; `until` is infinite where nobody is to watch."""

    step: int
    turn: int  # signs since the step began
    phase: str
    since: float
    until: float
    waits: bool = False  # for other processes, in a collective; never where that is not known
    in_step: bool = False
    taken: int = 0  # steps, since this worker started
    saved: int = 0  # the step of the newest checkpoint that this run has; 0: none is known
    strict: bool = False  # a late step counts as a hang also while this process works


class Page:
    """One worker's page, as the worker and the launcher both see it. Raises `OSError` where it cannot be made."""

    def __init__(self, folder: Path, local_rank: int) -> None:
        with (folder / f"rank-{local_rank}").open("a+b") as file:
            file.truncate(_SIZE)
            self._bytes = mmap.mmap(file.fileno(), _SIZE)
        self._numbers = memoryview(self._bytes)[:_NAME].cast("q")
        self._names: dict[str, bytes] = {}

    def write(self, step: int, turn: int, phase: str) -> None:
        """This worker is in `phase` of `step` now; the deadline stays."""
        name = self._names.get(phase)
        if name is None:
            name = self._names[phase] = phase.encode("ascii")[: _SIZE - _NAME].ljust(_SIZE - _NAME, b"\0")
        numbers = self._numbers
        numbers[_STEP], numbers[_TURN], numbers[_SINCE] = step, turn, time.monotonic_ns()
        numbers[_WAITS] = 0
        self._bytes[_NAME:] = name

    def allow(self, seconds: float, *, in_step: bool = False, strict: bool = False) -> None:
        """A sign that this worker has come further is due in so many seconds; infinite: nobody watches."""
        self._numbers[_UNTIL] = 0 if math.isinf(seconds) else time.monotonic_ns() + int(seconds * _NANO)
        self._numbers[_IN_STEP], self._numbers[_STRICT] = in_step, strict

    def took(self, steps: int) -> None:
        """So many steps were taken since this worker started."""
        self._numbers[_TAKEN] = steps

    def saved(self, step: int) -> None:
        """There is a checkpoint of `step`."""
        self._numbers[_SAVED] = step

    def waits(self, does: bool) -> None:
        """It waits for others in its phase, or goes on."""
        self._numbers[_WAITS] = does

    def read(self) -> Sign:
        step, turn, since, until, waits, in_step, taken, saved, strict = self._numbers.tolist()
        phase = self._bytes[_NAME:].rstrip(b"\0").decode("ascii", "replace")
        end = until / _NANO if until else math.inf
        return Sign(step, turn, phase, since / _NANO, end, bool(waits), bool(in_step), taken, saved, bool(strict))

    def close(self) -> None:
        self._numbers.release()
        self._bytes.close()


class Patience:
    """How long a step may take, learned from the steps before it."""

    def __init__(self, first: float, fixed: float | None = None) -> None:
        """first: seconds for a step while little is known; fixed: seconds for those after it, in place of what is learned."""
        self._first, self._fixed = first, fixed
        self._recent: deque[float] = deque(maxlen=RECENT)

    def learn(self, seconds: float) -> None:
        """A step took so long."""
        self._recent.append(seconds)

    def allowance(self) -> float:
        """Seconds for the next step."""
        if self._fixed is not None:
            return self._fixed if self._recent else max(self._first, self._fixed)
        if len(self._recent) < FEW:
            return self._first
        slowest = max(self._recent)
        # Not more than a collective may take, or the workers would end before they are found; steps that take about as
        # long as that still get twice their time.
        return max(FLOOR_SECONDS, min(SLOWER * slowest, self._first), 2 * slowest)


class Heartbeat:
    """
    A worker's side: says where the worker is. Does nothing where no launcher of ours listens, but call `tell`.

    A step: `begin`, then `beat` at each phase. Between steps (evaluation, saving, the end): `outside`, again and again
    where it takes long.

    tell: called with each phase before the first step and between steps, and with None where a step begins.
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
        self.taken = 0  # steps; the first one compiles
        self.strict = strict  # a late step counts as a hang, whether this process works or not
        self._left = self._compiles_since = math.nan  # seconds left to the phase that a compilation came into

    @classmethod
    def open(cls, launch: Launch, tell: Callable[[str | None], None] = lambda phase: None) -> Self:
        """For this worker of its launcher; `tell` is for where no launcher of ours listens."""
        folder = os.environ.get(FOLDER)
        page = Page(Path(folder), read_place().local_rank) if folder is not None and is_launched() else None
        seconds = SOONER * launch.timeout_seconds
        tell = tell if page is None else lambda phase: None
        return cls(page, Patience(seconds, launch.hang_seconds), seconds, tell, strict=launch.hang_seconds is not None)

    def begin(self, step: int, phase: str = "data") -> None:
        """A step begins, and the one before it is over."""
        self._end_step()
        self._tell(None if self.taken else "first step")
        self._step, self._turn, self._phase, self._begun = step, 0, phase, time.monotonic()
        if self._page is not None:
            self._page.write(step, 0, phase)
            self._page.allow(self._patience.allowance(), in_step=True, strict=self.strict)

    def beat(self, phase: str) -> None:
        """The step comes to `phase`."""
        if self._page is not None:
            self._turn, self._phase = self._turn + 1, phase
            self._page.write(*self.place)

    @property
    def place(self) -> tuple[int, int, str]:
        """(step, signs since it began, phase) of the last sign."""
        return self._step, self._turn, self._phase

    def device_reached(self, step: int, turn: int, phase: str) -> None:
        """The host waits for its device, which has come to the sign of this place. The deadline stays."""
        if self._page is not None:
            self._page.write(step, turn, phase)

    def compiles(self, *, begins: bool) -> None:
        """
        A compilation begins in the middle of a phase, or is over. It has the time of what is done outside of steps, and
        its step the time that was left, and is learned without it.
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
        """It waits for other processes, or goes on: who hangs is one that does not wait."""
        if self._page is not None:
            self._page.waits(does)

    def outside(self, phase: str, step: int | None = None) -> None:
        """Something else than a step begins or goes on: starting, evaluating, saving, closing."""
        self._end_step()
        self._tell(phase)
        self._step = self._step if step is None else step
        self.beat(phase)
        if self._page is not None:
            self._page.allow(self._outside_seconds)

    def saved(self, step: int) -> None:
        """There is a checkpoint of `step`, from which the run goes on."""
        if self._page is not None:
            self._page.saved(step)

    def _end_step(self) -> None:
        """Learn what it took, if there was one; also where something comes after every step."""
        if math.isnan(self._begun):
            return
        if self.taken:
            self._patience.learn(time.monotonic() - self._begun)
        self.taken, self._begun = self.taken + 1, math.nan
        if self._page is not None:
            self._page.took(self.taken)

    def rest(self) -> None:
        """Nobody is to watch this worker from now on; where it is can still be said."""
        self._outside_seconds = math.inf
        if self._page is not None:
            self._page.allow(math.inf)


def stacks_file(folder: Path, local_rank: int) -> Path:
    """Where a worker leaves its stacks."""
    return folder / f"stacks-{local_rank}.txt"


def leave_stacks_when_asked() -> None:
    """On SIGUSR2 all threads' stacks go to where the launcher looks for them, also while Python waits for C."""
    folder = os.environ.get(FOLDER)
    if folder is not None and is_launched():
        file = stacks_file(Path(folder), read_place().local_rank).open("w", encoding="utf-8")
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
