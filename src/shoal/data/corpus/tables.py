"""Read parquet and Arrow files with pyarrow, a batch of rows at a time and only the columns needed. No torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shoal.data.corpus.documents import LOST_PART, Cursor, Document, Reader, Skipped
from shoal.data.corpus.encoding import check_magic
from shoal.data.corpus.extra import import_extra
from shoal.data.corpus.records import Shape, check_columns
from shoal.errors import DataError
from shoal.system.output import on_one_line

BATCH_BYTES = 1 << 23  # approximate size of the batches that are read from a parquet file
MAX_BATCH_ROWS = 4096
BUFFER_BYTES = 1 << 20  # a parquet column is read in pieces of this size, not a whole row group at once
ARROW_FILE_MAGIC, ARROW_STREAM_MAGIC = b"ARROW1", b"\xff\xff\xff\xff"


@dataclass(frozen=True)
class _Batch:
    """
    Some rows of a table: the number of the first, how many they are, and their share [begin, end) of the file's bytes.

    rows is None if they are damaged; `problem` says how. counts_as: the number of damaged records; None for `count`.
    """

    first: int
    count: int
    begin: int
    end: int
    rows: Any = None
    problem: str = ""
    counts_as: int | None = None


def parquet_reader(shape: Shape) -> Reader:
    """Return a reader that makes a document of each row. Raises DataError if a column is missing or the file is not parquet."""

    def reader(path: Path, name: str, start: Cursor) -> Iterator[Document | Skipped]:
        parquet = import_extra("pyarrow.parquet", name)
        check_magic(path, name, "parquet", (b"PAR1",))
        with path.open("rb") as raw:
            file = _open(lambda: parquet.ParquetFile(raw, buffer_size=BUFFER_BYTES, pre_buffer=False), name)
            check_columns(file.schema_arrow.names, shape, name)
            yield from _documents(_row_groups(file, start.document, shape), name, start, shape)

    return reader


def arrow_reader(shape: Shape) -> Reader:
    """Return a reader of Arrow IPC files and streams. Raises DataError if a column is missing or the file is not Arrow."""

    def reader(path: Path, name: str, start: Cursor) -> Iterator[Document | Skipped]:
        ipc, arrow = import_extra("pyarrow.ipc", name), import_extra("pyarrow", name)
        head = check_magic(path, name, "arrow", (ARROW_FILE_MAGIC, ARROW_STREAM_MAGIC))
        is_file = head.startswith(ARROW_FILE_MAGIC)
        open_ipc = ipc.open_file if is_file else ipc.open_stream
        # not mapped to memory: a file that shrinks while it is read would end the process by SIGBUS
        with closing(arrow.OSFile(str(path))) as source:
            schema = _open(lambda: open_ipc(source).schema, name)
            check_columns(schema.names, shape, name)
            source.seek(0)
            wanted = [n for n, column in enumerate(schema.names) if shape.columns is None or column in shape.columns]
            opened = _open(lambda: open_ipc(source, options=ipc.IpcReadOptions(included_fields=wanted)), name)
            batches = _file_batches(opened, source.size()) if is_file else _stream_batches(opened, source)
            yield from _documents(batches, name, start, shape)

    return reader


def _open(open_file: Callable[[], Any], name: str) -> Any:
    """Call `open_file`, and turn an error of pyarrow into a DataError."""
    try:
        return open_file()
    except _errors() as error:
        raise DataError(
            f"{on_one_line(name)} cannot be opened ({_first_line(error)}), so it is damaged or was cut short; fetch or write it "
            "again, or take it out of data.paths"
        ) from error


def _errors() -> tuple[type[Exception], ...]:
    """Return the errors that pyarrow raises for damaged data. It raises OSError for some."""
    return (import_extra("pyarrow", "a table").ArrowException, OSError, ValueError)


def _first_line(error: Exception) -> str:
    """Return what an error of pyarrow says. Raises it again if it is one of the operating system."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    return on_one_line(str(error).partition("\n")[0])


def _row_groups(file: Any, start: int, shape: Shape) -> Iterator[_Batch]:
    """Yield the batches of the row groups that end after row `start`."""
    first = end = 0
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        begin, end = end, end + sum(group.column(c).total_compressed_size for c in range(group.num_columns))
        if first + group.num_rows > start:
            yield from _row_group(file, number, _Batch(first, group.num_rows, begin, end), shape)
        first += group.num_rows


