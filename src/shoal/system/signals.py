"""Signals: asked to, a run saves and stops, and what has nothing to save ends; who asks twice ends it at once. No torch."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

from shoal.errors import EXIT_REQUEUE

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
GRACE_SECONDS: Final = 1.0  # for what has nothing to save to come to its end by itself
STOPPING_SAID: Final = "stopping; once more ends now"


def stopping_said(number: int) -> str:
    """For where only a second SIGINT ends it."""
    return STOPPING_SAID if number == signal.SIGINT else "stopping; Ctrl-C ends now"


class StopRequest:
    """
    Remembers that one of `STOPPING` came; the loop asks between steps.

    A second SIGINT, a person's Ctrl-C, ends the process. Others may come again and change nothing: Slurm signals a job's
    processes one by one while their launcher passes the same signal on, and sends another one when the time is up.
    """

    def __init__(self, *, ends_process: bool = True) -> None:
        """Takes over these signals. ends_process: else a second SIGINT raises `KeyboardInterrupt`."""
        self.signal: signal.Signals | None = None
        self.nothing_to_lose = True  # until a step is taken
        self._ends_process = ends_process
        self._give_back = _take(self._on_signal)

    def __bool__(self) -> bool:
        return self.signal is not None

    def end_early(self, say: Callable[[str], None]) -> None:
        """
        From now on a signal that finds nothing to lose ends the process with 85, `GRACE_SECONDS` later at the latest.

        For where no launcher of ours does it, which tells more. Also while the main thread waits in C.
        """
        came: list[int] = []

        def come(number: int) -> None:
            if not came:
                say(stopping_said(number))
            came.append(number)
            _end_soon(EXIT_REQUEUE, lambda: self.nothing_to_lose)

        _listen(come)

    def close(self) -> None:
        """Give these signals back to those who had them before."""
        self._give_back()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            if not self._ends_process:
                raise KeyboardInterrupt
            os._exit(128 + number)
        self.signal = self.signal or signal.Signals(number)


class Asked(KeyboardInterrupt):
    """One of `STOPPING` came. `code`: with which the command ends."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code


@contextlib.contextmanager
def ends_when_asked(code: int | None = None) -> Iterator[None]:
    """
    Inside, the first of `STOPPING` raises `Asked`, and ends the process `GRACE_SECONDS` later if it is still there: in a
    long call of C, or where threads are waited for. A second one ends it at once.

    code: the exit code after SIGTERM and SIGUSR1; None: 128 and the signal's number, as after SIGINT.
    """

    def code_of(number: int) -> int:
        return 128 + number if code is None or number == signal.SIGINT else code

    came: list[int] = []  # to the thread
    handled: list[int] = []  # by the main thread
    said = threading.Lock()  # by the handler or the thread, whichever is first

    def say() -> None:
        if said.acquire(blocking=False):
            say_at_once(STOPPING_SAID)

    def on_signal(number: int, frame: FrameType | None) -> None:
        if handled:  # the thread may be slower
            os._exit(code_of(number))
        handled.append(number)
        say()
        raise Asked(code_of(number))

    def come(number: int) -> None:
        came.append(number)
        if len(came) > 1:
            os._exit(code_of(number))
        say()
        _end_soon(code_of(number))

    give_back = _take(on_signal)
    stop_listening = _listen(come)
    try:
        yield
    finally:
        if not came:  # else the process ends, and nothing is to keep it
            stop_listening()
            give_back()


def _take(handler: Callable[[int, FrameType | None], None]) -> Callable[[], None]:
    """Handle `STOPPING` with `handler`; return what gives them back to those who had them, unless others took them since."""
    before = {number: signal.signal(number, handler) for number in STOPPING}

    def give_back() -> None:
        for number, old in before.items():
            if signal.getsignal(number) == handler:
                signal.signal(number, old)

    return give_back


def _end_soon(code: int, may_end: Callable[[], bool] = lambda: True) -> None:
    """End the process with `code` in `GRACE_SECONDS`, if it is still there and `may_end` says so then."""
    timer = threading.Timer(GRACE_SECONDS, lambda: os._exit(code) if may_end() else None)
    timer.daemon = True
    timer.start()


@functools.cache
def _not_in_forks() -> None:
    """A forked child tells this process nothing of its own signals."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


def _listen(come: Callable[[int], None]) -> Callable[[], None]:
    """
    Call `come` in a thread with each of `STOPPING` that has a handler in Python, at once: the handler itself waits until
    the main thread is back from C. Returns what ends that.
    """
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK) if hasattr(os, "pipe2") else os.pipe()
    os.set_blocking(read, True)
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    _not_in_forks()

    def listen() -> None:
        while number := os.read(read, 1):
            if number[0] in STOPPING:
                come(number[0])
        os.close(read)

    def stop() -> None:
        signal.set_wakeup_fd(-1)
        os.close(write)  # the thread reads its end

    threading.Thread(target=listen, name="signals", daemon=True).start()
    return stop


def say_at_once(text: str) -> None:
    """A line to standard error from a signal's handler, or beside it: Python's own streams may be in the middle of one."""
    with contextlib.suppress(OSError):
        os.write(2, f"shoal: {text}\n".encode())


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
