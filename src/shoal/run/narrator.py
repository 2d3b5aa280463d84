"""Tells a person which phase a command is in, where a phase takes long: no silence, and no line for what is quick."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from shoal.run.console import Console, duration

SOON_SECONDS: Final = 2.0  # a phase that takes longer is named while it goes on
LONG_SECONDS: Final = 1.0  # one that took longer is told with its time when it is over
AGAIN: Final = (2.0, 10.0, 30.0, 60.0)  # seconds after which a phase is named again; then after twice as many each time
LOOK_SECONDS: Final = 0.2


class Narrator:
    """
    One phase at a time: `begin` names it and ends the one before, `look` says it where it takes long.

    say: gets the lines. now: seconds. A thread of its own looks where `watch` was called, also while the main thread
    waits in C; else whoever has a loop calls `look`.
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
        """One that says what `console` says, and looks by itself."""
        narrator = cls(console.note)
        narrator.watch()
        return narrator

    def watch(self) -> None:
        """Look from a thread, until `close`."""
        threading.Thread(target=self._look_on, name="narrator", daemon=True).start()

    def begin(self, phase: str | None, *, tell: bool = True) -> None:
        """`phase` begins, or goes on; None: nothing that anybody waits for. tell: what the one before took, if long."""
        with self._lock:
            if phase == self._phase:
                return
            took = self._now() - self._since
            if tell and self._phase is not None and took >= LONG_SECONDS:
                self._say(f"{self._phase}: {_seconds(took)}")
            self._phase, self._since, self._due = phase, self._now(), SOON_SECONDS

    def look(self) -> None:
        """Name the phase where it takes long."""
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
        """`with narrator.phase("importing torch"): ...`"""
        self.begin(name)
        try:
            yield
        finally:
            self.begin(None)

    def close(self) -> None:
        """End the phase, and the thread."""
        self._closed.set()
        self.begin(None)

    def _look_on(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            self.look()


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)
