"""A log of a run, read once, with a cache of its content beside it. No torch."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Self

from shoal.report.curves.growing import Growing


class CachedLog(ABC):
    """The content of `LOG`.jsonl in a run's folder. A run without that file has no content."""

    LOG: ClassVar[str]
    _read: Growing

    def __init__(self, folder: Path, cache: Path | None = None) -> None:
        """cache: folder of the cache; the run's own by default."""
        self._log = folder / f"{self.LOG}.jsonl"
        self._cache = (cache or folder / "cache" / "curves") / self.LOG
        self._lock = threading.RLock()
        self._generation = -1
        self._forget()

    @classmethod
    def open(
        cls, folder: Path, cache: Path | None = None, progress: Callable[[float], None] = lambda share: None
    ) -> Self:
        """
        Return the content of a run's log, from the cache and the lines after it.

        progress: called with the share of the log that was read.
        """
        found = cls.cached(folder, cache)
        found.refresh(progress)
        return found

    @classmethod
    def cached(cls, folder: Path, cache: Path | None = None) -> Self:
        """Return the content as far as the cache has it; `refresh` reads the lines after it."""
        found = cls(folder, cache)
        found._load()
        return found

    def bytes_to_read(self) -> int:
        """Return how many bytes of the log `refresh` would read: the whole log if it was rewritten."""
        with self._lock:
            try:
                size = self._log.stat().st_size
                return size - self._read.size if self._read.is_start_of(self._log) else size
            except OSError:
                return 0

    @abstractmethod
    def refresh(self, progress: Callable[[float], None] = lambda share: None) -> bool:
        """Read the new lines of the log, or the whole log if it was rewritten; return whether anything is new."""

    @abstractmethod
    def _forget(self) -> None:
        """Begin with no content, as a new generation."""

    @abstractmethod
    def _load(self) -> None:
        """Take the content of the cache, if it is of this log."""
