"""
Corpora: the sources of documents, in a fixed order. No torch.

A corpus is a list of files, read as a stream of documents from any `Cursor` on. Records that are not text are in the
stream too, as `Skipped`, so that each is counted once, however often a reader restarts.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from shoal.config.data_formats import DATASETS_FILES, format_of, split_suffix, suffixes_of
from shoal.config.data_options import Source
from shoal.data.corpus.conversations import UniqueIds, conversation_shape
from shoal.data.corpus.csv_rows import csv_reader
from shoal.data.corpus.documents import START, Corpus, CorpusFile, Cursor, Document, Reader, Skipped
from shoal.data.corpus.downloads import Downloads
from shoal.data.corpus.dummy import DummyCorpus
from shoal.data.corpus.encoding import check_suffix
from shoal.data.corpus.held_out import HeldOutFirst
from shoal.data.corpus.hub_dataset import HubDatasetCorpus
from shoal.data.corpus.json_values import json_reader
from shoal.data.corpus.jsonl import jsonl_reader
from shoal.data.corpus.paths import Finder, count_kinds
from shoal.data.corpus.records import Shape, text_shape
from shoal.data.corpus.tables import arrow_reader, parquet_reader
from shoal.data.corpus.text import PIECE_BYTES, line_reader, separated_reader, text_reader
from shoal.data.corpus.wikitext import WikiText, is_title
from shoal.errors import DataError
from shoal.system.network import scheme_of
from shoal.system.output import on_one_line

DOWNLOADS = Downloads(Path("data") / "downloads")
SINGLE_FILE_PIECES = 200  # approximate number of documents cut from a corpus of one file, so that some can be held out
MIN_PIECE_BYTES = 4096
UNPACKED_TIMES = (
    3  # about how much larger text is than its compressed file; low, for estimates that reject nothing that fits
)

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
    Open the corpus that `source` names, its held-out files first. downloads: where its remote files are or will be.

    Raises DataError if a path is missing, a file cannot be read, or there are no files.
    """
    match source.corpus:
        case "stdlib":
            return FileCorpus(_stdlib_files(), text_reader())
        case "datasets":
            return _open_dataset(source, downloads)
        case "dummy":
            return DummyCorpus(source.dummy_documents)
        case "tokens":
            raise DataError("a tokens corpus has no texts; set data.corpus to the kind of data.paths")
    finder = _find_files(source, source.paths, "data.paths", downloads)
    if not source.val_paths:
        return _of_files(source, finder.files(), finder.skipped())
    held_out = _find_files(source, source.val_paths, "data.val_paths", downloads)
    theirs = {os.path.realpath(path) for _, path in held_out.files()}
    training = [(name, path) for name, path in finder.files() if os.path.realpath(path) not in theirs]
    if not training:
        raise DataError("data.val_paths has all the files of data.paths, so none are left to train on")
    return HeldOutFirst(
        _of_files(source, held_out.files(), held_out.skipped()), _of_files(source, training, finder.skipped())
    )


def check_marks(source: Source, downloads: Downloads = DOWNLOADS) -> None:
    """
    Raise DataError if no line is `data.separator`, or with `data.wikitext` a title: the option would have no effect.

    Reads up to the first one; all documents if there is none.
    """
    if not source.separator and not source.wikitext:
        return
    separator, count = source.separator.strip(), 0
    for item in open_corpus(replace(source, separator=""), downloads).read():
        if isinstance(item, Document):
            count += 1
            if (
                is_title(item.text.partition("\n")[0])
                if source.wikitext
                else separator in map(str.strip, item.text.split("\n"))
            ):
                return
    if count and source.wikitext:
        raise DataError(
            "data.wikitext has no effect: no line is a title of WikiText, such as ` = Title = `; set it to false"
        )
    if count:
        raise DataError(f"data.separator has no effect: no line is {on_one_line(separator)}; correct or remove it")


def _open_dataset(source: Source, downloads: Downloads) -> Corpus:
    """Open the splits of a dataset that Hugging Face's library reads."""

    def opened(source: Source) -> Corpus:
        tell = None if downloads.offline else downloads.progress
        return _of_records(HubDatasetCorpus(source, _shape(source), tell), source)

    training = opened(source)
    return HeldOutFirst(opened(replace(source, split=source.val_split)), training) if source.val_split else training


def _of_files(source: Source, files: Sequence[tuple[str, Path]], skipped: Mapping[str, int]) -> Corpus:
    tables = [n for n, (name, _) in enumerate(files) if _format(source, name) in ("csv", "parquet", "arrow")]
    return _of_records(FileCorpus(files, _reader(source, files), skipped, tables), source)


def _of_records(corpus: Corpus, source: Source) -> Corpus:
    """Join the lines of WikiText, or look for repeated conversations, if the source asks for it."""
    if source.wikitext:
        return WikiText(corpus)
    return corpus if source.format == "text" else UniqueIds(corpus, source.broken_conversations == "keep")


