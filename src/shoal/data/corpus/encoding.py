"""Check that files are UTF-8 text, and name the format of those that are not. No torch."""

from __future__ import annotations

import codecs

from shoal.errors import DataError
from shoal.system.output import on_one_line

HEAD_BYTES = 4096
ZEROS = 0.1  # maximum share of zeros in a file's first bytes: UTF-16 text has more, UTF-8 text with a stray one fewer

# Longest first: UTF-32's byte order mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_MAGIC = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"BZh91AY&SY", "bzip2"),
    (b"PK\x03\x04", "zip"),
    (b"PAR1\x15", "Parquet"),
    (b"%PDF-", "PDF"),
    (b"SQLite format 3\x00", "SQLite"),
)


def without_mark(head: bytes) -> bytes:
    """Return the start of a file without UTF-8's byte order mark."""
    return head.removeprefix(codecs.BOM_UTF8)


def check_text(head: bytes, name: str, otherwise: str = "take it out of data.paths") -> None:
    """Raise DataError if a file that begins with `head` is not UTF-8 text. otherwise: a fix to suggest besides converting it."""
    name = on_one_line(name)
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            raise _not_utf8(name, encoding, otherwise)
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            raise DataError(f"{name} is a {kind} file, not text in UTF-8; unpack or convert it, or {otherwise}")
    start = head[:HEAD_BYTES]
    if start.count(0) > ZEROS * len(start):
        evens, odds = start[::2].count(0), start[1::2].count(0)
        if max(evens, odds) > 10 * min(evens, odds):
            raise _not_utf8(name, "UTF-16LE" if odds > evens else "UTF-16BE", otherwise)
        raise DataError(f"{name} is full of zero bytes, so it is not text; {otherwise}")


def _not_utf8(name: str, encoding: str, otherwise: str) -> DataError:
    return DataError(f"{name} is in {encoding}, not UTF-8; convert it (iconv -f {encoding} -t UTF-8), or {otherwise}")
