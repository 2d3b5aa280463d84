"""Signals: asked to, a run saves and stops; a person who asks twice stops it at once."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """
    Remembers that one of `STOPPING` came; the loop asks between steps.

    A second SIGINT, a person's Ctrl-C, ends the process. Others may come again and change nothing: Slurm signals a job's
    processes one by one while their launcher passes the same signal on, and sends another one when the time is up.
    """

    def __init__(self) -> None:
        """Takes over these signals, those too that `hold_signals` kept."""
        self.signal: signal.Signals | None = None
        for number in STOPPING:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)

    def __bool__(self) -> bool:
        return self.signal is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            os._exit(128 + number)
        self.signal = self.signal or signal.Signals(number)


def hold_signals() -> None:
    """Signals that come while a worker starts wait until there is a `StopRequest`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)


def die_with_parent() -> None:
    """See to it that this process does not outlive its launcher, even one that is killed by SIGKILL."""
    parent = os.getppid()
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # prctl(2)
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)
    else:
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
