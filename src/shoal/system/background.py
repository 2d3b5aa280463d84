"""Work in a thread of its own. No torch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


def in_background(work: Callable[[], Result]) -> Future[Result]:
    """Call a function in a thread that does not delay the end of the process, as an executor's would."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # everything: `result` raises it in the caller's thread
            future.set_exception(error)

    threading.Thread(target=run, name="background", daemon=True).start()
    return future
