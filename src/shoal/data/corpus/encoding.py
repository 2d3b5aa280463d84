"""Check that files have the format that their reader expects, and name the format of those that do not. No torch."""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import Final

from shoal.errors import DataError
from shoal.system.output import on_one_line

HEAD_BYTES = 4096
ZEROS = 0.1  # maximum share of zeros in a file's first bytes: UTF-16 text has more, UTF-8 text with a stray one fewer
EIGHT_BIT = 8  # minimum number of bytes that are not UTF-8 in a file's first bytes, from which on the file is in another encoding
TAR_MAGIC: Final = (257, b"ustar")

# Longest first: UTF-32's byte order mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_AS_CORPUS = "set data.corpus to {0}, or give the file the suffix .{0}"
_UNPACKS = "give the file the suffix {0}, which shoal unpacks"
_MAGIC = (
    (b"\x1f\x8b", "gzip", _UNPACKS.format(".gz")),
    (b"\x28\xb5\x2f\xfd", "zstd", _UNPACKS.format(".zst")),
    (b"\xfd7zXZ\x00", "xz", _UNPACKS.format(".xz")),
    (b"BZh91AY&SY", "bzip2", "unpack it"),
    (b"PK\x03\x04", "zip", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "7z", "unpack it"),
    (b"PAR1\x15", "Parquet", _AS_CORPUS.format("parquet")),
    (b"ARROW1\x00", "Arrow", _AS_CORPUS.format("arrow")),
    (b"\xff\xff\xff\xff", "Arrow", _AS_CORPUS.format("arrow")),
    (b"%PDF-", "PDF", "convert it"),
    (b"SQLite format 3\x00", "SQLite", "convert it"),
    (b"\x93NUMPY", "NumPy", "convert it"),
)
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib")
ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".bz2")
_PICKLE = re.compile(rb"\x80[\x02-\x05]")


def without_mark(head: bytes) -> bytes:
    """Return the start of a file without UTF-8's byte order mark."""
    return head.removeprefix(codecs.BOM_UTF8)


def check_suffix(name: str, suffix: str) -> None:
    """Raise DataError for a file that is never opened, by its suffix: pickles and archives."""
    if suffix in PICKLES:
        raise _pickle(on_one_line(name))
    if suffix in ARCHIVES:
        raise DataError(
            f"{on_one_line(name)} is an archive; unpack it, and set data.paths to its files or their folder"
        )


def check_text(head: bytes, name: str, otherwise: str = "take it out of data.paths") -> None:
    """Raise DataError if a file that begins with `head` is not UTF-8 text. otherwise: a fix to suggest besides converting it."""
    name = on_one_line(name)
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            raise _not_utf8(name, encoding, otherwise)
    _check_code(head, name)
    for magic, kind, cure in _MAGIC:
        if head.startswith(magic):
            raise DataError(f"{name} is a {kind} file, not text in UTF-8; {cure}, or {otherwise}")
    if head[TAR_MAGIC[0] :].startswith(TAR_MAGIC[1]):
        raise DataError(f"{name} is a tar file, not text in UTF-8; unpack it, or {otherwise}")
    _check_zeros(head[:HEAD_BYTES], name, otherwise)
    _check_eight_bit(head[:HEAD_BYTES], name, otherwise)


def check_magic(path: Path, name: str, kind: str, magics: tuple[bytes, ...]) -> bytes:
    """Return the first bytes of a file. Raises DataError unless they are one of `magics`, which files of this kind begin with."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if head.startswith(magics):
        return head
    name = on_one_line(name)
    if not head:
        raise DataError(f"{name} is empty, which no {kind} file is; write it again, or take it out of data.paths")
    _check_code(head, name)
    found = next((said for magic, said, _ in _MAGIC if head.startswith(magic)), None)
    if found is None and not _is_binary(head):
        found = "text"
    said = f"but a {found} file" if found else "or was damaged"
    raise DataError(
        f"{name} is not a {kind} file, {said}; set data.corpus to its format, correct its suffix, or take it out of data.paths"
    )


def _check_code(head: bytes, name: str) -> None:
    """Raise DataError for a pickle, also one in a zip file, as torch writes it."""
    zipped = head.startswith(b"PK\x03\x04") and b"/data.pkl" in head[:HEAD_BYTES]
    if _PICKLE.match(head) or zipped:
        raise _pickle(name)


def _check_zeros(start: bytes, name: str, otherwise: str) -> None:
    if start.count(0) > ZEROS * len(start):
        evens, odds = start[::2].count(0), start[1::2].count(0)
        if max(evens, odds) > 10 * min(evens, odds):
            raise _not_utf8(name, "UTF-16LE" if odds > evens else "UTF-16BE", otherwise)
        raise DataError(f"{name} is full of zero bytes, so it is not text; {otherwise}")


def _check_eight_bit(start: bytes, name: str, otherwise: str) -> None:
    """Raise DataError for text in an encoding with one byte a character; a few damaged characters in UTF-8 text are none."""
    if start.isascii():
        return
    text = start.decode("utf-8", "surrogateescape")[:-3]  # the last character may be cut
    bad = sum("\udc80" <= character <= "\udcff" for character in text)
    good = sum(character >= "\x80" for character in text) - bad
    if bad < EIGHT_BIT or good > bad or _is_binary(start):
        return
    if bad > len(text) // 3:
        raise DataError(f"{name} is not in UTF-8; convert it (iconv -f ITS-ENCODING -t UTF-8), or {otherwise}")
    windows = any(b"%c" % byte in start for byte in range(0x80, 0xA0))
    raise _not_utf8(name, "WINDOWS-1252" if windows else "ISO-8859-1", otherwise)


def _is_binary(head: bytes) -> bool:
    """Return whether bytes contain control characters that texts do not have."""
    return any(byte < 32 and byte not in b"\t\n\v\f\r\x1b" for byte in head)


def _pickle(name: str) -> DataError:
    return DataError(
        f"{name} is a pickle, which may run code when opened, so shoal never opens one; save its texts as jsonl or parquet"
    )


def _not_utf8(name: str, encoding: str, otherwise: str) -> DataError:
    said = " (Latin-1)" if encoding == "ISO-8859-1" else ""
    return DataError(
        f"{name} is in {encoding}{said}, not UTF-8; convert it (iconv -f {encoding} -t UTF-8), or {otherwise}"
    )
