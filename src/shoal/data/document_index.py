"""
Documents by number: which tokens a document has, and which document a token is of. No torch.

Shards know where their documents start. For token files, an index is made by one pass over the tokens when it is first asked
for, and kept with the data.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from shoal.data.prepare import Prepared, Progress, no_progress
from shoal.data.stored.files import exclusive_lock, write_atomically
from shoal.data.stored.manifest import SplitName
from shoal.data.stored.shards import Shard
from shoal.data.stored.stream import Stream, check_range
from shoal.system.byte_file import ByteFile
from shoal.system.number_file import NumberFile, search_near

WINDOW_TOKENS: Final = 1 << 22


class Documents(Protocol):
    """The documents of a split by number."""

    @property
    def num_documents(self) -> int: ...

    def document_span(self, number: int) -> tuple[int, int]:
        """Return tokens [first, stop) of a document. Raises IndexError if there is no such document."""
        ...

    def documents_in(self, start: int, stop: int) -> range:
        """Return the numbers of the documents with tokens in [start, stop). Raises IndexError for tokens out of range."""
        ...


class ShardDocuments:
    """The documents of shards, whose heads say where each document starts: a question reads one head or two."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = list(shards)
        self._tokens = np.cumsum([0, *(shard.num_tokens for shard in shards)], dtype=np.int64)
        self._documents = np.cumsum([0, *(shard.num_documents for shard in shards)], dtype=np.int64)

    @property
    def num_documents(self) -> int:
        return int(self._documents[-1])

    def document_span(self, number: int) -> tuple[int, int]:
        check_number(number, self.num_documents)
        index = int(np.searchsorted(self._documents, number, side="right")) - 1
        shard, own, begin = self._shards[index], number - int(self._documents[index]), int(self._tokens[index])
        starts = shard.starts(0, shard.num_tokens)
        stop = int(starts[own + 1]) if own + 1 < len(starts) else shard.num_tokens
        return begin + int(starts[own]), begin + stop

    def documents_in(self, start: int, stop: int) -> range:
        check_range(start, stop, int(self._tokens[-1]))
        return range(self._document_at(start), self._document_at(stop - 1) + 1)

    def _document_at(self, token: int) -> int:
        index = int(np.searchsorted(self._tokens, token, side="right")) - 1
        before = self._shards[index].starts(0, token - int(self._tokens[index]) + 1)
        return int(self._documents[index]) + len(before) - 1


class DocumentIndex:
    """The documents of token files. Tokens before the first start, if any, are document 0: the end of one that began elsewhere."""

    def __init__(self, starts: Sequence[int], num_tokens: int) -> None:
        """Hold the first token of each document: [documents], from 0 on, ascending."""
        self._starts, self._num_tokens = starts, num_tokens

    @property
    def num_documents(self) -> int:
        return len(self._starts)

    def document_span(self, number: int) -> tuple[int, int]:
        check_number(number, self.num_documents)
        last = number + 1 == self.num_documents
        return self._starts[number], self._num_tokens if last else self._starts[number + 1]

    def documents_in(self, start: int, stop: int) -> range:
        check_range(start, stop, self._num_tokens)
        first = bisect.bisect_right(self._starts, start)
        return range(first - 1, search_near(self._starts.__getitem__, stop, first, self.num_documents))


def check_number(number: int, count: int) -> None:
    """Raise IndexError unless there is a document with this number."""
    if not 0 <= number < count:
        raise IndexError(f"document {number} of {count}")


def find_documents(prepared: Prepared, split: SplitName, progress: Progress = no_progress) -> Documents:
    """
    Return the documents of a split. Those of token files need an index: make its file if there is none for these files.

    Of several processes, one makes it. Raises DataError if a token file cannot be read, or the folder of the data is not
    writable.
    """
    if not prepared.in_place:
        return ShardDocuments(prepared.shards(split))
    stream, path = prepared.streams[split], _index_file(prepared, split)
    if not path.exists():
        with exclusive_lock(prepared.folder / ".lock", lambda: progress("waiting for another process", 0, 0)):
            if not path.exists():
                write_atomically(path, _all_starts(stream, progress))
    return open_index(path, stream.num_tokens)


def open_index(path: Path, num_tokens: int) -> DocumentIndex:
    """Open the file of an index, of a split with `num_tokens`. Its methods raise DataError if the file becomes shorter."""
    starts = ByteFile(path, str(path), "remove it: it will be made again")
    return DocumentIndex(NumberFile(starts, "<i8", 0, path.stat().st_size // np.dtype(np.int64).itemsize), num_tokens)


def has_documents(prepared: Prepared, split: SplitName) -> bool:
    """Return whether `find_documents` has nothing to make."""
    return not prepared.in_place or _index_file(prepared, split).exists()


def _index_file(prepared: Prepared, split: SplitName) -> Path:
    return prepared.folder / f"documents-{split}-{_key(prepared)}.bin"


def _key(prepared: Prepared) -> str:
    """Return a hash of the tokens' id and of the names, sizes and times of their files."""
    listing = [f"{entry.name} {entry.bytes} {entry.mtime_ns}" for entry in prepared.manifest.listing]
    return hashlib.blake2b("\n".join([prepared.data_id, *listing]).encode(), digest_size=8).hexdigest()


def _all_starts(stream: Stream, progress: Progress) -> Iterator[bytes]:
    """Yield the starts of all documents, as bytes of int64."""
    for low in range(0, stream.num_tokens, WINDOW_TOKENS):
        progress("finding documents", low, stream.num_tokens)
        found = stream.starts(low, min(low + WINDOW_TOKENS, stream.num_tokens))
        if low == 0 and (not len(found) or found[0] != 0):
            yield np.int64(0).tobytes()
        yield found.astype("<i8").tobytes()
