"""What the launcher does when it is asked to stop, and how it says things."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

from shoal.system.signals import GRACE_SECONDS, say_at_once, stopping_said


class StopRequested(Exception):
    """A signal that came while there were no workers to stop."""


class SignalForwarder:
    """Signals of the launcher go to its workers, once; a second SIGINT, a person's Ctrl-C, ends them at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._since = 0.0
        self._raises = False
        self._reached: set[int] = set()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again = self.signal is not None and number == signal.SIGINT
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()
            say_at_once(stopping_said(number))
        if self._raises:
            raise StopRequested
        self._send(signal.SIGKILL if again else signal.SIGTERM)

    @contextlib.contextmanager
    def may_raise(self) -> Iterator[None]:
        """While there are no workers: raises `StopRequested` when a signal comes, or came."""
        self._raises = True
        try:
            if self.signal is not None:
                raise StopRequested
            yield
        finally:
            self._raises = False

    @property
    def grace_is_over(self) -> bool:
        """Whether somebody asked, and workers that have nothing to save had their time to end by themselves."""
        return self.signal is not None and time.monotonic() - self._since > GRACE_SECONDS

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
