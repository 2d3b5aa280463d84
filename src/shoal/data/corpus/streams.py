"""The bytes of a file, plain or unpacked from gzip, zstd or xz, in bounded memory. No torch."""

from __future__ import annotations

import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from shoal.config.data_formats import split_suffix
from shoal.data.corpus.documents import LOST_PART, Cursor, Document, Reader, Skipped
from shoal.data.corpus.encoding import HEAD_BYTES, check_text, without_mark
from shoal.data.corpus.extra import import_extra
from shoal.errors import DataError
from shoal.system.output import on_one_line

BUFFER_BYTES = 1 << 20  # Python's default of 8 KiB takes three times as long for long lines
MAX_LINE_BYTES = 1 << 26
TOO_LONG = f"longer than {MAX_LINE_BYTES >> 20} MiB"
BOMB_TIMES = 200  # compression shrinks text about 5 times, and a decompression bomb from 1,000 times
BOMB_BYTES = 1 << 28  # files that unpack to less are not checked
ZSTD_INPUT_BYTES = 2048  # zstd unpacks one call's input at once, a bomb's to up to 32,000 times its size
ZSTD_WINDOW = 1 << 31  # dumps made with `zstd --long=31`, such as Reddit's, need a window of 2 GiB

NAMES = {".gz": "gzip", ".zst": "zstd", ".xz": "xz"}


class DamagedError(Exception):
    """Compressed data that cannot be unpacked any further; the message says that the rest is missing, and why."""


class Stream:
    """
    The unpacked bytes of a file, in order. `offset` is the number of bytes read so far.

    Raises DamagedError if the compressed data is damaged, and DataError for a decompression bomb.
    """

    def __init__(self, raw: IO[bytes], name: str, compression: str = "") -> None:
        self._raw, self._name, self._compression = raw, name, compression
        self._bytes, self._errors = _unpacked(raw, compression, name)
        self.offset = 0

    @property
    def compressed(self) -> bool:
        return bool(self._compression)

    def seek(self, offset: int) -> None:
        """Move to a place that `place` returned. A compressed file can only be read from its beginning."""
        if not self.compressed:
            self._raw.seek(offset)
            self.offset = offset

    def peek(self) -> bytes:
        """Return some bytes from this place on, about HEAD_BYTES if there are as many, without reading on."""
        found = self._unpack(lambda: self._bytes.peek(HEAD_BYTES))
        return found[:HEAD_BYTES]

    def line(self) -> tuple[bytes, bool]:
        """Return the next line and whether it is longer than MAX_LINE_BYTES; only that much of a longer one is returned."""
        found = self.readline()
        too_long = len(found) == MAX_LINE_BYTES and not found.endswith(b"\n")
        while too_long and (rest := self.readline()) and not rest.endswith(b"\n"):
            pass
        return found, too_long

    def readline(self) -> bytes:
        """Return the next line, or the first MAX_LINE_BYTES of a longer one."""
        return self._count(lambda: self._bytes.readline(MAX_LINE_BYTES))

    def read(self, count: int) -> bytes:
        """Return the next `count` bytes, fewer only at the end of the file."""
        return self._count(lambda: self._bytes.read(count))

    def place(self, offset: int | None = None) -> int:
        """Return `Cursor.offset` for a place in the text, by default the current one: in a compressed file, the bytes unpacked so far."""
        if self.compressed:
            return self._raw.tell()
        return self.offset if offset is None else offset

    def _unpack(self, read: Callable[[], bytes]) -> bytes:
        try:
            return read()
        except self._errors as error:
            how = "cut off" if isinstance(error, EOFError) else "damaged"
            raise DamagedError(
                f"{how}, so the rest of the file is missing ({NAMES[self._compression]}: {error})"
            ) from error

    def _count(self, read: Callable[[], bytes]) -> bytes:
        found = self._unpack(read)
        self.offset += len(found)
        if self.compressed and self.offset > BOMB_BYTES and self.offset > BOMB_TIMES * self._raw.tell():
            raise DataError(
                f"{on_one_line(self._name)} unpacks to more than {BOMB_TIMES} times its size, unlike text; take it out of "
                "data.paths, or unpack it yourself"
            )
        return found