def _shape(source: Source) -> Shape:
    if source.format != "text":
        return conversation_shape(source)
    return text_shape(source.text_key, keep_empty=source.wikitext)


NONE: Mapping[str, int] = MappingProxyType({})


class FileCorpus:
    """Files on disk, each read by `reader` from a cursor on. tables: the indices of those that have columns."""

    held_out_files = 0

    def __init__(
        self,
        files: Sequence[tuple[str, Path]],
        reader: Reader,
        skipped: Mapping[str, int] = NONE,
        tables: Sequence[int] = (),
    ) -> None:
        self._files = list(files)
        self._reader = reader
        self._skipped = skipped
        self._unseen = list(reversed(tables))

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
        if start == START:
            self._look_at_tables()
        for index in range(start.file, len(self._files)):
            yield from self._read_file(index, start if index == start.file else Cursor(index))

    def _look_at_tables(self) -> None:
        """Read the first row of each table, once: a missing column is an error now, not after hours."""
        while self._unseen:
            next(self._read_file(self._unseen[-1], START), None)
            self._unseen.pop()

    def _read_file(self, index: int, start: Cursor) -> Iterator[Document | Skipped]:
        name, path = self._files[index]
        try:
            yield from self._reader(path, name, start)
        except OSError as error:
            raise _cannot_read(name, error) from error


def _reader(source: Source, files: Sequence[tuple[str, Path]]) -> Reader:
    """Return the reader of a corpus's files, each in the format that `data.corpus` forces or that its suffix says."""
    readers = _readers(source, files)

    def read(path: Path, name: str, start: Cursor) -> Iterator[Document | Skipped]:
        forced, said = _format(source, name), format_of(name)
        items = readers[forced](path, name, start)
        return items if said in (forced, None) or forced == "text" else _with_suffix(items, said)

    return read


def _with_suffix(items: Iterator[Document | Skipped], said: str | None) -> Iterator[Document | Skipped]:
    """Add what the suffix of a file says to whatever is damaged in it: `data.corpus` forces another format."""
    hint = f"; its suffix says {said}: set data.corpus to {said}"
    try:
        for item in items:
            yield replace(item, reason=item.reason + hint) if isinstance(item, Skipped) and item.damaged else item
    except DataError as error:
        raise DataError(str(error) if f"data.corpus to {said}" in str(error) else f"{error}{hint}") from error


def _format(source: Source, name: str) -> str:
    """Return the format of a file: the one that `data.corpus` forces, or that its suffix says, or text."""
    return format_of(name) or "text" if source.corpus == "files" else source.corpus


def _readers(source: Source, files: Sequence[tuple[str, Path]]) -> Mapping[str, Reader]:
    """Return a reader for each format."""
    shape = _shape(source)
    return {
        "text": _text_reader(source, files),
        "jsonl": jsonl_reader(shape),
        "json": json_reader(shape),
        "csv": csv_reader(shape),
        "parquet": parquet_reader(shape),
        "arrow": arrow_reader(shape),
    }


def _text_reader(source: Source, files: Sequence[tuple[str, Path]]) -> Reader:
    """Return the reader of text files. It cuts a corpus of one file into smaller documents, if some are to be held out."""
    if source.wikitext:
        return line_reader()
    if source.separator:
        return separated_reader(source.separator)
    if len(files) > 1 or source.val_paths:
        return text_reader()
    name, path = files[0]
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _cannot_read(name, error) from error
    return text_reader(min(PIECE_BYTES, max(MIN_PIECE_BYTES, text_bytes(name, size) // SINGLE_FILE_PIECES)))


def text_bytes(name: str, size: int) -> int:
    """Return about how many bytes of text a file has."""
    return size * UNPACKED_TIMES if split_suffix(name)[1] else size


def _find_files(source: Source, paths: Sequence[str], option: str, downloads: Downloads) -> Finder:
    """Find the files of `paths`, the value of `option`. Raises DataError if there are none or one cannot be read."""
    if not paths:
        raise DataError(f"a {source.corpus} corpus needs files: set {option}")
    suffixes = suffixes_of(source.corpus)
    finder = Finder(suffixes, skip_files=DATASETS_FILES, option=option)
    for given in paths:
        if scheme_of(given):
            for name, path in downloads.bring(given, suffixes):
                finder.add(name, at=path)
        else:
            finder.add_all(given)
    if not finder.files():
        raise DataError(_no_files(source, paths, option, finder.skipped()))
    for name, _ in finder.files():
        check_suffix(name, split_suffix(name)[0])
    return finder


def _no_files(source: Source, paths: Sequence[str], option: str, skipped: Mapping[str, int]) -> str:
    plain = [suffix for suffix in suffixes_of(source.corpus) if not split_suffix(suffix)[1]]
    there = f"; found {count_kinds(skipped)}" if skipped else ""
    others = [suffix for suffix in skipped if format_of(f"a{suffix}") and source.corpus != "files"]
    cure = "set data.corpus to files" if others else f"correct {option}"
    return f"no {' or '.join(plain)} files in {', '.join(paths)}{there}; {cure}"


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
