"""
Signals: the first one makes a run save and stop, or ends a command with nothing to save. No torch.

A second Ctrl-C ends either at once.
"""

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
GRACE_SECONDS: Final = 1.0  # for a command with nothing to save to end by itself
STOPPING_SAID: Final = "stopping; a second signal ends it now"


def stopping_said(number: int) -> str:
    """Return the message for a first signal `number`, after which only SIGINT (Ctrl-C) ends the process at once."""
    return f"stopping; Ctrl-C{' again' if number == signal.SIGINT else ''} ends it now"


class StopRequest:
    """
    Whether one of `STOPPING` arrived, which the training loop checks between steps.

    After the first signal, SIGINT (Ctrl-C) ends the process. Repeats of other signals change nothing: Slurm signals a job's
    processes while their launcher forwards the same signal, and sends another signal at the time limit.
    """

    def __init__(self, *, ends_process: bool = True) -> None:
        """
        Handle `STOPPING` from now on.

        ends_process: whether SIGINT after the first signal ends the process; if not, it raises `KeyboardInterrupt`.
        """
        self.signal: signal.Signals | None = None
        self.nothing_to_lose = True  # until a step has finished
        self._ends_process = ends_process
        self._give_back = _take(self._on_signal)

    def __bool__(self) -> bool:
        return self.signal is not None

    def end_early(self, say: Callable[[str], None]) -> None:
        """
        Let a signal end the process with exit code 85 after `GRACE_SECONDS`, if no step has finished by then.

        Only needed without shoal's own launcher, which does the same itself. Works while the main thread waits in C code.
        """
        came: list[int] = []

        def arrived(number: int) -> None:
            if not came:
                say(stopping_said(number))
            came.append(number)
            _end_soon(EXIT_REQUEUE, lambda: self.nothing_to_lose)

        _listen(arrived)

    def close(self) -> None:
        """Restore the previous handlers."""
        self._give_back()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            if not self._ends_process:
                raise KeyboardInterrupt
            os._exit(128 + number)
        self.signal = self.signal or signal.Signals(number)


class Asked(KeyboardInterrupt):
    """One of `STOPPING` arrived. code: the command's exit code."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code


@contextlib.contextmanager
def ends_when_asked(code: int | None = None) -> Iterator[None]:
    """
    Raise `Asked` inside at the first signal of `STOPPING`, and end the process `GRACE_SECONDS` later if it still runs.

    The process may still be in a long C call, or waiting for threads. A second signal ends it at once. code: the exit code after
    SIGTERM and SIGUSR1; None: 128 plus the signal's number, as after SIGINT.
    """

    def code_of(number: int) -> int:
        return 128 + number if code is None or number == signal.SIGINT else code

    came: list[int] = []  # signals seen by the thread
    handled: list[int] = []  # signals seen by the main thread
    said = threading.Lock()  # taken by the handler or the thread, whichever is first

    def say() -> None:
        if said.acquire(blocking=False):
            say_at_once(STOPPING_SAID)

    def on_signal(number: int, frame: FrameType | None) -> None:
        if handled:  # the thread may not have run yet
            os._exit(code_of(number))
        handled.append(number)
        say()
        raise Asked(code_of(number))

    def arrived(number: int) -> None:
        came.append(number)
        if len(came) > 1:
            os._exit(code_of(number))
        say()
        _end_soon(code_of(number))

    give_back = _take(on_signal)
    stop_listening = _listen(arrived)
    try:
        yield
    finally:
        if not came:  # otherwise the process is ending, and must not be kept alive
            stop_listening()
            give_back()


def _take(handler: Callable[[int, FrameType | None], None]) -> Callable[[], None]:
    """Handle `STOPPING` with `handler`; return a function that restores the previous handlers, unless replaced meanwhile."""
    before = {number: signal.signal(number, handler) for number in STOPPING}

    def give_back() -> None:
        for number, old in before.items():
            if signal.getsignal(number) == handler:
                signal.signal(number, old)

    return give_back


def _end_soon(code: int, may_end: Callable[[], bool] = lambda: True) -> None:
    """End the process with `code` after `GRACE_SECONDS`, if `may_end()` is true then."""
    timer = threading.Timer(GRACE_SECONDS, lambda: os._exit(code) if may_end() else None)
    timer.daemon = True
    timer.start()


@functools.cache
def _not_in_forks() -> None:
    """Keep forked children from writing their signals to this process's pipe."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


def _listen(arrived: Callable[[int], None]) -> Callable[[], None]:
    """
    Call `arrived` in a thread as soon as a signal of `STOPPING` comes; return a function that stops listening.

    A Python handler alone would wait until the main thread returns from C code.
    """
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK) if hasattr(os, "pipe2") else os.pipe()
    os.set_blocking(read, True)
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    _not_in_forks()

    def listen() -> None:
        while number := os.read(read, 1):
            if number[0] in STOPPING:
                arrived(number[0])
        os.close(read)

    def stop() -> None:
        signal.set_wakeup_fd(-1)
        os.close(write)  # the thread then reads end of file

    threading.Thread(target=listen, name="signals", daemon=True).start()
    return stop


def say_at_once(text: str) -> None:
    """Write a line to standard error from a signal handler, without Python's streams, which may be in use."""
    with contextlib.suppress(OSError):
        os.write(2, f"shoal: {text}\n".encode())


def die_with_parent() -> None:
    """End this process when its launcher ends, even by SIGKILL."""
    parent = os.getppid()
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # prctl(2)
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # the launcher died before the call
            os._exit(1)
    else:
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
