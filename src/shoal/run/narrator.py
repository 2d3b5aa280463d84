"""Names the phase of a command if it takes long: never a long silence, and no line for a quick phase."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from shoal.run.console import Console, duration

SOON_SECONDS: Final = 2.0  # a phase that takes longer is named while it lasts
LONG_SECONDS: Final = 1.0  # a phase that took longer is reported with its time when it is over
AGAIN: Final = (2.0, 10.0, 30.0, 60.0)  # seconds after which a phase is named again; then the interval doubles
LOOK_SECONDS: Final = 0.2


class Narrator:
    """
    Follows one phase at a time: `begin` ends the previous one, `look` prints the phase if it takes long.

    say: a function called with each line. now: a clock in seconds. After `watch` a thread calls `look`, also while the
    main thread is blocked in C; otherwise the caller must call it.
    """

    def __init__(self, say: Callable[[str], None], now: Callable[[], float] = time.monotonic) -> None:
        self._say, self._now = say, now
        self._phase: str | None = None
        self._since = 0.0
        self._due = SOON_SECONDS
        self._lock = threading.Lock()
        self._closed = threading.Event()

    @classmethod
    def of(cls, console: Console) -> Narrator:
        """Open a narrator that prints to `console` from a thread."""
        narrator = cls(console.note)
        narrator.watch()
        return narrator

    def watch(self) -> None:
        """Call `look` from a thread until `close`."""
        threading.Thread(target=self._look_on, name="narrator", daemon=True).start()

    def begin(self, phase: str | None, *, tell: bool = True) -> None:
        """
        Begin `phase`, or continue it; None only ends the previous phase.

        tell: whether to report the time of the previous phase, if it was long.
        """
        with self._lock:
            if phase == self._phase:
                return
            took = self._now() - self._since
            if tell and self._phase is not None and took >= LONG_SECONDS:
                self._say(f"{self._phase}: {_seconds(took)}")
            self._phase, self._since, self._due = phase, self._now(), SOON_SECONDS

    def look(self) -> None:
        """Print the phase if it takes long."""
        with self._lock:
            so_far = self._now() - self._since
            if self._phase is None or so_far < self._due:
                return
            self._say(
                f"{self._phase} ..." if self._due == SOON_SECONDS else f"{self._phase}: {_seconds(so_far)} so far"
            )
            self._due = next((each for each in AGAIN if each > so_far), 0.0) or 2 * so_far

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name the phase of the block inside: `with narrator.phase("importing torch"): ...`."""
        self.begin(name)
        try:
            yield
        finally:
            self.begin(None)

    def close(self) -> None:
        """End the phase and the thread."""
        self._closed.set()
        self.begin(None)

    def _look_on(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            self.look()


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)
