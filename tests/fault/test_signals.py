"""Signals that ask a worker to stop, in processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

BEGIN = (
    "import os, signal\n"
    "from shoal.fault.signals import StopRequest, hold_signals\n"
    "send = lambda number: os.kill(os.getpid(), number)\n"
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


def test_what_comes_while_a_worker_starts_is_kept() -> None:
    assert run("hold_signals()\nsend(signal.SIGTERM)\nstop = StopRequest()\nprint(stop.signal.name)") == (0, "SIGTERM")
