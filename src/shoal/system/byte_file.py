"""
Reads ranges of a data file with pread(2), not through a memory map.

A disk error raises OSError in the reading thread; through a memory map it would end the process by SIGBUS. A read that waits
for a network file system lets other threads run.
"""

from __future__ import annotations

import errno
import functools
import os
from pathlib import Path
from typing import Final

from shoal.errors import DataError, UnreadableError

MOST_OPEN: Final = 64  # files kept open; a run may have more files than a process may open
ATTEMPTS: Final = 2  # the second on a newly opened file: a network file system may have lost the first handle


class ByteFile:
    """
    A file that is read in any order, by any thread.

    name: its name in messages. cure: what to do if it cannot be read. The file is opened at the first read.
    """

    def __init__(self, path: Path, name: str, cure: str) -> None:
        self._path, self._name, self._cure = path, name, cure

    def read(self, start: int, stop: int) -> bytes:
        """
        Return the bytes [start, stop).

        Raises UnreadableError if the disk fails there or the file is now shorter, DataError if the file cannot be opened.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._read(start, stop)
            except OSError as error:
                reopen()
                if attempt == ATTEMPTS:
                    kind = UnreadableError if error.errno == errno.EIO else DataError
                    raise kind(f"cannot read {self._name}: {error.strerror or error}; {self._cure}") from error
        raise AssertionError("unreachable")

    def _read(self, start: int, stop: int) -> bytes:
        file = _open(self._path, self)
        found = b""
        while len(found) < stop - start:
            part = os.pread(file.descriptor, stop - start - len(found), start + len(found))
            if not part:
                raise UnreadableError(f"{self._name} was cut short while it was read; {self._cure}")
            found = found + part if found else part
        return found


def reopen() -> None:
    """Let each file be opened again at its next read, for a file system that no longer answers on the open files."""
    _open.cache_clear()


class _OpenFile:
    """A descriptor that closes with its last reader, so that no thread reads a descriptor that now belongs to another file."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


@functools.lru_cache(MOST_OPEN)
def _open(path: Path, file: ByteFile) -> _OpenFile:
    """Open a file. `file` is in the key because another object may mean another file of this name, written since."""
    return _OpenFile(path)
