"""The live view on a real terminal: it draws over the whole screen, follows the run, and restores the terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import termios
from pathlib import Path

import pytest

from tests.report.synthetic import write_run
from tests.warm import SHOAL

ENTER, LEAVE = b"\x1b[?1049h", b"\x1b[?1049l"
DEADLINE_SECONDS = 60.0


def read_until(terminal: int, wanted: bytes, seen: bytes = b"") -> bytes:
    """Return what a terminal shows until it has shown `wanted`."""
    while wanted not in seen:
        assert select.select([terminal], [], [], DEADLINE_SECONDS)[0], seen[-2000:]
        seen += os.read(terminal, 65_536)
    return seen


@pytest.mark.ci
@pytest.mark.parametrize("key", [b"q", b"\x03"])
def test_a_key_ends_it_and_the_terminal_is_as_before(tmp_path: Path, key: bytes) -> None:
    run = write_run(tmp_path / "a", 30, seed=1)
    terminal, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    before = termios.tcgetattr(theirs)
    process = subprocess.Popen(
        [*SHOAL, "top", str(run.path), "--every", "0.1"], stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0) and None,
        env=os.environ | {"TERM": "xterm-256color", "LANG": "C.UTF-8", "PYTHONUTF8": "1"},
    )  # fmt: skip
    seen = read_until(terminal, b"step 30/30")
    assert ENTER in seen
    with run.metrics_file.open("a") as file:
        record = json.loads(run.metrics_file.read_text().splitlines()[-2]) | {"step": 31, "loss": 7.65432}
        file.write(json.dumps(record) + "\n")
    assert b"\x1b[2J" not in read_until(terminal, b"7.6543")  # clearing the whole screen would flicker
    os.write(terminal, key)
    seen = read_until(terminal, LEAVE)
    assert process.wait(DEADLINE_SECONDS) == 0
    assert b"Traceback" not in seen
    assert termios.tcgetattr(theirs) == before
    os.close(terminal)
    os.close(theirs)
