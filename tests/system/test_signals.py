"""Signals that ask a process to stop, each tested in its own process."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from shoal.errors import EXIT_REQUEUE
from shoal.system.signals import STOPPING_SAID, stopping_said

BEGIN = (
    "import os, signal, sys, threading\n"
    "from shoal.system.signals import Asked, StopRequest, ends_when_asked\n"
    "send = lambda number: os.kill(os.getpid(), number)\n"
)
# A C call during which SIGTERM arrives, and which does not return to Python: it waits for a program that ends only with
# this process.
IN_C = (
    "import ctypes\n"
    "read, write = os.pipe()\n"
    "os.set_inheritable(read, True)\n"
    "ctypes.CDLL(None).system(b'kill -TERM $PPID; exec cat <&%d >/dev/null' % read)\n"
)


def run(code: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", BEGIN + code], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.strip() + done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_each_of_them_asks(number: signal.Signals) -> None:
    assert run(f"stop = StopRequest()\nprint(bool(stop))\nsend({number})\nprint(bool(stop))") == (0, "False\nTrue")


def test_a_scheduler_may_ask_again_and_a_person_twice_ends_it() -> None:
    again = "stop = StopRequest()\nsend(signal.SIGUSR1)\nsend(signal.SIGTERM)\nsend(signal.SIGTERM)\nprint(stop.signal.name)"
    assert run(again) == (0, "SIGUSR1")
    assert run("stop = StopRequest()\nsend(signal.SIGINT)\nsend(signal.SIGINT)") == (128 + signal.SIGINT, "")


@pytest.mark.parametrize(
    ("number", "code", "ends"),
    [(signal.SIGINT, None, 130), (signal.SIGINT, 85, 130), (signal.SIGTERM, None, 143), (signal.SIGUSR1, 85, 85)],
)
def test_what_has_nothing_to_save_is_interrupted(number: signal.Signals, code: int | None, ends: int) -> None:
    program = (
        f"try:\n    with ends_when_asked({code}):\n        send({number})\n        threading.Event().wait()\n"
        "except Asked as asked:\n    os._exit(asked.code)\n"
    )
    assert run(program) == (ends, f"shoal: {STOPPING_SAID}\n")


def test_in_a_long_call_of_c_it_is_ended() -> None:
    """A thread ends the process, because the main thread, which should raise, never returns from C."""
    program = "with ends_when_asked(85):\n" + "".join(f"    {line}\n" for line in IN_C.splitlines())
    assert run(program) == (85, f"shoal: {STOPPING_SAID}\n")


def test_a_second_signal_ends_at_once() -> None:
    """The second signal works although a library caught the first one's exception."""
    program = (
        "with ends_when_asked(85):\n"
        f"    try:\n        send({signal.SIGTERM})\n        threading.Event().wait()\n"
        "    except BaseException:\n        pass\n"
        f"    os.kill(os.getpid(), {signal.SIGINT})\n    threading.Event().wait()\n"
    )
    assert run(program)[0] == 128 + signal.SIGINT


def test_afterwards_signals_are_whose_they_were() -> None:
    program = "before = signal.getsignal(signal.SIGINT)\nwith ends_when_asked(): pass\nprint(signal.getsignal(signal.SIGINT) is before, signal.set_wakeup_fd(-1))"
    assert run(program) == (0, "True -1")


def test_a_worker_of_another_launcher_ends_early_while_there_is_nothing_to_save() -> None:
    say = "say = lambda text: print(text, flush=True)\n"
    assert run(say + "stop = StopRequest()\nstop.end_early(say)\n" + IN_C) == (
        EXIT_REQUEUE,
        stopping_said(signal.SIGTERM),
    )
