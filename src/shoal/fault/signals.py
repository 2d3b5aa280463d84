"""Signals: asked once, a run saves and stops; asked twice, it stops at once."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Remembers that SIGINT or SIGTERM came; the loop asks between steps."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        for number in STOPPING:
            signal.signal(number, self._on_signal)

    def __bool__(self) -> bool:
        return self.signal is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = signal.Signals(number)


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
