"""
Copies the output of this node's workers to one log per rank, with the time of each line, and shows a part of it. No torch.

The workers write to named pipes. A thread of the launcher reads them, so that a log has all lines of a process up to its
death, also those of C++ libraries. A log that cannot be written loses lines; the workers never wait for it.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from shoal.run.log_lines import ENDED, ERR, OUT, RUN, stamp

MOST_BYTES: Final = 1 << 16  # a longer line is cut here: some programs print no line feeds
QUIET_SECONDS: Final = 0.05  # the pipes are empty if nothing arrives for this long
SETTLE_SECONDS: Final = 5.0  # maximum wait for that


def rank_log(folder: Path, rank: int) -> Path:
    """Return the log of a rank in the folder of an attempt."""
    return folder / f"rank-{rank}.log"


def job_of(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the Slurm job and how often it was requeued, as "42-0"; None outside Slurm."""
    job = environment.get("SLURM_JOB_ID")
    return f"{job}-{environment.get('SLURM_RESTART_COUNT', '0')}" if job else None


def new_attempt(logs: Path) -> str:
    """Create a folder under `logs` for the next attempt, named after the Slurm job, if any, and the time; return its name."""
    name = "-".join(filter(None, (job_of(), time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()))))
    for again in range(100):
        unique = f"{name}-{again}" if again else name
        try:
            (logs / unique).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError:  # a full or read-only disk must not prevent the start
            break
        return unique
    return name


class Pump:
    """
    The output of one attempt's workers on this node.

    Create it, let the workers open `path` of their streams for writing, then call `start`. Standard output of rank 0 and
    standard error of all ranks are shown too.
    """

    def __init__(
        self, folder: Path, pipes: Path, ranks: Mapping[int, int], show: Callable[[str, str], None] | None = None
    ) -> None:
        """
        Create the pipes.

        folder: the attempt's logs. pipes: an existing folder for the named pipes. ranks: local rank -> rank. show: a function
        called with each shown line and "out" or "err"; None prints it.
        """
        self._folder, self._pipes = folder, pipes
        self._logs = {local: _Log(rank_log(folder, rank)) for local, rank in ranks.items()}
        self._ranks = dict(ranks)
        self._show = show or _print
        self._selector = selectors.DefaultSelector()
        self._rests: dict[int, bytes] = {}  # by descriptor: the beginning of a line whose end has not arrived
        self._quiet = threading.Event()
        for local in ranks:
            for stream in (OUT, ERR):
                path = self.path(local, stream)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                os.mkfifo(path, 0o600)
                # without O_NONBLOCK, this would wait for the worker to open its end
                reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                self._selector.register(reading, selectors.EVENT_READ, (local, stream))
        self._thread = threading.Thread(target=self._run, name="rank logs", daemon=True)

    def path(self, local: int, stream: str) -> str:
        """Return the named pipe to which a worker writes its `stream`, "out" or "err"."""
        return str(self._pipes / f"{stream}-{local}")

    def start(self, pids: Mapping[int, int], world_size: int) -> None:
        """Begin each log with a line about its process, and begin to copy. Call it when all workers have opened their pipes."""
        host, job = socket.gethostname(), job_of()
        of_job = ", job {}, restart {}".format(*job.rsplit("-", 1)) if job else ""
        for local, pid in pids.items():
            self.note(local, f"rank {self._ranks[local]} of {world_size} on {host}, process {pid}{of_job}")
        self._thread.start()

    def note(self, local: int, text: str) -> None:
        """Add a line of the launcher to a worker's log."""
        self._logs[local].write([(stamp(time.time(), RUN) + text).encode()])

    def ended(self, local: int, how: str) -> None:
        """Add the last line to a worker's log: how the process ended."""
        self.note(local, f"{ENDED}{how}")

    def settle(self) -> None:
        """Wait until everything that the workers have written is copied, for at most `SETTLE_SECONDS`."""
        self._quiet.clear()
        if self._thread.is_alive():
            self._quiet.wait(SETTLE_SECONDS)

    def close(self) -> None:
        """Close the logs. A process that outlives its worker may still write: this opens its log again."""
        for log in self._logs.values():
            log.close()

    def _run(self) -> None:
        """Copy until no process has a pipe open: a worker's own children may outlive it."""
        while self._selector.get_map():
            ready = self._selector.select(QUIET_SECONDS)
            if not ready:
                self._quiet.set()
            for key, _ in ready:
                data = os.read(key.fd, MOST_BYTES)
                self._copy(key.fd, data, *key.data)
                if not data:
                    self._selector.unregister(key.fd)
                    os.close(key.fd)
        self._selector.close()
        self._quiet.set()

    def _copy(self, reading: int, data: bytes, local: int, stream: str) -> None:
        """Write and show the whole lines of `data` and what came before; empty data means the end."""
        whole, feed, rest = (self._rests.pop(reading, b"") + data).rpartition(b"\n")
        lines = whole.split(b"\n") if feed else []
        if rest and (not data or len(rest) >= MOST_BYTES):
            lines.append(rest)
        elif rest:
            self._rests[reading] = rest
        if not lines:
            return
        began = stamp(time.time(), stream).encode()
        self._logs[local].write([began + line for line in lines])
        if stream == ERR or self._ranks[local] == 0:
            who = f"rank {self._ranks[local]}: " if self._ranks[local] else ""
            for line in lines:
                self._show(f"{who}{line.decode('utf-8', 'replace')}", stream)


class _Log:
    """A log file that tolerates a disk that cannot be written: it loses lines, and says how many once it can be written again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None
        self._lost = 0
        self._lock = threading.Lock()  # the thread that copies and the launcher both write

    def write(self, lines: list[bytes]) -> None:
        with self._lock:
            if self._lost:
                lines = [f"{stamp(time.time(), RUN)}{self._lost} lines could not be written".encode(), *lines]
            data = b"".join(line + b"\n" for line in lines)
            try:
                if self._file is None:
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
                if os.write(self._file, data) == len(data):
                    self._lost = 0
                    return
            except OSError:
                pass
            self._lost += len(lines) - bool(self._lost)

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None


def _print(text: str, stream: str) -> None:
    """Print a worker's line to the launcher's own stream. Whatever prevents this must not end the copying."""
    with contextlib.suppress(Exception):
        print(text, file=sys.stdout if stream == OUT else sys.stderr, flush=True)
