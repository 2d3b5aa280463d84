"""
Rows of best-fit packing, from an index that is made once and then read from its file, some bytes for each row. No torch.

    train-rows-512.index
        b"shoalrow", length of the head, CRC of the head     8 + 4 + 4 bytes
        head: what the index is of, and the CRC of each 64 KiB of the arrays, as JSON
        arrays  where each row's spans begin, and the spans of each row, one after the other, so that a row is one read;
                the start of each span, in the order of the stream, and its row, for finding the rows of a token

Opening reads the head. A block of the arrays is compared with its CRC when it is first read. Nothing is mapped: a map of
random reads grows by up to 2 MiB for each.
"""

from __future__ import annotations

import bisect
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shoal.data.packing.best_fit import best_fit, cut_documents
from shoal.data.packing.pack import Placed, RowArrays, Span, read_rows
from shoal.data.stored.files import exclusive_lock, write_atomically
from shoal.data.stored.shards import BLOCK_BYTES
from shoal.data.stored.stream import Stream
from shoal.errors import DataError, UnreadableError
from shoal.system.byte_file import ByteFile

VERSION = 2
PREFIX = struct.Struct("<8sII")
MAGIC = b"shoalrow"
ARRAYS = ("begins", "spans", "starts", "rows")
CURE = "remove it: it will be made again"
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


ReadBytes = Callable[[int, int], bytes | memoryview]
"""Returns the bytes [start, stop) of an index's arrays."""


class RowIndex:
    """
    Arrays of int64 by name, end to end, verified block by block.

    begins: [rows + 1], where each row's spans begin. spans: [2 * spans], first token of a span and the token after its last, by
    row. starts, rows: [spans], first token and row of each span, in the order of the stream.
    """

    def __init__(self, where: Path, sizes: Sequence[int], checks: Sequence[int], read_bytes: ReadBytes) -> None:
        self._where, self._checks, self._bytes = where, np.array(checks, np.uint32), read_bytes
        self._verified = np.zeros(len(checks), np.bool_)
        self._first = dict(zip(ARRAYS, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
        self._end = WIDTH * sum(sizes)
        self.num_rows, self.num_spans = sizes[ARRAYS.index("begins")] - 1, sizes[ARRAYS.index("starts")]

    def read(self, name: str, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return items [start, stop) of an array. Raises DataError if their bytes were altered or cannot be read."""
        first = self._first[name]
        low, high = (first + start) * WIDTH, (first + stop) * WIDTH
        try:
            for block in range(low // BLOCK_BYTES, -(-high // BLOCK_BYTES)):
                if not self._verified[block]:
                    self._verify(block)
            return np.frombuffer(self._bytes(low, high), np.int64)
        except UnreadableError as error:  # of the index, so no other row can be read instead
            raise DataError(str(error)) from error

    def item(self, name: str, at: int) -> int:
        """Return an item of an array. Raises DataError as `read` does."""
        return int(self.read(name, at, at + 1)[0])

    def _verify(self, block: int) -> None:
        first = block * BLOCK_BYTES
        if zlib.crc32(self._bytes(first, min(first + BLOCK_BYTES, self._end))) != self._checks[block]:
            raise DataError(f"{self._where} was altered; {CURE}")
        self._verified[block] = True


class BestFitRows:
    """Rows of whole documents, padded at their end. Raises IndexError for row numbers out of range."""

    def __init__(self, stream: Stream, index: RowIndex, seq_len: int, pad: int, document_mask: bool) -> None:
        """Combine a stream with its index. pad: the token after a row's last document."""
        self._stream, self._index, self._pad, self.document_mask = stream, index, pad, document_mask
        self.seq_len = seq_len

    def __len__(self) -> int:
        return self._index.num_rows

    def place(self, row: int) -> Placed:
        return Placed(self._stream, self._spans(row), self._pad)

    def rows_of(self, start: int, stop: int) -> list[int]:
        every, start_of = range(self._index.num_spans), partial(self._index.item, "starts")
        first = bisect.bisect_right(every, start, key=start_of)
        end = bisect.bisect_left(every, stop, first, key=start_of)
        while first > 0 and self._stop_of(first - 1) > start:  # at most twice: neighboring spans share a token
            first -= 1
        return sorted(set(self._index.read("rows", first, max(first, end)).tolist()))

    def read(self, row_ids: npt.ArrayLike) -> RowArrays:
        """Return the rows with these numbers, in this order. Raises DataError if their bytes were altered."""
        return read_rows(self, row_ids)

    def _spans(self, row: int) -> list[Span]:
        first, stop = self._index.read("begins", row, row + 2).tolist()
        found = self._index.read("spans", 2 * first, 2 * stop).tolist()
        return list(zip(found[::2], found[1::2], strict=True))

    def _stop_of(self, number: int) -> int:
        """Return the token after the last of a span. number: counts spans in the order of the stream."""
        return dict(self._spans(self._index.item("rows", number)))[self._index.item("starts", number)]


def open_index(folder: Path, stream: Stream, identity: Identity, *, keep: bool = True) -> RowIndex:
    """
    Open the index of a split's rows; make it first if it is missing, damaged or of other tokens.

    Of several processes, one makes it and the others wait. If the folder is read-only, or not `keep`, the new index is only in
    memory.
    Raises DataError if the tokens were altered or the disk is full.
    """
    path = folder / index_name(identity.split, identity.seq_len)
    if (found := _open(path, identity)) is not None:
        return found
    if not keep or not os.access(folder, os.W_OK):
        sizes, checks, body = _parts(stream, identity.seq_len)
        return RowIndex(path, sizes, checks, lambda start, stop: body[start:stop].data)
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
    sizes = [count + 1, 2 * len(pieces), len(pieces), len(pieces)]
    words = np.zeros(sum(sizes), np.int64)  # filled in place: a copy would take as much memory again
    begins, spans, starts, row_of = np.split(words, np.cumsum(sizes[:-1]))
    np.cumsum(np.bincount(rows, minlength=count), out=begins[1:])
    spans[::2], spans[1::2] = pieces.starts[in_rows], (pieces.starts + pieces.lengths)[in_rows]
    starts[:], row_of[:] = pieces.starts, rows
    body = words.view(np.uint8)
    return sizes, [zlib.crc32(block) for block in _blocks(body)], body


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
        with path.open("rb") as opened:
            magic, length, crc = PREFIX.unpack(opened.read(PREFIX.size))
            head = opened.read(length)
        if magic != MAGIC or zlib.crc32(head) != crc:
            return None
        saved = json.loads(head)
        if saved["of"] != vars(identity) or path.stat().st_size != PREFIX.size + length + WIDTH * sum(saved["sizes"]):
            return None
        file, first = ByteFile(path, str(path), CURE), PREFIX.size + length
        return RowIndex(
            path, saved["sizes"], saved["checks"], lambda start, stop: file.read(first + start, first + stop)
        )
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return None
