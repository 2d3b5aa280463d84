"""Lines of JSON that a run writes about itself and must not die of: a full disk is waited out. No torch."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class PatientLines:
    """
    A file that lines are added to. What cannot be written now is kept, in order, and tried again with the next line.

    Nothing here raises for a disk's sake: `problem` says what is wrong, as long as it is.
    """

    def __init__(self, path: Path) -> None:
        self.problem: str | None = None
        self._path = path
        self._file: int | None = None
        self._waiting: list[bytes] = []

    def add(self, *records: Mapping[str, Any]) -> None:
        """Add a line for each record, after those that still wait; what cannot be written waits with them."""
        self._waiting += map(_line, records)
        self.offer()

    def offer(self, *records: Mapping[str, Any]) -> bool:
        """The same, but where they cannot be written these records do not wait; says whether they were written."""
        try:
            if self._waiting or records:
                self._write(b"".join([*self._waiting, *map(_line, records)]))
        except OSError as error:
            self.problem = f"{self._path} cannot be written: {error.strerror}; it is tried again"
            return False
        self.problem = None
        self._waiting.clear()
        return True

    def sync(self) -> None:
        """What was written is on the disk, also after a power cut."""
        try:
            if self._file is not None:
                os.fsync(self._file)
        except OSError as error:
            self.problem = f"{self._path} cannot be flushed: {error.strerror}"

    def close(self) -> None:
        """Try once more what waits, and close. May be called twice."""
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
                data = b"\n" + data  # a process died in the middle of its last line: ours does not go on with it
        size = os.fstat(self._file).st_size
        if os.write(self._file, data) < len(data):
            os.ftruncate(self._file, size)  # the disk is full: a piece of a line helps nobody
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file without those that a death cut short. Raises `OSError` where there is no such file."""
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and line.endswith(b"\n"):
                yield record
