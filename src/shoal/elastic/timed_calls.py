"""Calls with a time limit, for questions to a store that may never answer."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Final, TypeVar

from torch.distributed import DistError
from torch.distributed.elastic.rendezvous.api import RendezvousError

T = TypeVar("T")

CALL_SECONDS: Final = 2.0  # to wait for the store's answer while there are workers


class TimedCalls:
    """Calls functions that may never return, in a thread with a time limit, one at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def call(self, question: Callable[[], T], default: T, seconds: float = CALL_SECONDS) -> T:
        """Return what `question` returns; `default` if the store is lost or too slow, or if an earlier call still hangs."""
        if self._thread is not None and self._thread.is_alive():
            return default
        answers = [default]

        def wait() -> None:
            with contextlib.suppress(DistError, RendezvousError):
                answers[0] = question()

        self._thread = threading.Thread(target=wait, name="timed call", daemon=True)
        self._thread.start()
        self._thread.join(seconds)
        return answers[0]
