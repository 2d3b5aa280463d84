"""
Read .json files: an array of records, one record, or a record per line. Files of any size are streamed. No torch.

An array is never in memory as a whole: a window of text slides over it, and `JSONDecoder.raw_decode` takes one record at a
time from the window.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final

from shoal.data.corpus.documents import Cursor, Document, Reader, Skipped
from shoal.data.corpus.encoding import without_mark
from shoal.data.corpus.jsonl import jsonl_reader
from shoal.data.corpus.records import Shape, from_json
from shoal.data.corpus.streams import MAX_LINE_BYTES, DamagedError, Stream, open_stream, stream_reader
from shoal.errors import DataError
from shoal.system.output import on_one_line

WINDOW_BYTES = 1 << 20
LINES_TRIED = 3  # number of first lines of which one must be a whole record, so that the file is read line by line
_DECODER: Final = json.JSONDecoder(strict=False)  # people's arrays have tabs and line ends inside strings
_SPACE: Final = re.compile(r"[ \t\r\n]*")
_TOKEN: Final = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[{}\[\]]', re.DOTALL)


def json_reader(shape: Shape) -> Reader:
    """Return a reader that makes a document of each record. Raises DataError for an array that was cut short."""
    lines = jsonl_reader(shape)
    values = stream_reader(lambda stream, name, start: _read_values(stream, name, start, shape))

    def reader(path: Path, name: str, start: Cursor) -> Iterator[Document | Skipped]:
        return (lines if _has_lines(path, name) else values)(path, name, start)

    return reader


def _has_lines(path: Path, name: str) -> bool:
    """Return whether one of the first lines is a whole record."""
    with open_stream(path, name) as stream:
        try:
            if not without_mark(stream.peek()).lstrip().startswith(b"{"):
                return False
            lines = (without_mark(line) for line in iter(stream.readline, b"") if line.strip())
            return any(map(_is_record, islice(lines, LINES_TRIED)))
        except DamagedError:
            return False


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_values(stream: Stream, name: str, start: Cursor, shape: Shape) -> Iterator[Document | Skipped]:
    """Yield a document per value of the array, or of the values that follow one another in the file."""
    window = _Window(stream, name)
    if start.offset:
        window.seek(start.offset)
    index = start.document
    while window.find_value(first=index == 0):
        record, source = window.take_value()
        index += 1
        after = Cursor(start.file, index, stream.place(window.offset))
        label = f"{name}, record {index} (to byte {window.offset})"
        if source is None:
            yield Skipped(label, "not UTF-8", after, damaged=True)
        elif record is _BROKEN:
            yield Skipped(label, "not JSON", after, damaged=True)
        else:
            yield from_json(source, record, label, shape, after)


_BROKEN: Final = object()


class _Window:
    """A part of the file's text. `offset` is the place in the file, in bytes, up to which records were taken."""

    def __init__(self, stream: Stream, name: str) -> None:
        """Read the beginning of the file."""
        self._stream, self._name = stream, on_one_line(name)
        self._start_at(0, stream.read(WINDOW_BYTES))
        if self._text.startswith("\ufeff"):
            self._advance(1)
        self._skip_space()
        self._is_array = self._text.startswith("[", self._at)
        if self._is_array:
            self._advance(self._at + 1)

    def seek(self, offset: int) -> None:
        """Move to a place where `offset` was after a record."""
        self._stream.seek(offset)
        self._start_at(offset, b"")

    def find_value(self, *, first: bool) -> bool:
        """Move to the next value; False if there is none. first: whether it may follow without a comma."""
        self._skip_space()
        sign = self._text[self._at : self._at + 1]
        if not self._is_array or (sign == "]" and self._end_array()):
            return bool(sign) and not self._is_array
        if not first and sign:
            if sign != ",":
                raise self._not_json(self.offset, "a comma or ] must follow a record")
            self._advance(self._at + 1)
            self._skip_space()
        if self._at == len(self._text):
            raise self._cut_short("in its array")
        return True

    def take_value(self) -> tuple[Any, bytes | None]:
        """
        Return the value here and its JSON, None if that is not UTF-8, and move past it.

        A value that is not JSON is `_BROKEN`. Raises DataError if the file ends inside it, or its end cannot be found.
        """
        while True:
            try:
                record, end = _DECODER.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                record, end = _BROKEN, self._end_of_broken(error)
            if end and (end < len(self._text) or self._ended):
                return record, self._advance(end)
            if self._ended:
                raise self._cut_short(f"inside the record that begins at byte {self.offset:,}")
            if len(self._text) - self._at > MAX_LINE_BYTES:
                raise DataError(
                    f"{self._name}: the record that begins at byte {self.offset:,} does not end within "
                    f"{MAX_LINE_BYTES >> 20} MiB; correct the file, or extract its records (jq -c '.[]'), or take it out of data.paths"
                )
            self._fill()

    def _start_at(self, offset: int, content: bytes) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text, self._at, self._ended, self.offset = self._decoder.decode(content), 0, False, offset

    def _fill(self) -> None:
        """Drop the text before this place and read on; at least as much as is kept, so that a long record is not parsed often."""
        kept = self._text[self._at :]
        more = self._stream.read(max(WINDOW_BYTES, len(kept)))
        self._ended = not more
        self._text, self._at = kept + self._decoder.decode(more, final=self._ended), 0

    def _advance(self, end: int) -> bytes | None:
        """Move to `end` of the text, and return the bytes in between; None if they are not UTF-8."""
        text, self._at = self._text[self._at : end], end
        try:
            passed = text.encode()
        except UnicodeEncodeError:
            self.offset += len(text.encode("utf-8", "surrogateescape"))
            return None
        self.offset += len(passed)
        return passed

    def _skip_space(self) -> None:
        while True:
            match = _SPACE.match(self._text, self._at)
            self._advance(match.end() if match else self._at)
            if self._at < len(self._text) or self._ended:
                return
            self._fill()

    def _end_array(self) -> bool:
        """Return True, or raise DataError if something follows the array."""
        self._advance(self._at + 1)
        self._skip_space()
        if self._at < len(self._text):
            raise self._not_json(self.offset, "something follows the end of its array")
        return True

    def _end_of_broken(self, error: ValueError | RecursionError) -> int:
        """Return the end of a value that is not JSON, found by its brackets; 0 if the window does not hold it."""
        if self._text[self._at] not in '{["':
            if self._ended or len(self._text) - self._at > WINDOW_BYTES // 2:
                raise self._not_json(self.offset, str(getattr(error, "msg", error)))
            return 0
        depth = 0
        for token in _TOKEN.finditer(self._text, self._at):
            depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(token[0], 0)
            if depth == 0:
                return token.end()
        return 0

    def _cut_short(self, where: str) -> DataError:
        end = self.offset + len(self._text[self._at :].encode("utf-8", "surrogateescape"))
        return DataError(
            f"{self._name} ends {where}, at byte {end:,}, so it was cut short; fetch or write it again, or take it out of data.paths"
        )

    def _not_json(self, offset: int, why: str) -> DataError:
        return DataError(
            f"{self._name} is not JSON at byte {offset:,} ({why}); correct it, or take it out of data.paths"
        )
