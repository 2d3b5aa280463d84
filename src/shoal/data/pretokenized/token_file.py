"""A file of token ids, read in place: ids are checked against the vocabulary as they are read. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from shoal.errors import UnreadableError
from shoal.system.byte_file import ByteFile

Format = Literal["nanogpt", "llm.c", "megatron", "raw"]
Tokens = npt.NDArray[np.unsignedinteger[Any]]
Starts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Vocabulary:
    """The facts of a tokenizer that token files are checked against: number of ids, and the tokens at documents' ends."""

    name: str
    size: int
    eot_id: int
    bos_id: int | None


@dataclass(frozen=True)
class Contents:
    """Where the ids of a file are: `num_tokens` of `dtype` from byte `offset` on."""

    format: Format
    dtype: np.dtype[Any]
    offset: int
    num_tokens: int


class Borders(Protocol):
    """An index of documents beside the tokens."""

    def starts(self, start: int, stop: int) -> Starts:
        """Return the offsets in [start, stop) at which a document starts, ascending."""
        ...

    def documents_before(self, token: int) -> int:
        """Return how many documents start before a token."""
        ...

    def check(self) -> None:
        """Check the index, unless it is too large. Raises DataError if it does not fit the tokens."""
        ...


class TokenFile:
    """
    The ids of one file, as a stream.

    Without an index, a document's borders are its end tokens. Where the end token follows a document, a file's first token
    starts a document. llm.c puts the end token (or the tokenizer's begin token) first, and its documents continue in the next file.
    """

    def __init__(
        self, name: str, path: Path, contents: Contents, vocabulary: Vocabulary, borders: Borders | None = None
    ) -> None:
        self.name, self.path, self.contents, self.borders = name, path, contents, borders
        self.num_tokens = contents.num_tokens
        self._vocabulary = vocabulary
        self._file = ByteFile(path, name, "copy it again, or put it back")

    def read(self, start: int, stop: int) -> Tokens:
        """Return tokens [start, stop), unsigned. Raises UnreadableError if an id is not in the vocabulary or the disk fails."""
        ids = self._load(start, stop)
        if int(ids.max()) >= self._vocabulary.size:
            self._refuse(start, int(np.argmax(ids >= self._vocabulary.size)))
        return ids

    def answers(self, start: int, stop: int) -> None:
        """Return None: every token is learned."""

    def starts(self, start: int, stop: int) -> Starts:
        """Return the offsets in [start, stop) at which a document starts, ascending. Scans only these tokens."""
        if self.borders is not None:
            return self.borders.starts(start, stop)
        if self.contents.format == "llm.c":
            return np.flatnonzero(self._begins(start, stop)) + start
        first = max(start, 1)  # the file's first token starts a document
        ids = self._load(first - 1, stop)
        found = ids[:-1] == self._vocabulary.eot_id
        if self._vocabulary.bos_id is not None:
            found |= ids[1:] == self._vocabulary.bos_id
        starts = np.flatnonzero(found) + first
        return np.concatenate([[0], starts]) if start == 0 else starts

    def _begins(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Return whether each token is one that llm.c puts before a document."""
        ids = self._load(start, stop)
        begins: npt.NDArray[np.bool_] = ids == self._vocabulary.eot_id
        if self._vocabulary.bos_id is not None:
            begins |= ids == self._vocabulary.bos_id
        return begins

    def _refuse(self, start: int, place: int) -> NoReturn:
        token, vocabulary = start + place, self._vocabulary
        stored = self._load(token, token + 1).view(self.contents.dtype)[0]
        raise UnreadableError(
            f"{self.name}: token {token:,} (byte {self.contents.offset + token * self.contents.dtype.itemsize:,}) is {stored:,}, "
            f"not an id of {vocabulary.name}, which has {vocabulary.size:,}; set data.tokenizer to the tokenizer that made the "
            "file, or data.token_type to its type"
        )

    def _load(self, start: int, stop: int) -> Tokens:
        """Return tokens [start, stop) as unsigned integers: a negative id becomes larger than any vocabulary."""
        offset, width = self.contents.offset, self.contents.dtype.itemsize
        return np.frombuffer(self._file.read(offset + start * width, offset + stop * width), self._unsigned)

    @property
    def _unsigned(self) -> np.dtype[Any]:
        return np.dtype(self.contents.dtype.str.replace("i", "u"))
