"""Files of JSON lines whose writer survives a full disk: lines wait until they can be written. No torch."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

_ENCODER: Final = json.JSONEncoder(separators=(",", ":"))  # json.dumps would make one for each line


class PatientLines:
    """
    A file of JSON lines, appended to. Lines that cannot be written are kept in order and retried with the next line.

    Never raises `OSError`. `problem` describes a failed write; None after the next success.
    """

    def __init__(self, path: Path) -> None:
        self.problem: str | None = None
        self._path = path
        self._file: int | None = None
        self._waiting: list[bytes] = []
        self._lock = threading.RLock()  # a run's events come from several threads

    def add(self, *records: Mapping[str, Any]) -> None:
        """Add a line for each record, after those that still wait; lines that cannot be written wait too."""
        with self._lock:
            self._waiting += map(_line, records)
            self.offer()

    def offer(self, *records: Mapping[str, Any]) -> bool:
        """Write the waiting lines and a line for each record. If that fails, drop the records; return whether it succeeded."""
        with self._lock:
            try:
                if self._waiting or records:
                    self._write(b"".join([*self._waiting, *map(_line, records)]))
            except OSError as error:
                self.problem = f"{self._path} cannot be written: {error.strerror}; writing is retried"
                return False
            self.problem = None
            self._waiting.clear()
            return True

    def sync(self) -> None:
        """Flush to disk, so that the lines written survive a power cut."""
        try:
            if self._file is not None:
                os.fsync(self._file)
        except OSError as error:
            self.problem = f"{self._path} cannot be flushed: {error.strerror}"

    def close(self) -> None:
        """Try once more to write the waiting lines, and close. May be called twice."""
        if not self.offer() and self._waiting:
            self.problem = f"{self._path} could not be written: its last {len(self._waiting)} lines are lost"
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, data: bytes) -> None:
        if self._file is None:
            self._file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            size = os.fstat(self._file).st_size
            if size and os.pread(self._file, 1, size - 1) != b"\n":
                data = b"\n" + data  # a process died in the middle of its last line: start a new one
        size = os.fstat(self._file).st_size
        if os.write(self._file, data) < len(data):
            os.ftruncate(self._file, size)  # the disk is full: remove the partial line
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _line(record: Mapping[str, Any]) -> bytes:
    return _ENCODER.encode(record).encode() + b"\n"


def whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole lines of a file; skip those cut short. Raises `OSError` if there is no such file."""
    with path.open("rb") as file:
        for line in file:
            record = object_of(line)
            if record is not None and line.endswith(b"\n"):
                yield record


def object_of(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a line; None if it is anything else."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
