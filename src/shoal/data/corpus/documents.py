"""The types shared by every corpus: documents, places in the corpus, files. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, order=True, slots=True)
class Cursor:
    """A place to resume reading: the file, the document in it, and the bytes of the file read so far."""

    file: int = 0
    document: int = 0
    offset: int = 0


START = Cursor()

# A lost part of a file counts as this many damaged records, if nothing says how many it had: it may be half of the corpus.
# One more than the default of `data.bad_records`, so that it is an error unless the user allows more.
LOST_PART = 1001


@dataclass(frozen=True, slots=True)
class Conversation:
    """
    Messages, each with at least `role` and `content`, as chat templates read them.

    learned: for each message, whether its own flag asks to learn it; None without a flag. tools: the functions that the model
    may call. record_id: the record's `id`. flaws: the rules that the messages break, one sentence each.
    """

    messages: tuple[Mapping[str, Any], ...]
    learned: tuple[bool | None, ...]
    tools: tuple[Any, ...] = ()
    record_id: str | None = None
    flaws: tuple[str, ...] = ()

    def words(self) -> str:
        """Return the text of the messages, without roles and templates, to train a tokenizer on."""
        return "\n".join(message["content"] for message in self.messages)


@dataclass(frozen=True, slots=True)
class Document:
    """
    A non-empty text, or a conversation with its JSON as `text`; `after` is the cursor of the next document.

    counted_bytes: bytes by which bits per byte divide, if not those of the text.
    """

    name: str
    text: str
    after: Cursor
    conversation: Conversation | None = None
    counted_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Skipped:
    """
    A record that is not a document. `name` says where it is. Records skipped for the same cause share one `reason`.

    damaged: how many damaged records it counts as, against `data.bad_records`; 0 if it is not damaged. See `LOST_PART`.
    """

    name: str
    reason: str
    after: Cursor
    # For a record without `data.text_key`: the length of each string field
    fields: Mapping[str, int] = field(default_factory=dict)
    damaged: int = 0


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """A file of a corpus. If `data.paths` sets the files, the name begins with the path as the user gave it."""

    name: str
    bytes: int
    mtime_ns: int


class Listed(Protocol):
    """Files and their hashes, to detect changes."""

    def listing(self) -> list[CorpusFile]:
        """Return the files in reading order."""

    def digest(self, index: int) -> str:
        """Return a hash of the content of one file of the listing."""


class Corpus(Listed, Protocol):
    """A stream of documents in a fixed order, with a listing of its files and their hashes, to detect changes."""

    @property
    def held_out_files(self) -> int:
        """Return how many files are held out, the first of the listing; 0 if documents are held out by their text."""

    def read(self, start: Cursor = START) -> Iterator[Document | Skipped]:
        """Yield documents and skipped records from `start` on. Raises DataError if a file cannot be read or is not text."""

    def skipped_files(self) -> Mapping[str, int]:
        """Return how many files under `data.paths` are skipped, by suffix or cause (such as `hidden`)."""


Reader = Callable[[Path, str, Cursor], Iterator[Document | Skipped]]
"""Reads one file, given its path, its name and the place to start."""
