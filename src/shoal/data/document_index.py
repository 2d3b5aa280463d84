"""
Documents by number: which tokens a document has, and which document a token is of. No torch.

The index holds where each document starts. Its file is made by one pass over the tokens, when it is first asked for, and
kept with the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Final

import numpy as np

from shoal.data.files import exclusive_lock, write_atomically
from shoal.data.manifest import SplitName
from shoal.data.prepare import Prepared, Progress, no_progress
from shoal.data.stream import Starts, Stream

WINDOW_TOKENS: Final = 1 << 22


class DocumentIndex:
    """The documents of a split. Tokens before the first start, if any, are document 0: the end of one that began elsewhere."""

    def __init__(self, starts: Starts, num_tokens: int) -> None:
        """Hold the first token of each document: [documents], from 0 on, ascending."""
        self._starts, self._num_tokens = starts, num_tokens

    def __len__(self) -> int:
        return len(self._starts)

    def tokens_of(self, document: int) -> tuple[int, int]:
        """Return the first token of a document, and the one after its last. Raises IndexError for a number out of range."""
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        last = document + 1 == len(self)
        return int(self._starts[document]), self._num_tokens if last else int(self._starts[document + 1])

    def document_at(self, token: int) -> int:
        """Return the number of the document that a token is of. Raises IndexError for a token out of range."""
        if not 0 <= token < self._num_tokens:
            raise IndexError(f"token {token} of {self._num_tokens}")
        return int(np.searchsorted(self._starts, token, side="right")) - 1


def document_index(prepared: Prepared, split: SplitName, progress: Progress = no_progress) -> DocumentIndex:
    """
    Return the index of a split; make its file if there is none for these files. Of several processes, one makes it.

    Raises DataError if a token file cannot be read, or the folder of the data is not writable.
    """
    stream = prepared.streams[split]
    path = prepared.folder / f"documents-{split}-{_key(prepared)}.bin"
    if not path.exists():
        with exclusive_lock(prepared.folder / ".lock", lambda: progress("waiting for another process", 0, 0)):
            if not path.exists():
                write_atomically(path, _all_starts(stream, progress))
    return DocumentIndex(np.memmap(path, np.int64, "r"), stream.num_tokens)


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
