"""
Corpora: where documents come from, in an order that does not change. No torch.

A corpus is a list of files, read as a stream of documents from any `Cursor` on. What cannot be read as
text is part of the stream too, as `Skipped`, so that it is counted once however often a reader restarts.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from shoal.config import Data
from shoal.data.documents import START, Corpus, Cursor, Document, Entry, Reader, Skipped
from shoal.data.dummy import DummyCorpus
from shoal.data.jsonl import jsonl_reader
from shoal.errors import DataError
from shoal.output import on_one_line

PIECE_BYTES = 1 << 20  # a longer text file becomes several documents, so that memory stays bounded
SINGLE_FILE_PIECES = 200  # a corpus of one file is cut in about so many, or nothing could be held out
MIN_PIECE_BYTES = 4096

TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
STDLIB_SKIPPED_FOLDERS = frozenset({
    "test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__",
    "lib-dynload", "_bundled",
})  # fmt: skip
# Tables and generated code: many bytes, little to learn.
STDLIB_SKIPPED_FILES = frozenset({
    "html/entities.py", "locale.py", "stringprep.py", "msilib/schema.py", "msilib/sequence.py", "msilib/text.py",
})  # fmt: skip
STDLIB_SKIPPED_PREFIX = "_sysconfigdata"  # how this Python was built: differs from machine to machine


def open_corpus(data: Data) -> Corpus:
    """The corpus that `data` names. Raises DataError where a path is missing or nothing is found."""
    match data.corpus:
        case "stdlib":
            return FileCorpus(_stdlib_files(), read_text_file)
        case "text":
            files = _find_files(data, TEXT_SUFFIXES)
            return FileCorpus(files, _text_reader(files))
        case "jsonl":
            return FileCorpus(_find_files(data, JSONL_SUFFIXES), jsonl_reader(data.text_key))
        case "dummy":
            return DummyCorpus(data.dummy_documents)


class FileCorpus:
    """Files on disk, each read by `reader` from an offset on."""

    def __init__(self, files: Sequence[tuple[str, Path]], reader: Reader) -> None:
        self._files = list(files)
        self._reader = reader

    def listing(self) -> list[Entry]:
        entries = []
        for name, path in self._files:
            try:
                status = path.stat()
            except OSError as error:
                raise _cannot_read(name, error) from error
            entries.append(Entry(name, status.st_size, status.st_mtime_ns))
        return entries

    def digest(self, index: int) -> str:
        name, path = self._files[index]
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
        except OSError as error:
            raise _cannot_read(name, error) from error

    def read(self, start: Cursor = START) -> Iterator[Document | Skipped]:
        for index in range(start.file, len(self._files)):
            name, path = self._files[index]
            try:
                yield from self._reader(path, name, start if index == start.file else Cursor(index))
            except OSError as error:
                raise _cannot_read(name, error) from error


def read_text_file(
    path: Path, name: str, start: Cursor, piece_bytes: int = PIECE_BYTES
) -> Iterator[Document | Skipped]:
    """A file as one document, or as several of at most `piece_bytes` that end with a line."""
    whole = path.stat().st_size <= piece_bytes
    index, offset = start.document, start.offset
    with path.open("rb") as file:
        file.seek(offset)
        while window := file.read(piece_bytes):
            piece = window if whole else _cut(window, piece_bytes)
            offset += len(piece)
            file.seek(offset)
            index += 1
            after = Cursor(start.file, index, offset)
            label = name if whole else f"{name} (bytes {offset - len(piece)} to {offset})"
            try:
                yield Document(label, piece.decode("utf-8"), after)
            except UnicodeDecodeError as error:
                yield Skipped(label, f"not UTF-8 ({error.reason} at byte {error.start})", after)


def _cut(window: bytes, piece_bytes: int) -> bytes:
    """The longest start of `window` that ends a paragraph, else a line, else a character."""
    if len(window) < piece_bytes:
        return window
    for ending in (b"\n\n", b"\n"):
        end = window.rfind(ending, len(window) // 2)
        if end >= 0:
            return window[: end + len(ending)]
    end = len(window)
    while end > len(window) - 4 and window[end - 1] & 0xC0 == 0x80:  # a continuation byte of UTF-8
        end -= 1
    if window[end - 1] >= 0xC0:  # the first byte of a character that may not be complete
        end -= 1
    return window[:end] or window


def _text_reader(files: Sequence[tuple[str, Path]]) -> Reader:
    """For `text`: a single file is cut finer, so that some of it can be held out."""
    if len(files) > 1:
        return read_text_file
    size = files[0][1].stat().st_size
    piece_bytes = min(PIECE_BYTES, max(MIN_PIECE_BYTES, size // SINGLE_FILE_PIECES))
    return lambda path, name, start: read_text_file(path, name, start, piece_bytes)


def _find_files(data: Data, suffixes: tuple[str, ...]) -> list[tuple[str, Path]]:
    """(name, path) of every file: a named file whatever its suffix, a folder's by suffix, sorted."""
    if not data.paths:
        raise DataError(f"a {data.corpus} corpus needs files: set data.paths")
    found: dict[str, Path] = {}
    for given in data.paths:
        path = Path(given).expanduser()
        if path.is_file():
            found[given] = path
        elif path.is_dir():
            found.update((os.path.join(given, name), path / name) for name in _walk(path, suffixes))
        else:
            raise DataError(f"no such file or folder: {on_one_line(given)}; correct data.paths")
    if not found:
        raise DataError(f"no {' or '.join(suffixes)} files in {', '.join(data.paths)}; correct data.paths")
    return list(found.items())


def _walk(root: Path, suffixes: tuple[str, ...], skip: frozenset[str] = frozenset()) -> list[str]:
    """Relative names, sorted, without hidden files and folders."""
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
        relative = Path(folder).relative_to(root)
        names += [(relative / f).as_posix() for f in files if f.endswith(suffixes) and not f.startswith(".")]
    return sorted(names)


def _stdlib_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    names = [
        name
        for name in _walk(root, (".py",), STDLIB_SKIPPED_FOLDERS)
        if name not in STDLIB_SKIPPED_FILES and not name.startswith(STDLIB_SKIPPED_PREFIX)
    ]
    if not names:
        raise DataError("this Python comes without its source: set data.corpus to text and data.paths to your files")
    return [(name, root / name) for name in names]


def _cannot_read(name: str, error: OSError) -> DataError:
    return DataError(f"cannot read {on_one_line(name)}: {error.strerror or error}; mend it or correct data.paths")
