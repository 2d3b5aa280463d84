"""Read csv and tsv files with a header, as Python's csv module does; each row is a record. Files of any size are streamed. No torch."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass

from shoal.config.data_formats import split_suffix
from shoal.data.corpus.documents import Cursor, Document, Reader, Skipped
from shoal.data.corpus.encoding import without_mark
from shoal.data.corpus.records import Shape, check_columns
from shoal.data.corpus.streams import MAX_LINE_BYTES, TOO_LONG, Stream, stream_reader
from shoal.errors import DataError
from shoal.system.output import on_one_line

DELIMITERS = (",", "\t", ";", "|")


def csv_reader(shape: Shape) -> Reader:
    """Return a reader that makes a document of each row. Raises DataError for a file without a header or a needed column."""
    return stream_reader(lambda stream, name, start: _read_rows(stream, name, start, shape))


def _read_rows(stream: Stream, name: str, start: Cursor, shape: Shape) -> Iterator[Document | Skipped]:
    csv.field_size_limit(MAX_LINE_BYTES)
    header, delimiter = _read_header(stream, name)
    if not header:
        return
    check_columns(header, shape, f"{name}, whose first line must name the columns,")
    if start.offset:
        stream.seek(start.offset)
    lines, index = _Lines(stream), start.document
    for row in _rows(lines, delimiter):
        index += 1
        after = Cursor(start.file, index, stream.place())
        label = f"{name}, row {index}"
        if isinstance(row, str):
            yield Skipped(label, row, after, damaged=row != TOO_LONG)
        elif len(row) != len(header):
            reason = f"{len(row)} fields, but the header has {len(header)}"
            yield Skipped(label, reason, after, damaged=True)
        else:
            yield shape.document(dict(zip(header, row, strict=True)), label, after)


def _read_header(stream: Stream, name: str) -> tuple[list[str], str]:
    """Return the names of the columns and the delimiter; no names if the file is empty."""
    line = without_mark(stream.readline())
    while line and not line.strip():
        line = stream.readline()
    try:
        text = line.decode().strip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{on_one_line(name)}: its first line, the header, is not UTF-8; correct it") from error
    header, delimiter = _split_header(text, "\t" if split_suffix(name)[0] == ".tsv" else ",")
    return header, delimiter


def _split_header(text: str, usual: str) -> tuple[list[str], str]:
    """Split a header by the usual delimiter or, if that does not occur, by the one that gives the most columns."""
    found = {sign: next(csv.reader([text], delimiter=sign), []) for sign in (usual, *DELIMITERS)}
    delimiter = usual if len(found[usual]) > 1 else max(found, key=lambda sign: len(found[sign]))
    return found[delimiter], delimiter


def _rows(lines: _Lines, delimiter: str) -> Iterator[list[str] | str]:
    """Yield each row, or what is wrong with it; rows without any field are blank lines."""
    while True:
        lines.begin_row()
        try:
            row = next(csv.reader(lines, delimiter=delimiter), None)
        except csv.Error as error:
            yield f"not csv ({error})"
            continue
        if lines.problem:
            yield lines.problem
        elif row is None:
            return
        elif row:
            yield row


@dataclass
class _Lines:
    """The lines of a file as text, and `problem`, which says what is wrong with one of the current row."""

    stream: Stream
    problem: str = ""
    _bytes: int = 0

    def begin_row(self) -> None:
        self.problem, self._bytes = "", 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line, too_long = self.stream.line()
        if not line:
            raise StopIteration
        self._bytes += len(line)
        if too_long or self._bytes > MAX_LINE_BYTES:
            self.problem = TOO_LONG
            raise StopIteration
        try:
            return line.decode()
        except UnicodeDecodeError:
            self.problem = "not UTF-8"
            return line.decode(errors="replace")
