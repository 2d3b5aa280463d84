"""
What a run does now: `now.json`, one small object that is replaced until the run ends. No torch.

    {"time": seconds since 1970, "phase": "encoding", "done": 3, "total": 10, "pid": 123, "host": "node0"}

A thread writes it, so no step waits for a disk; an error of the file system is ignored. While steps are taken it is renewed
every few seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from shoal.run.folder import RunFolder

SOON_SECONDS: Final = 0.25  # between writes of phases and of progress
CALM_SECONDS: Final = 2.0  # between writes in the same phase, without progress to show
LAST_SECONDS: Final = 0.5  # longest wait for the last write

TRAINING: Final = "training"
WORDS: Final = {"save": "saving", "between steps": TRAINING}  # clearer words for some phases
_NOTHING: Final[tuple[str, int | None, int | None]] = ("", None, None)


@dataclass(frozen=True)
class Doing:
    """The contents of `now.json`."""

    time: float  # seconds since 1970
    phase: str
    done: int | None = None  # of `total`, in the phase's own unit; in "training" the steps taken
    total: int | None = None  # None if unknown
    pid: int = 0  # of the process that wrote it: the launcher, then the first rank
    host: str = ""


class Now:
    """Writes `now.json`. `say` only notes what is to be written; call `close` at the end."""

    def __init__(self, path: Path | None) -> None:
        """path: None writes nothing."""
        self._path, self._host = path, socket.gethostname()
        self._said = self._written = _NOTHING
        self._written_at = -CALM_SECONDS
        self._news, self._closed = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def say(self, phase: str, done: int | None = None, total: int | None = None) -> None:
        """Note that the run is in `phase`, with `done` of `total` finished; a phase named again keeps its progress."""
        if self._path is None or self._closed.is_set():
            return
        phase = WORDS.get(phase, phase)
        if done is None and phase == self._said[0]:
            _, done, total = self._said
        said = self._said = phase, done, total or None
        differs = said != self._written if total else said[0] != self._written[0]
        if differs or time.monotonic() >= self._written_at + CALM_SECONDS:
            self._news.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_on, name="now", daemon=True)
            self._thread.start()

    def progress(self, phase: str, done: int, total: int) -> None:
        """Note a phase and its progress; a total of 0 is unknown."""
        self.say(phase, done if total else None, total)

    def close(self, phase: str | None = None) -> None:
        """Write the last phase, or `phase`, and end the thread; do not wait long for a slow disk. May be called twice."""
        if phase is not None:
            self.say(phase)
        self._closed.set()
        self._news.set()
        if self._thread is not None:
            self._thread.join(LAST_SECONDS)

    def _write_on(self) -> None:
        closes = False
        while not closes:
            self._news.wait()
            self._news.clear()
            closes = self._closed.is_set()
            self._written, self._written_at = self._said, time.monotonic()
            phase, done, total = self._written
            self._write(Doing(round(time.time(), 3), phase, done, total, os.getpid(), self._host))
            self._closed.wait(SOON_SECONDS)

    def _write(self, doing: Doing) -> None:
        assert self._path is not None
        aside = self._path.with_name(f".{self._path.name}.tmp")
        with contextlib.suppress(OSError):
            aside.write_text(json.dumps(asdict(doing)), encoding="utf-8")
            aside.replace(self._path)


def read_now(folder: RunFolder) -> Doing | None:
    """Return what the run in `folder` does, or did last; None if that is unknown."""
    try:
        found = json.loads(folder.now_file.read_bytes())
        return Doing(
            float(found["time"]), str(found["phase"]), found.get("done"), found.get("total"),
            int(found.get("pid") or 0), str(found.get("host", "")),
        )  # fmt: skip
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
