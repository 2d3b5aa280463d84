"""Follows a file of JSON lines that another process writes, and that a resume may rewrite. No torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from shoal.run.jsonl import object_of

_MARK: Final = 256  # bytes compared to find out whether the part already read has changed


class Tail:
    """
    Reads the lines of a file as they are added. Never raises `OSError`: a file that cannot be read has no lines.

    rewritten: whether the last `read` started over, because the file was replaced or cut. Its lines then replace all earlier ones.
    """

    def __init__(self, path: Path, *, last_bytes: int | None = None) -> None:
        """last_bytes: read at most this much of the end at first, and after a rewrite; None reads all."""
        self.rewritten = False
        self._path, self._last_bytes = path, last_bytes
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._mark = b""  # the bytes before `_offset`

    def read(self) -> list[dict[str, Any]]:
        """Return the whole lines that were added since the last call."""
        self.rewritten = False
        try:
            with self._path.open("rb") as file:
                return self._read(file)
        except OSError:
            return []

    def skip(self) -> None:
        """Skip the lines that are there now: later ones are new, also all of a file that is not there yet."""
        self.read()
        self._last_bytes = None

    def _read(self, file: Any) -> list[dict[str, Any]]:
        stat = os.fstat(file.fileno())
        identity = (stat.st_dev, stat.st_ino)
        if self._identity is not None and (identity != self._identity or not self._continues(file, stat.st_size)):
            self.rewritten = True
        if self._identity is None or self.rewritten:
            self._begin(file, stat.st_size)
        self._identity = identity
        file.seek(self._offset)
        data = file.read(max(0, stat.st_size - self._offset))
        whole = data[: data.rfind(b"\n") + 1]  # the writer may be in the middle of a line
        self._offset += len(whole)
        self._mark = (self._mark + whole)[-_MARK:]
        return [line for line in map(object_of, whole.splitlines()) if line is not None]

    def _continues(self, file: Any, size: int) -> bool:
        """Return whether the file still has the part that was read."""
        if size < self._offset:
            return False
        file.seek(self._offset - len(self._mark))
        return bool(file.read(len(self._mark)) == self._mark)

    def _begin(self, file: Any, size: int) -> None:
        """Go to the first line to read."""
        self._offset, self._mark = 0, b""
        if self._last_bytes is not None and size > self._last_bytes:
            file.seek(size - self._last_bytes)
            file.readline()  # probably cut
            self._offset = file.tell()
