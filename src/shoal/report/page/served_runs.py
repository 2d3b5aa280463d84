"""
The runs that a dashboard serves: those of one folder, found again at each look, with their curves. No torch.

A log that was never read takes a second for 100,000 lines, so another process reads it, one run after the other; until then
the run is in the list without its curves.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from shoal.report.curves.curves import Curves, names_at_the_end
from shoal.report.curves.ranks import RankMap
from shoal.report.page.content import PLACES, summary
from shoal.report.runs.facts import RunFacts
from shoal.run.folder import RunFolder

READ_AT_ONCE: Final = 1 << 20  # bytes of a log that an answer may wait for
NOT_READ: Final = ("checkpoints", "source", "tokenizer", "stacks")  # folders of a run that the page shows nothing of


@dataclass(frozen=True)
class Summary:
    """A run's line in the list, its options, and the state of the files that it was made from."""

    files: tuple[Any, ...]
    view: dict[str, Any]
    options: Mapping[str, Any]


@dataclass
class ServedRun:
    """
    A run and what was read of it.

    curves: empty until the log was read. share: of the log that was read so far; None if no one reads it now.
    """

    folder: RunFolder
    cache: Path | None
    curves: Curves
    ranks: RankMap
    share: float | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    _summary: Summary | None = None

    def read_curves(self) -> Curves | None:
        """Return the curves; None while their log is read for the first time."""
        return self.curves if self.share is None or self.curves.last_step else None

    def summary(self, name: str) -> Summary:
        """Return the run's line in the list, made again if its files changed or the run is training."""
        files = self._files()
        kept = self._summary
        if kept is None or kept.files != files or kept.view["state"] == "running":
            facts = RunFacts.read(self.folder)
            view = summary(name, facts, self.curves)
            if self.read_curves() is None:  # their charts are there before the curves
                known = names_at_the_end(self.folder.metrics_file)
                view["curves"] = [each for each in known if each not in PLACES]
            kept = self._summary = Summary(files, view, facts.options)
        return kept

    def _files(self) -> tuple[Any, ...]:
        names = ("config.yaml", "metrics.jsonl", "events.jsonl", "ranks.jsonl", "lock")
        found = [_state_of(self.folder.path / name) for name in names]
        return (*found, self.folder.is_locked(), self.curves.version)

    @property
    def to_read(self) -> int:
        """The bytes of the logs that were not read."""
        return self.curves.bytes_to_read() + self.ranks.bytes_to_read()


class ServedRuns:
    """The runs of one folder. May be used by several threads."""

    def __init__(self, root: Path) -> None:
        """root: the folder of all runs, or of one run."""
        self.root = root.resolve()
        self.left_out: dict[str, str] = {}  # runs that lead outside the folder, and where
        self._runs: dict[str, ServedRun] = {}
        self._lock = threading.Lock()
        self._scratch = tempfile.TemporaryDirectory(prefix="shoal-dashboard-", ignore_cleanup_errors=True)
        self._builder: _Builder | None = None

    def close(self) -> None:
        """End the process that reads logs, and remove the caches of runs that cannot be written to."""
        with self._lock:
            if self._builder is not None:
                self._builder.close()
        self._scratch.cleanup()

    def look(self) -> Mapping[str, ServedRun]:
        """Find the runs there are, read their new lines, and return them by name. A long log is read in the background."""
        with self._lock:
            found = self._find()
            self._runs = {name: self._runs.get(name) or self._open(folder) for name, folder in found.items()}
            runs = dict(self._runs)
        for run in runs.values():
            self._read_on(run)
        return runs

    def get(self, name: str) -> ServedRun | None:
        """Return the run of this name; None if there is none. Does not read new lines."""
        with self._lock:
            run = self._runs.get(name)
        if run is None or self._way_out(run.folder.path) is not None:
            return None
        return run

    def _find(self) -> dict[str, RunFolder]:
        if (self.root / "config.yaml").is_file():
            folders = [self.root]
        else:
            folders = sorted(config.parent for config in self.root.glob("*/config.yaml"))
        self.left_out = {path.name: str(way) for path in folders if (way := self._way_out(path))}
        return {path.name: RunFolder(path) for path in folders if path.name not in self.left_out}

    def _way_out(self, folder: Path) -> Path | None:
        """Return a file of a run that a link leads outside the served folder; None if there is none."""
        return next((path for path in _links(folder) if not self._is_inside(path)), None)

    def _is_inside(self, path: Path) -> bool:
        try:
            return path.resolve().is_relative_to(self.root)
        except (OSError, RuntimeError):  # a circle of links
            return False

    def _open(self, folder: RunFolder) -> ServedRun:
        path = folder.path
        writable = os.access(path / "cache" if (path / "cache").is_dir() else path, os.W_OK)
        cache = None if writable else Path(self._scratch.name) / path.name
        return ServedRun(folder, cache, Curves.cached(path, cache), RankMap.cached(path, cache))

    def _read_on(self, run: ServedRun) -> None:
        if not run.lock.acquire(blocking=False):
            return  # another request reads it
        try:
            if run.share is not None:
                return
            if run.to_read > READ_AT_ONCE:
                run.share = 0.0
                self._build(run)
                return
            with contextlib.suppress(OSError):
                run.curves.refresh()
                run.ranks.refresh()
        finally:
            run.lock.release()

    def _build(self, run: ServedRun) -> None:
        with self._lock:
            if self._builder is None:
                self._builder = _Builder()
            self._builder.build(run)


def _links(folder: Path) -> Iterator[Path]:
    """Yield the links among a run's folder and the files in it that a page may show."""
    if folder.is_symlink():
        yield folder
    for parent, folders, files in os.walk(folder):
        yield from (
            path for name in (*folders, *files) if (path := Path(parent, name)).is_symlink() and name not in NOT_READ
        )
        folders[:] = [name for name in folders if name not in NOT_READ]


def _state_of(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


class _Builder:
    """The process that reads long logs into their caches, and the thread that follows it."""

    def __init__(self) -> None:
        self._asked: dict[str, ServedRun] = {}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "shoal.report.curves.build"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=self._follow, name="caches", daemon=True).start()

    def build(self, run: ServedRun) -> None:
        """Read a run's logs after those that were asked for before."""
        folder = str(run.folder.path)
        self._asked[folder] = run
        asked = {"folder": folder, "cache": str(run.cache) if run.cache else None}
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        except OSError:  # the process was killed: read the log here
            threading.Thread(target=self._done, args=(folder,), name="caches", daemon=True).start()

    def close(self) -> None:
        """End the process."""
        self._asked.clear()
        self._process.terminate()
        self._process.wait()

    def _follow(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            if said["share"] >= 1:
                self._done(said["folder"])
            else:
                self._asked[said["folder"]].share = said["share"]
        for folder in list(self._asked):  # the process was killed
            self._done(folder)

    def _done(self, folder: str) -> None:
        """Take the run's curves from the cache, with the lines after it."""
        run = self._asked.pop(folder, None)
        if run is None:
            return
        with contextlib.suppress(OSError):
            run.curves = Curves.open(run.folder.path, run.cache)
            run.ranks = RankMap.open(run.folder.path, run.cache)
        run.share = None
