"""
Corpora: the sources of documents, in a fixed order. No torch.

A corpus is a list of files, read as a stream of documents from any `Cursor` on. Records that are not text are in the
stream too, as `Skipped`, so that each is counted once, however often a reader restarts.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from shoal.config.data_options import Source
from shoal.data.corpus.documents import START, Corpus, CorpusFile, Cursor, Document, Reader, Skipped
from shoal.data.corpus.downloads import Downloads
from shoal.data.corpus.dummy import DummyCorpus
from shoal.data.corpus.encoding import check_text, without_mark
from shoal.data.corpus.hub_dataset import HubDatasetCorpus
from shoal.data.corpus.jsonl import jsonl_reader
from shoal.data.corpus.paths import Finder, count_kinds
from shoal.data.corpus.records import text_shape
from shoal.errors import DataError
from shoal.system.network import scheme_of
from shoal.system.output import on_one_line

DOWNLOADS = Downloads(Path("data") / "downloads")
PIECE_BYTES = 1 << 20  # longer text files become several documents, to bound memory
SINGLE_FILE_PIECES = 200  # approximate number of documents cut from a corpus of one file, so that some can be held out
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
STDLIB_SKIPPED_PREFIX = "_sysconfigdata"  # Python's build configuration, which differs between machines


def open_corpus(source: Source, downloads: Downloads = DOWNLOADS) -> Corpus:
    """
    Open the corpus that `source` names. downloads: where its remote files are or will be.

    Raises DataError if a path is missing, a file cannot be read, or there are no files.
    """
    match source.corpus:
        case "stdlib":
            return FileCorpus(_stdlib_files(), read_text_file)
        case "text":
            finder = _find_files(source, TEXT_SUFFIXES, downloads)
            return FileCorpus(finder.files(), _text_reader(finder.files()), finder.skipped())
        case "jsonl":
            finder = _find_files(source, JSONL_SUFFIXES, downloads)
            return FileCorpus(finder.files(), jsonl_reader(text_shape(source.text_key)), finder.skipped())
        case "datasets":
            return HubDatasetCorpus(source, text_shape(source.text_key), offline=downloads.offline)
        case "dummy":
            return DummyCorpus(source.dummy_documents)


NONE: Mapping[str, int] = MappingProxyType({})


class FileCorpus:
    """Files on disk, each read by `reader` from a cursor on."""

    def __init__(self, files: Sequence[tuple[str, Path]], reader: Reader, skipped: Mapping[str, int] = NONE) -> None:
        self._files = list(files)
        self._reader = reader
        self._skipped = skipped

    def skipped_files(self) -> Mapping[str, int]:
        return self._skipped

    def listing(self) -> list[CorpusFile]:
        entries = []
        for name, path in self._files:
            try:
                status = path.stat()
            except OSError as error:
                raise _cannot_read(name, error) from error
            entries.append(CorpusFile(name, status.st_size, status.st_mtime_ns))
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
    """Read a file as one document, or as several of at most `piece_bytes`, each ending at a line end if possible."""
    whole = path.stat().st_size <= piece_bytes
    index, offset = start.document, start.offset
    with path.open("rb") as file:
        file.seek(offset)
        while window := file.read(piece_bytes):
            if offset == 0:
                check_text(window, name)
            piece = window if whole else _cut(window, piece_bytes)
            begin, offset = offset, offset + len(piece)
            file.seek(offset)
            text = piece if begin else without_mark(piece)
            if text:
                index += 1
                label = name if whole else f"{name} (bytes {begin} to {offset})"
                yield _parse_piece(text, label, Cursor(start.file, index, offset))


def _parse_piece(piece: bytes, label: str, after: Cursor) -> Document | Skipped:
    if 0 in piece:
        return Skipped(f"{label}, byte {piece.index(0)}", "zero bytes, which no text has", after)
    try:
        return Document(label, piece.decode("utf-8"), after)
    except UnicodeDecodeError as error:
        return Skipped(f"{label}, byte {error.start}", "not UTF-8", after)


def _cut(window: bytes, piece_bytes: int) -> bytes:
    """Return the longest prefix of `window` that ends a paragraph, else a line, else a character."""
    if len(window) < piece_bytes:
        return window
    for ending in (b"\n\n", b"\n"):
        end = window.rfind(ending, len(window) // 2)
        if end >= 0:
            return window[: end + len(ending)]
    end = len(window)
    while end > len(window) - 4 and window[end - 1] & 0xC0 == 0x80:  # a continuation byte of UTF-8
        end -= 1
    if window[end - 1] >= 0xC0:  # first byte of a character that may be incomplete
        end -= 1
    return window[:end] or window


def _text_reader(files: Sequence[tuple[str, Path]]) -> Reader:
    """Return the reader of `text` corpora. It cuts a corpus of one file into smaller documents, so that some can be held out."""
    if len(files) > 1:
        return read_text_file
    name, path = files[0]
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _cannot_read(name, error) from error
    piece_bytes = min(PIECE_BYTES, max(MIN_PIECE_BYTES, size // SINGLE_FILE_PIECES))
    return lambda path, name, start: read_text_file(path, name, start, piece_bytes)


def _find_files(source: Source, suffixes: tuple[str, ...], downloads: Downloads) -> Finder:
    """Find the files of `data.paths`. Raises DataError if there are none or one cannot be read."""
    if not source.paths:
        raise DataError(f"a {source.corpus} corpus needs files: set data.paths")
    finder = Finder(suffixes)
    for given in source.paths:
        if scheme_of(given):
            for name, path in downloads.bring(given, suffixes):
                finder.add(name, at=path)
        else:
            finder.add(given)
    if not finder.files():
        there = f"; found {count_kinds(finder.skipped())}" if finder.skipped() else ""
        raise DataError(f"no {' or '.join(suffixes)} files in {', '.join(source.paths)}{there}; correct data.paths")
    return finder


def _stdlib_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    finder = Finder((".py",), STDLIB_SKIPPED_FOLDERS)
    finder.add(str(root))
    named = [(path.relative_to(root).as_posix(), path) for _, path in finder.files()]
    files = [(n, p) for n, p in named if n not in STDLIB_SKIPPED_FILES and not n.startswith(STDLIB_SKIPPED_PREFIX)]
    if not files:
        raise DataError("this Python has no source files; set data.corpus to text and data.paths to your files")
    return files


def _cannot_read(name: str, error: OSError) -> DataError:
    return DataError(f"cannot read {on_one_line(name)}: {error.strerror or error}; fix it or correct data.paths")