def _row_group(file: Any, number: int, whole: _Batch, shape: Shape) -> Iterator[_Batch]:
    """Yield a row group in batches; after damage, one batch without rows for the rest of the group."""
    columns = None if shape.columns is None else list(shape.columns)
    done = 0
    try:
        for rows in file.iter_batches(_batch_rows(file, number, columns), [number], columns, use_threads=False):
            yield _part(whole, done, len(rows), rows)
            done += len(rows)
    except _errors() as error:
        yield _part(whole, done, whole.count - done, None, f"damaged parquet ({_first_line(error)})")


def _part(whole: _Batch, done: int, count: int, rows: Any, problem: str = "") -> _Batch:
    """Return `count` rows of a batch, after the first `done`."""
    begin, end = (whole.begin + (whole.end - whole.begin) * n // max(whole.count, 1) for n in (done, done + count))
    return _Batch(whole.first + done, count, begin, end, rows, problem)


def _batch_rows(file: Any, number: int, columns: list[str] | None) -> int:
    """Return the number of rows that have about BATCH_BYTES in the columns needed."""
    group = file.metadata.row_group(number)
    chunks = [group.column(column) for column in range(group.num_columns)]
    size: int = sum(
        c.total_uncompressed_size for c in chunks if columns is None or c.path_in_schema.split(".")[0] in columns
    )
    return max(1, min(MAX_BATCH_ROWS, BATCH_BYTES * int(group.num_rows) // max(size, 1)))


def _file_batches(file: Any, size: int) -> Iterator[_Batch]:
    first, total = 0, file.num_record_batches
    for number in range(total):
        batch = _checked(functools.partial(file.get_batch, number), first, size * number // total)
        yield replace(batch, end=size * (number + 1) // total)
        first += batch.count


def _stream_batches(stream: Any, source: Any) -> Iterator[_Batch]:
    """Yield the batches of a stream. Nothing after a damaged one can be found."""
    first = 0
    while True:
        begin = source.tell()
        try:
            batch = _checked(stream.read_next_batch, first, begin)
        except StopIteration:
            return
        lost = LOST_PART if batch.problem else None
        yield replace(batch, end=source.tell(), counts_as=lost)
        if batch.problem:
            return
        first += batch.count


def _checked(read: Callable[[], Any], first: int, begin: int) -> _Batch:
    """
    Return a batch of Arrow data after a check of its offsets, which come from the file and could point anywhere.

    A damaged batch has the number of one row, but counts as the records that it may have had. Text that is not UTF-8 is left to
    `_records`, which names its row.
    """
    try:
        rows = read()
    except _errors() as error:
        return _Batch(first, 1, begin, begin, None, f"damaged Arrow data ({_first_line(error)})", LOST_PART)
    try:
        rows.validate(full=True)
    except ValueError as error:
        if "utf8" not in str(error).lower():
            return _Batch(first, 1, begin, begin, None, f"damaged Arrow data ({_first_line(error)})", len(rows))
    return _Batch(first, len(rows), begin, begin, rows)


def _documents(batches: Iterator[_Batch], name: str, start: Cursor, shape: Shape) -> Iterator[Document | Skipped]:
    """Yield the documents of the rows from `start` on."""
    for batch in batches:
        last = batch.first + batch.count
        if last <= start.document:
            continue
        if batch.rows is None:
            label = f"{name}, rows {batch.first + 1} to {last}"
            counts_as = batch.count if batch.counts_as is None else batch.counts_as
            yield Skipped(label, batch.problem, Cursor(start.file, last, batch.end), damaged=counts_as)
            continue
        dropped = max(0, start.document - batch.first)
        for number, record in enumerate(_records(batch.rows.slice(dropped)), dropped + 1):
            label = f"{name}, row {batch.first + number}"
            offset = batch.begin + (batch.end - batch.begin) * number // batch.count
            after = Cursor(start.file, batch.first + number, offset)
            if record is None:
                yield Skipped(label, "not UTF-8", after, damaged=True)
            else:
                yield shape.document(record, label, after)


def _records(rows: Any) -> Iterator[dict[str, Any] | None]:
    """Yield each row as Python values; None for a row whose text is not UTF-8."""
    names = rows.schema.names
    try:
        columns = [column.to_pylist() for column in rows.columns]
    except UnicodeDecodeError:
        if len(rows) == 1:
            yield None
            return
        for number in range(len(rows)):
            yield from _records(rows.slice(number, 1))
        return
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))
