"""Read jsonl files; each line is a record. Files of any size are streamed. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator

from shoal.data.corpus.documents import Cursor, Document, Reader, Skipped
from shoal.data.corpus.records import Shape, from_json
from shoal.data.corpus.streams import TOO_LONG, Stream, numbered_lines, stream_reader
from shoal.errors import DataError
from shoal.system.output import on_one_line


def jsonl_reader(shape: Shape) -> Reader:
    """Return a reader that makes a document of each line's record; it skips lines that are not JSON."""
    return stream_reader(lambda stream, name, start: read_lines(stream, name, start, shape))


def read_lines(stream: Stream, name: str, start: Cursor, shape: Shape) -> Iterator[Document | Skipped]:
    """Yield a document per line; blank lines are neither documents nor counted as skipped."""
    begun = start.document > 0
    for line, too_long, after in numbered_lines(stream, start):
        blank = not line or line.isspace()
        if not begun and not blank:
            _check_first_line(line.lstrip(), name)
            begun = True
        label = f"{name}:{after.document}"
        if too_long:
            yield Skipped(label, TOO_LONG, after)
        elif not blank:
            yield _parse_line(line, label, shape, after)


def _check_first_line(line: bytes, name: str) -> None:
    if line.startswith(b"["):
        raise DataError(
            f"{on_one_line(name)} begins with a JSON array, but jsonl has one object per line; set data.corpus to json, or "
            "give the file the suffix .json"
        )


def _parse_line(line: bytes, label: str, shape: Shape, after: Cursor) -> Document | Skipped:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        return Skipped(label, "not UTF-8", after, damaged=True)
    except (ValueError, RecursionError):
        many = b"\r" in line.strip()
        reason = "not JSON: its lines end with CR alone, not LF" if many else "not JSON"
        return Skipped(label, reason, after, damaged=True)
    return from_json(line, record, label, shape, after)
