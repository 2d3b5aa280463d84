"""
Rows of best-fit packing, from an index that is made once and then mapped from its file. No torch.

    train-rows-512.index
        b"shoalrow", length of the head, CRC of the head     8 + 4 + 4 bytes
        head: what the index is of, and the CRC of each 64 KiB of the arrays, as JSON
        arrays  start and length of each piece of a document, and its row, in the order of the stream;
                where each row's pieces begin, and the pieces of each row

Opening reads the head. A block of the arrays is compared with its CRC when it is first read.
"""

from __future__ import annotations

import bisect
import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.data.best_fit import best_fit, cut_documents
from shoal.data.files import exclusive_lock, write_atomically
from shoal.data.pack import Placed, RowArrays, Span, read_rows
from shoal.data.shards import BLOCK_BYTES
from shoal.data.stream import Stream
from shoal.errors import DataError

VERSION = 1
PREFIX = struct.Struct("<8sII")
MAGIC = b"shoalrow"
ARRAYS = ("starts", "lengths", "rows", "begins", "pieces")
WIDTH = np.dtype(np.int64).itemsize


def index_name(split: str, seq_len: int) -> str:
    """Return the name of the index of a split's rows."""
    return f"{split}-rows-{seq_len}.index"


@dataclass(frozen=True)
class Identity:
    """What an index is of. An index of other tokens, or of another version, is made again."""

    data_id: str
    split: str
    seq_len: int
    version: int = VERSION