@contextlib.contextmanager
def open_stream(path: Path, name: str) -> Iterator[Stream]:
    """Open a file, and unpack it if the suffix of `name` says that it is compressed. Raises DataError if zstandard is missing."""
    with path.open("rb", BUFFER_BYTES) as raw:
        yield Stream(raw, name, split_suffix(name)[1])


ReadStream = Callable[[Stream, str, Cursor], Iterator[Document | Skipped]]
"""Reads the documents of a stream from a cursor on; it moves the stream there itself."""


def stream_reader(read: ReadStream) -> Reader:
    """
    Return a reader of plain and compressed files. It raises DataError for a file that is not text in UTF-8.

    Compressed files cannot be seeked: what is before `start` is read again and dropped.
    """

    def reader(path: Path, name: str, start: Cursor) -> Iterator[Document | Skipped]:
        with open_stream(path, name) as stream:
            if not stream.compressed:
                yield from _checked(read, stream, name, start)
                return
            for item in _until_damage(_checked(read, stream, name, Cursor(start.file)), name, Cursor(start.file)):
                if item.after.document > start.document:
                    yield item

    return reader


def _checked(read: ReadStream, stream: Stream, name: str, start: Cursor) -> Iterator[Document | Skipped]:
    check_text(stream.peek(), name)
    yield from read(stream, name, start)


def _until_damage(items: Iterator[Document | Skipped], name: str, start: Cursor) -> Iterator[Document | Skipped]:
    after = start
    try:
        for item in items:
            after = item.after
            yield item
    except DamagedError as error:
        said = f"{name}, after {after.document:,} record{'s' if after.document != 1 else ''}"
        yield Skipped(said, str(error), Cursor(after.file, after.document + 1, after.offset), damaged=LOST_PART)


def _unpacked(raw: IO[bytes], compression: str, name: str) -> tuple[Any, tuple[type[Exception], ...]]:
    """Return the unpacked bytes as a file, and the errors that its damage raises."""
    match compression:
        case ".gz":
            return gzip.open(raw), (EOFError, gzip.BadGzipFile, zlib.error)
        case ".xz":
            return lzma.open(raw), (EOFError, lzma.LZMAError)
        case ".zst":
            zstandard = import_extra("zstandard", name)
            return io.BufferedReader(_Zstd(raw, zstandard), 1 << 17), (EOFError, zstandard.ZstdError)
        case _:
            return raw, ()


class _Zstd(io.RawIOBase):
    """The unpacked frames of a zstd file. Raises EOFError if the last one is cut short, which zstandard's own reader does not notice."""

    def __init__(self, raw: IO[bytes], zstandard: ModuleType) -> None:
        self._raw = raw
        self._new: Callable[[], Any] = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj
        self._frame = self._new()
        self._begun = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._begun = self._new(), False
            packed = packed or self._raw.read(ZSTD_INPUT_BYTES)
            if not packed:
                if self._begun:
                    raise EOFError("the file ends before its last frame does")
                return 0
            self._begun = True
            self._ready = memoryview(self._frame.decompress(packed))
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def numbered_lines(stream: Stream, start: Cursor) -> Iterator[tuple[bytes, bool, Cursor]]:
    """
    Yield each line from `start` on, whether it is cut because it is too long, and the cursor after it.

    The cursor's `document` is the line's number, from 1.
    """
    stream.seek(start.offset)
    number = start.document
    while True:
        line, too_long = stream.line()
        if not line:
            return
        number += 1
        yield without_mark(line) if number == 1 else line, too_long, Cursor(start.file, number, stream.place())
