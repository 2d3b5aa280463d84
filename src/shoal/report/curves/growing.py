"""Follows a file that grows: its new whole lines, and whether it was rewritten. No torch."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final

PART: Final = 1 << 22  # bytes read at once
TAIL: Final = 512


@dataclass
class Growing:
    """
    How far a file was read. A file is the same one if what was read is still there: its last bytes, and all of it if the
    file's inode is another one, as after a copy or a resume, which writes the file again.
    """

    size: int = 0
    inode: int = 0
    checksum: int = 0
    tail: int = 0

    @classmethod
    def noted(cls, notes: dict[str, Any]) -> Growing:
        """Return what `as_notes` wrote. Raises `ValueError`."""
        if set(notes) != set(asdict(cls())) or not all(isinstance(each, int) for each in notes.values()):
            raise ValueError("unknown notes")
        return cls(**notes)

    def as_notes(self) -> dict[str, int]:
        """Return the state for JSON."""
        return asdict(self)

    def is_start_of(self, path: Path) -> bool:
        """Return whether the file still begins with what was read. Raises `OSError`."""
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size < self.size or self._tail_of(file) != self.tail:
                return False
            if status.st_ino != self.inode and self.size:
                if self._checksum_of(file) != self.checksum:
                    return False
                self.inode = status.st_ino
        return True

    def new_lines(self, path: Path, progress: Callable[[float], None] = lambda share: None) -> Iterator[bytes]:
        """
        Yield the whole lines that were not read yet, in parts of whole lines, and count them as read. Raises `OSError`.

        progress: called with the share of the file that was read.
        """
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            self.inode = status.st_ino
            file.seek(self.size)
            rest = b""
            while self.size + len(rest) < status.st_size and (part := file.read(PART)):
                whole = (rest + part).rpartition(b"\n")
                rest = whole[2]
                if data := whole[0] + whole[1]:
                    self.size += len(data)
                    self.checksum = zlib.crc32(data, self.checksum)
                    yield data
                progress(self.size / max(status.st_size, 1))
            self.tail = self._tail_of(file)

    def _tail_of(self, file: IO[bytes]) -> int:
        start = max(0, self.size - TAIL)
        file.seek(start)
        return zlib.crc32(file.read(self.size - start))

    def _checksum_of(self, file: IO[bytes]) -> int:
        file.seek(0)
        left, checksum = self.size, 0
        while left and (part := file.read(min(PART, left))):
            left -= len(part)
            checksum = zlib.crc32(part, checksum)
        return checksum
