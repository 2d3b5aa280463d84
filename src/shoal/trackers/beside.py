"""
The trackers of a run that trains, each in a process beside it. No torch.

The trainer writes the run's files and nothing else: a log call costs the same with trackers as without. A tracker's
library, its threads, its network and its crashes stay in its own process; a thread here passes on what that process tells.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import IO, Any, Final, Protocol

from shoal.config.track_options import Track
from shoal.config.tracker_names import TRACKERS
from shoal.run.folder import RunFolder

PATIENCE_SECONDS: Final = 30.0  # a call that takes longer is told
DOWN_SECONDS: Final = 3.0  # how long the run's end waits for a tracker that is known to be down


class Says(Protocol):
    """A console."""

    def note(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...


class Beside:
    """The process of one tracker."""

    def __init__(
        self,
        folder: RunFolder,
        name: str,
        console: Says,
        event: Callable[..., None],
        *,
        patience: float,
        closing: float,
    ) -> None:
        self.name, self._folder, self._console, self._event, self._closing = name, folder, console, event, closing
        self.is_down, self._is_done = False, False
        self._ends, self._told = False, False
        # -P: a file of the current folder, such as wandb.py, is not imported in place of a library
        how = (str(folder.path), name, str(patience), str(closing))
        command = [sys.executable, "-P", "-m", "shoal.trackers.process", *how]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        assert self._process.stdout is not None
        self._listener = threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True)
        self._listener.start()

    def _listen(self, out: IO[bytes]) -> None:
        for line in out:
            with contextlib.suppress(ValueError):
                self._hear(json.loads(line))
        if not self._ends and not self.is_down:
            self.is_down = True
            self._tell(f"the process of {TRACKERS[self.name].title} ended with code {self._process.wait()}")

    def _hear(self, said: dict[str, Any]) -> None:
        title = TRACKERS[self.name].title
        if "opened" in said:
            self._console.note(f"{title}: {said['opened']}")
            self._event("tracker opened", tracker=self.name, where=said["opened"])
        elif "down" in said:
            self.is_down = True
            self._tell(f"{title} does not take this run's records: {said['down']}")
        elif "up" in said:
            self.is_down = False
            self._console.note(f"{title} takes this run's records again, and has those that it missed")
        elif "note" in said:
            self._console.warn(f"{title}: {said['note']}")
        elif "done" in said:
            self._is_done = True

    def _tell(self, what: str) -> None:
        """Say that a tracker lacks records; once in a run."""
        if self._told:
            return
        self._told = True
        hope = "" if self._ends else "training continues, they are sent when it answers, and "
        self._console.warn(f"{what}; {hope}shoal sync {self._folder.path} {self.name} sends the whole run")
        self._event("tracker down", tracker=self.name, why=what)

    def ask_to_end(self) -> None:
        """Tell the process that the run's files are complete."""
        self._ends = True
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def wait(self, until: float, until_if_down: float) -> None:
        """Wait for its end, at most until a time of the monotonic clock; then kill it."""
        left = (min(until, until_if_down) if self.is_down else until) - time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, left))
        if self._process.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._listener.join(1.0)
        if not self._is_done and not self.is_down:
            title = TRACKERS[self.name].title
            self._tell(f"{title} has not taken all of this run's records within {self._closing:g} s of its end")


class Trackers:
    """All trackers of a run."""

    def __init__(
        self,
        folder: RunFolder,
        track: Track,
        console: Says,
        event: Callable[..., None],
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        """patience: seconds after which a tracker that does not answer is told."""
        self._closing = track.close_seconds
        self._all = [
            Beside(folder, name, console, event, patience=patience, closing=self._closing)
            for name in dict.fromkeys(track.to)
        ]

    def close(self) -> None:
        """Give all of them together `track.close_seconds` to send the rest. May be called twice."""
        begun = time.monotonic()
        for each in self._all:
            each.ask_to_end()
        for each in self._all:
            each.wait(begun + self._closing, begun + DOWN_SECONDS)
        self._all = []
