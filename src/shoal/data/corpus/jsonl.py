"""Read jsonl files, plain or gzipped; each line is a document. Files of any size are streamed. No torch."""

from __future__ import annotations

import functools
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from shoal.data.corpus.documents import Cursor, Document, Reader, Skipped
from shoal.data.corpus.encoding import check_text, without_mark
from shoal.data.corpus.records import Shape
from shoal.errors import DataError
from shoal.system.output import on_one_line

MAX_LINE_BYTES = 1 << 26
BUFFER_BYTES = 1 << 20  # Python's default of 8 KiB takes three times as long for long lines
BOMB_TIMES = 200  # gzip shrinks text about 5 times, and a decompression bomb up to 1,000 times
BOMB_BYTES = 1 << 28  # files that unpack to less are not checked


def jsonl_reader(shape: Shape) -> Reader:
    """Return a reader that makes a document of each line's record; it skips lines that are not JSON."""

    def read(path: Path, name: str, start: Cursor) -> Iterator[Document | Skipped]:
        with path.open("rb", BUFFER_BYTES) as raw:
            if path.name.endswith(".gz"):
                yield from _read_gzip(raw, name, start, shape)
            else:
                raw.seek(start.offset)
                yield from _read_lines(raw, raw, name, start, shape)

    return read


def _read_gzip(raw: IO[bytes], name: str, start: Cursor, shape: Shape) -> Iterator[Document | Skipped]:
    """Read a gzip file. It cannot be seeked, so lines before `start` are read again and dropped."""
    after = start
    try:
        with gzip.open(raw) as unpacked:
            for item in _read_lines(_Unpacked(unpacked, raw, name), raw, name, Cursor(start.file), shape):
                after = item.after
                if after.document > start.document:
                    yield item
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        after = Cursor(after.file, after.document + 1, after.offset)
        yield Skipped(f"{name}, from line {after.document}", f"damaged gzip ({error})", after)


class _Unpacked:
    """The lines of a gzip file. Raises DataError for a decompression bomb."""

    def __init__(self, lines: gzip.GzipFile, raw: IO[bytes], name: str) -> None:
        self._lines, self._raw, self._name, self._bytes = lines, raw, name, 0

    def readline(self, limit: int) -> bytes:
        line = self._lines.readline(limit)
        self._bytes += len(line)
        if self._bytes > BOMB_BYTES and self._bytes > BOMB_TIMES * self._raw.tell():
            raise DataError(
                f"{self._name} unpacks to more than {BOMB_TIMES} times its size, unlike text; take it out of data.paths, or "
                "unpack it yourself"
            )
        return line


def _read_lines(
    lines: IO[bytes] | _Unpacked, raw: IO[bytes], name: str, start: Cursor, shape: Shape
) -> Iterator[Document | Skipped]:
    """
    Yield a document per line; blank lines are neither documents nor counted as skipped.

    lines: the unpacked lines. raw: the file on disk, whose `tell()` becomes the cursor's offset.
    """
    index = start.document
    begun = index > 0
    while line := lines.readline(MAX_LINE_BYTES):
        too_long = len(line) == MAX_LINE_BYTES and not line.endswith(b"\n")
        while too_long and (rest := lines.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
            pass
        index += 1
        if index == 1:
            line = without_mark(line)
        if not begun and line.strip():
            _check_first_line(line, name)
            begun = True
        after = Cursor(start.file, index, raw.tell())
        label = f"{name}:{index}"
        if too_long:
            yield Skipped(label, f"longer than {MAX_LINE_BYTES >> 20} MiB", after)
        elif line.strip():
            yield _parse_line(line, label, shape, after)


def _check_first_line(line: bytes, name: str) -> None:
    check_text(line, name)
    if line.lstrip().startswith(b"["):
        raise DataError(
            f"{on_one_line(name)} begins with a JSON array; data.corpus jsonl needs one object per line (jq -c '.[]' converts an array)"
        )


def _parse_line(line: bytes, label: str, shape: Shape, after: Cursor) -> Document | Skipped:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError:
        return Skipped(label, "not UTF-8", after)
    except (ValueError, RecursionError):
        many = b"\r" in line.strip()
        return Skipped(label, "not JSON: its lines end with CR alone, not LF" if many else "not JSON", after)
    found = shape.document(value, label, after)
    if isinstance(found, Skipped):
        return found
    if sum(line.count(spelled) for spelled in _spellings(shape.key)) > 1 and _says_twice(line, shape.key):
        return Skipped(label, f"{shape.key!r} twice, so one text would be lost", after)
    return found


@functools.cache
def _spellings(key: str) -> frozenset[bytes]:
    """Return how JSON may spell a key: unchanged, and with non-ASCII characters escaped."""
    return frozenset(json.dumps(key, ensure_ascii=ascii).encode(errors="surrogatepass") for ascii in (True, False))


def _says_twice(line: bytes, key: str) -> bool:
    """Return whether the object itself, not one nested in it, has `key` more than once."""
    pairs: list[tuple[str, object]] = json.loads(line, object_pairs_hook=list)
    return sum(said == key for said, _ in pairs) > 1
