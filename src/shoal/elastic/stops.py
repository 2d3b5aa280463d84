"""How the launcher handles signals that ask it to stop. No torch."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType

from shoal.system.signals import GRACE_SECONDS, say_at_once, stopping_said


class StopRequested(Exception):
    """A signal arrived while there were no workers to stop."""


class SignalForwarder:
    """Sends each worker SIGTERM once, whichever stop signals arrive. A SIGINT (Ctrl-C) after the first signal kills the workers."""

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
        """Raise `StopRequested` inside this block if a signal arrives or has arrived; for use while there are no workers."""
        self._raises = True
        try:
            if self.signal is not None:
                raise StopRequested
            yield
        finally:
            self._raises = False

    @property
    def grace_is_over(self) -> bool:
        """Whether a stop was requested so long ago that workers with nothing to save should have ended."""
        return self.signal is not None and time.monotonic() - self._since > GRACE_SECONDS

    def reach_all(self) -> None:
        """Send SIGTERM to workers that were still starting when the signal arrived."""
        if self.signal is not None:
            self._send(signal.SIGTERM)

    def _send(self, number: signal.Signals) -> None:
        # the agent starts each child in its own session, so a terminal's Ctrl-C does not reach them
        import psutil

        for child in psutil.Process().children():
            if number == signal.SIGKILL or child.pid not in self._reached:
                self._reached.add(child.pid)
                child.send_signal(number)
