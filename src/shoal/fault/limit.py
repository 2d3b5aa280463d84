"""When a run must stop to be saved before its time is up. No torch."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final, Self

STARTED: Final = "SHOAL_STARTED"  # the launcher's start, in seconds of the monotonic clock: a restart gives no new time
ENDS: Final = "SLURM_JOB_END_TIME"  # seconds since 1970

FLOOR_SECONDS: Final = 10.0  # to end all processes
STEPS: Final = 3  # a stop is agreed on in one step, and on a GPU read in the next
RECENT: Final = 20  # steps
SLOW_DISK: Final = 50e6  # bytes/s, of a process, while no save was seen


def start_clock() -> None:
    """The launcher's time begins to count."""
    os.environ[STARTED] = str(time.monotonic())


class TimeLimit:
    """
    Says at each step whether to stop now: when what is left is less than

        2 x the slowest save + 3 x the slowest of the recent steps (with what came between them) + 10 s.
    """

    def __init__(self, ends: float | None, state_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        """ends: by `clock`, None for no limit; state_bytes: what this process writes in a save, for a first guess."""
        self._ends, self._clock = ends, clock
        self._save_seconds = state_bytes / SLOW_DISK
        self._seen_save = False
        self._last = clock()
        self._recent: deque[float] = deque(maxlen=RECENT)

    @classmethod
    def open(cls, minutes: float | None, state_bytes: int, environment: Mapping[str, str] = os.environ) -> Self:
        """
        Of this worker: `minutes` from the start of its launcher (or of itself, where another program launched it), or
        where that is null, when Slurm ends its job, if there is one.
        """
        now = time.monotonic()
        if minutes is not None:
            return cls(float(environment.get(STARTED, now)) + 60 * minutes, state_bytes)
        if ENDS in environment:
            return cls(now + float(environment[ENDS]) - time.time(), state_bytes)
        return cls(None, state_bytes)

    def saved(self, seconds: float) -> None:
        """A save took so long; the first one takes the place of the guess."""
        self._save_seconds = max(self._save_seconds, seconds) if self._seen_save else seconds
        self._seen_save = True

    def margin(self) -> float:
        """Seconds that are needed to stop in order."""
        return 2 * self._save_seconds + STEPS * max(self._recent, default=0.0) + FLOOR_SECONDS

    def is_due(self) -> bool:
        """Whether to stop now; asked once a step, which tells how long they take."""
        now = self._clock()
        self._recent.append(now - self._last)
        self._last = now
        return self._ends is not None and now + self.margin() >= self._ends
