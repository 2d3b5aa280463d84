"""What every corpus speaks in: documents, places among them, and a listing. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, order=True, slots=True)
class Cursor:
    """Where reading goes on: the file, the document in it, and the bytes of the file read so far."""

    file: int = 0
    document: int = 0
    offset: int = 0


START = Cursor()


@dataclass(frozen=True, slots=True)
class Document:
    """A text that is never empty; `after` is where the next one starts."""

    name: str
    text: str
    after: Cursor


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that is no document, and why. `name` says where; `reason` is the same for all of a kind."""

    name: str
    reason: str
    after: Cursor
    fields: Mapping[str, int] = field(default_factory=dict)  # of a record without text: the length of each of its texts


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """One line of a listing. The name is relative to what the user wrote."""

    name: str
    bytes: int
    mtime_ns: int


class Corpus(Protocol):
    """A stream of documents in a fixed order, and what to compare to see that it changed."""

    def listing(self) -> list[CorpusFile]:
        """The files in the order of reading."""

    def digest(self, index: int) -> str:
        """A hash of the content of one file of the listing."""

    def read(self, start: Cursor = START) -> Iterator[Document | Skipped]:
        """From `start` on. Raises DataError where a file cannot be read, or is not UTF-8 text at all."""

    def skipped_files(self) -> Mapping[str, int]:
        """How many files below `data.paths` are not read, by kind."""


Reader = Callable[[Path, str, Cursor], Iterator[Document | Skipped]]
"""Reads one file, given its path, its name and where to start."""
