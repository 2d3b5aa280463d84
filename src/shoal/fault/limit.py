"""When a run must stop so that it can save before its time is up. No torch."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final, Self

STARTED: Final = (
    "SHOAL_STARTED"  # the launcher's start, monotonic seconds: a restart of workers does not extend the time
)
ENDS: Final = "SLURM_JOB_END_TIME"  # seconds since 1970

FLOOR_SECONDS: Final = 10.0  # time to end all processes
STEPS: Final = 3  # one to finish, one to agree on the stop, and on a GPU one more until the agreement is read
RECENT: Final = 20  # steps whose times are remembered
SLOW_DISK: Final = 50e6  # bytes/s per process, assumed until the first save


def start_clock() -> None:
    """Record when the launcher started."""
    os.environ[STARTED] = str(time.monotonic())


class TimeLimit:
    """
    Decides at each step whether to stop: if the time left is less than

        2 * slowest save + 3 * slowest recent step (from one call of `is_due` to the next) + 10 s.
    """

    def __init__(self, ends: float | None, state_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Start the clock.

        ends: the reading of `clock` at which the time is up; None disables the limit. state_bytes: the bytes of state that this
        process saves, from which the time of the first save is estimated.
        """
        self._ends, self._clock = ends, clock
        self._save_seconds = state_bytes / SLOW_DISK
        self._seen_save = False
        self._last = clock()
        self._recent: deque[float] = deque(maxlen=RECENT)

    @classmethod
    def open(cls, minutes: float | None, state_bytes: int, environment: Mapping[str, str] = os.environ) -> Self:
        """
        Open this worker's limit: `minutes` after shoal's launcher started, or after this call under another launcher. If `minutes`
        is None, the limit is the end of the Slurm job, if there is one.
        """
        now = time.monotonic()
        if minutes is not None:
            return cls(float(environment.get(STARTED, now)) + 60 * minutes, state_bytes)
        if ENDS in environment:
            return cls(now + float(environment[ENDS]) - time.time(), state_bytes)
        return cls(None, state_bytes)

    def saved(self, seconds: float) -> None:
        """Record how long a save took; the first save's time replaces the estimate."""
        self._save_seconds = max(self._save_seconds, seconds) if self._seen_save else seconds
        self._seen_save = True

    def margin(self) -> float:
        """Return the seconds needed to save and stop."""
        return 2 * self._save_seconds + STEPS * max(self._recent, default=0.0) + FLOOR_SECONDS

    def is_due(self) -> bool:
        """Return whether to stop now. Call it once a step: the time between two calls counts as a step."""
        now = self._clock()
        self._recent.append(now - self._last)
        self._last = now
        return self._ends is not None and now + self.margin() >= self._ends