class RowIndex:
    """
    Arrays of int64 by name, in one buffer, verified block by block.

    starts, lengths, rows: [pieces], in the order of the stream. begins: [rows + 1], where each row's pieces begin in
    `pieces` [pieces], which are numbers of pieces.
    """

    def __init__(self, where: Path, sizes: Sequence[int], checks: Sequence[int], body: npt.NDArray[np.uint8]) -> None:
        self._where, self._checks, self._bytes = where, checks, body
        self._verified = np.zeros(len(checks), np.bool_)
        self._words = body.view(np.int64)
        begins = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        self._spans = {name: (begins[i], begins[i + 1]) for i, name in enumerate(ARRAYS)}
        self.num_rows = sizes[ARRAYS.index("begins")] - 1

    def read(self, name: str, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return items [start, stop) of an array. Raises DataError if their bytes were altered."""
        first = self._spans[name][0]
        low, high = first + start, first + stop
        for block in range(low * WIDTH // BLOCK_BYTES, -(-high * WIDTH // BLOCK_BYTES)):
            if not self._verified[block]:
                self._verify(block)
        return self._words[low:high]

    def column(self, name: str) -> Column:
        """Return an array as a sequence, for searching it without reading all of it."""
        first, stop = self._spans[name]
        return Column(self, name, stop - first)

    def _verify(self, block: int) -> None:
        if zlib.crc32(self._bytes[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES].data) != self._checks[block]:
            raise DataError(f"{self._where} was altered; remove it: it will be made again")
        self._verified[block] = True


class Column(Sequence[int]):
    """An array of an index, read item by item."""

    def __init__(self, index: RowIndex, name: str, length: int) -> None:
        self._index, self._name, self._length = index, name, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, at: Any) -> Any:
        return int(self._index.read(self._name, at, at + 1)[0])


class BestFitRows:
    """Rows of whole documents, padded at their end. Raises IndexError for row numbers out of range."""

    def __init__(self, stream: Stream, index: RowIndex, seq_len: int, pad: int, document_mask: bool) -> None:
        """Combine a stream with its index. pad: the token after a row's last document."""
        self._stream, self._index, self._pad, self.document_mask = stream, index, pad, document_mask
        self.seq_len = seq_len

    def __len__(self) -> int:
        return self._index.num_rows

    def place(self, row: int) -> Placed:
        first, stop = self._index.read("begins", row, row + 2).tolist()
        spans = [self._span(piece) for piece in self._index.read("pieces", first, stop).tolist()]
        return Placed(self._stream, spans, self._pad)

    def rows_of(self, start: int, stop: int) -> list[int]:
        starts = self._index.column("starts")
        first, end = bisect.bisect_right(starts, start), bisect.bisect_left(starts, stop)
        while first > 0 and self._span(first - 1)[1] > start:  # at most twice: neighboring pieces share a token
            first -= 1
        return sorted(set(self._index.read("rows", first, max(first, end)).tolist()))

    def read(self, row_ids: npt.ArrayLike) -> RowArrays:
        """Return the rows with these numbers, in this order. Raises DataError if their bytes were altered."""
        return read_rows(self, row_ids)

    def _span(self, piece: int) -> Span:
        start = int(self._index.read("starts", piece, piece + 1)[0])
        return start, start + int(self._index.read("lengths", piece, piece + 1)[0])


def open_index(folder: Path, stream: Stream, identity: Identity) -> RowIndex:
    """
    Open the index of a split's rows; make it first if it is missing, damaged or of other tokens.

    Of several processes, one makes it and the others wait. If the folder is read-only, the index is kept in memory.
    Raises DataError if the tokens were altered or the disk is full.
    """
    path = folder / index_name(identity.split, identity.seq_len)
    if (found := _open(path, identity)) is not None:
        return found
    if not os.access(folder, os.W_OK):
        sizes, checks, body = _parts(stream, identity.seq_len)
        return RowIndex(path, sizes, checks, body)
    with exclusive_lock(folder / ".lock", lambda: None):
        if (found := _open(path, identity)) is None:
            _save(path, identity, *_parts(stream, identity.seq_len))
            found = _open(path, identity)
    if found is None:
        raise DataError(f"{path} cannot be read back after it was written; check the disk")
    return found


def rows_in_index(folder: Path, identity: Identity) -> int | None:
    """Return the number of rows of an index that was made before; None if there is none."""
    found = _open(folder / index_name(identity.split, identity.seq_len), identity)
    return None if found is None else found.num_rows


def _parts(stream: Stream, seq_len: int) -> tuple[list[int], list[int], npt.NDArray[np.uint8]]:
    """Return the sizes of the arrays, the CRCs of their blocks, and their bytes."""
    pieces = cut_documents(stream, seq_len)
    rows, count = best_fit(pieces.lengths, seq_len + 1)
    in_rows = np.argsort(rows, kind="stable")  # each row's pieces stay in the order of the stream
    begins = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))]).astype(np.int64)
    arrays = (pieces.starts, pieces.lengths, rows, begins, in_rows)
    body = np.concatenate(arrays, dtype=np.int64).view(np.uint8)
    return [len(array) for array in arrays], [zlib.crc32(block) for block in _blocks(body)], body


def _blocks(body: npt.NDArray[np.uint8]) -> Iterator[memoryview]:
    for at in range(0, len(body), BLOCK_BYTES):
        yield body[at : at + BLOCK_BYTES].data


def _save(path: Path, identity: Identity, sizes: list[int], checks: list[int], body: npt.NDArray[np.uint8]) -> None:
    head = json.dumps({"of": vars(identity), "sizes": sizes, "checks": checks}).encode()
    head += b" " * (-(PREFIX.size + len(head)) % WIDTH)
    write_atomically(path, [PREFIX.pack(MAGIC, len(head), zlib.crc32(head)), head, body.data])


def _open(path: Path, identity: Identity) -> RowIndex | None:
    """Open an index; None if it is missing, damaged or of something else."""
    try:
        with path.open("rb") as file:
            magic, length, crc = PREFIX.unpack(file.read(PREFIX.size))
            head = file.read(length)
        if magic != MAGIC or zlib.crc32(head) != crc:
            return None
        saved = json.loads(head)
        if saved["of"] != vars(identity) or path.stat().st_size != PREFIX.size + length + WIDTH * sum(saved["sizes"]):
            return None
        body = np.memmap(path, np.uint8, "r", PREFIX.size + length)
        return RowIndex(path, saved["sizes"], saved["checks"], body)
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return None
