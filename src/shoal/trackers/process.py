"""
The process that feeds one tracker: `python -m shoal.trackers.process RUN_FOLDER NAME PATIENCE CLOSING`. No torch.

It follows the run's files by itself, and ends when its standard input does: the trainer closed it, or died. On standard
output it tells the trainer what happens, a line of JSON each; what the tracker's library prints is discarded.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from shoal.config.tracker_names import TRACKERS
from shoal.run.folder import RunFolder
from shoal.system.secrets import redacted
from shoal.trackers.feeding import Feed

Result = TypeVar("Result")
POLL_SECONDS: Final = 0.5
LONGEST_PAUSE: Final = 120.0  # seconds between attempts at a tracker that is down
NICE: Final = 10  # the trainer comes first


class Teller:
    """Tells the trainer what happens to the tracker."""

    def __init__(self, out: int) -> None:
        self._out, self.is_down, self._noted = out, False, set[str]()

    def tell(self, **what: Any) -> None:
        """Write a line."""
        with contextlib.suppress(OSError):  # the trainer died
            os.write(self._out, json.dumps(what).encode() + b"\n")

    def note(self, text: str) -> None:
        """Tell what the tracker cannot take; each only once."""
        if text and text not in self._noted:
            self._noted.add(text)
            self.tell(note=redacted(text))

    def down(self, why: str) -> None:
        """Tell that the tracker does not take the run."""
        if not self.is_down:
            self.is_down = True
            self.tell(down=redacted(why))

    def up(self) -> None:
        """Tell that it takes the run again."""
        if self.is_down:
            self.is_down = False
            self.tell(up=True)


class Watchdog(threading.Thread):
    """Tells of a call that takes longer than `patience`, and ends this process `closing` seconds after the run's end."""

    def __init__(self, teller: Teller, patience: float, closing: float) -> None:
        super().__init__(daemon=True)
        self.over = threading.Event()
        self._teller, self._patience, self._closing = teller, patience, closing
        self._since: float | None = None  # when the call that now runs began

    def call(self, what: Callable[[], Result]) -> Result:
        """Call the tracker."""
        self._since = time.monotonic()
        try:
            return what()
        finally:
            self._since = None

    def run(self) -> None:
        threading.Thread(target=self._watch_for_slowness, daemon=True).start()
        sys.stdin.buffer.read()  # until the trainer closes it
        self.over.set()
        time.sleep(self._closing)
        os.killpg(0, signal.SIGKILL)  # this process leads its own session

    def _watch_for_slowness(self) -> None:
        while True:
            time.sleep(self._patience / 4)
            since = self._since
            if since is not None and time.monotonic() - since > self._patience:
                self._teller.down(f"it has not answered for {self._patience:g} s")


def main(folder: str, name: str, patience: str, closing: str) -> int:
    """Feed a tracker until the run ends."""
    os.nice(NICE)
    teller = Teller(_quiet())
    watchdog = Watchdog(teller, float(patience), float(closing))
    watchdog.start()
    feed = Feed(RunFolder(Path(folder)), name)
    is_open, pause = False, 1.0
    while True:
        ends = watchdog.over.is_set()  # asked first: what was written before the end is then read
        try:
            if not is_open:
                feed.load()
                teller.tell(opened=redacted(watchdog.call(feed.open).where))
                is_open = True
            while watchdog.call(feed.turn):
                pass
            teller.up()
            teller.note(feed.complaint)
            if ends:
                watchdog.call(feed.close)
                teller.tell(done=True)
                return 0
        except Exception as error:  # of a library: anything
            teller.down(_in_a_line(error))
            if ends:
                return 1
            watchdog.over.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            continue
        pause = 1.0
        watchdog.over.wait(POLL_SECONDS)


def _quiet() -> int:
    """Keep standard output for the trainer, and discard what libraries print. Return its descriptor."""
    out = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    return out


def _in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


if __name__ == "__main__":
    assert sys.argv[2] in TRACKERS
    code = main(*sys.argv[1:])
    os._exit(code)  # without the libraries' own ends, which may wait for a network
