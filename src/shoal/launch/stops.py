"""What the launcher does when it is asked to stop, and how it says things."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from shoal.errors import EXIT_REQUEUE


class AskedToStop(Exception):
    """A signal that came while there were no workers to stop."""


class PassOn:
    """Signals of the launcher go to its workers, once; a second SIGINT, a person's Ctrl-C, ends them at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._raises = False
        self._reached: set[int] = set()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again = self.signal is not None and number == signal.SIGINT
        self.signal = self.signal or number
        if self._raises:
            raise AskedToStop
        self._send(signal.SIGKILL if again else signal.SIGTERM)

    @contextlib.contextmanager
    def may_raise(self) -> Iterator[None]:
        """While there are no workers: raises `AskedToStop` when a signal comes, or came."""
        self._raises = True
        try:
            if self.signal is not None:
                raise AskedToStop
            yield
        finally:
            self._raises = False

    def reach_all(self) -> None:
        """Workers that were not there yet when the signal came: it came while they were being started."""
        if self.signal is not None:
            self._send(signal.SIGTERM)

    def _send(self, number: signal.Signals) -> None:
        # children of this process: the agent puts each in a session of its own, so a terminal's Ctrl-C misses them
        import psutil

        for child in psutil.Process().children():
            if number == signal.SIGKILL or child.pid not in self._reached:
                self._reached.add(child.pid)
                child.send_signal(number)


def leave_when_asked() -> None:
    """Before there are workers, SIGTERM and SIGUSR1 end the command as a stop: what it prepares is restartable."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    tell("stopped before training; the same command goes on")
    os._exit(EXIT_REQUEUE)


def tell(text: str) -> None:
    """A line of the launcher's."""
    print(f"shoal: {text}", file=sys.stderr, flush=True)
