"""Prepare a corpus for training, once: corpus -> tokenizer -> token shards. Later calls open the result. No torch."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from shoal.config.data_options import Data
from shoal.data.corpus.documents import Corpus, CorpusFile, Cursor
from shoal.data.corpus.downloads import Downloads
from shoal.data.corpus.paths import count_kinds
from shoal.data.corpus.sources import open_corpus
from shoal.data.encode import Split, choose_split, training_sample, write_shards
from shoal.data.files import exclusive_lock, make_folder, write_atomically
from shoal.data.manifest import (
    JOURNAL,
    MANIFEST,
    SPLITS,
    TOKENIZER,
    Journal,
    Manifest,
    SplitName,
    SplitRecord,
    check_unchanged,
    clear,
    finish,
    load_journal,
    load_manifest,
)
from shoal.data.pack import PackedStream, Rows
from shoal.data.shards import CURE, Shard, TokenStream, token_dtype
from shoal.data.token_folder import find_folder, named_tokenizer, token_options
from shoal.data.tokens import tokenize
from shoal.data.tokens.tokenize import Tokenizer
from shoal.errors import DataError
from shoal.run.console import Console
from shoal.system.disk import gigabytes, sha256_of

Progress = Callable[[str, int, int], None]
"""Called with (phase, bytes done, bytes in all); a total of 0 means unknown."""


def no_progress(phase: str, done_bytes: int, total_bytes: int) -> None:
    """Ignore progress."""


@dataclass(frozen=True)
class Prepared:
    """Opened tokens on disk. File sizes are checked on opening, bytes when they are first read."""

    folder: Path
    tokenizer: Tokenizer
    manifest: Manifest
    notes: tuple[str, ...] = ()  # warnings for the user

    @property
    def data_id(self) -> str:
        """A hash of the tokens' content: runs with equal ids read equal tokens."""
        return self.manifest.data_id

    @property
    def vocab_size(self) -> int:
        return self.manifest.vocab_size

    @property
    def counts(self) -> Mapping[SplitName, SplitRecord]:
        """Documents, tokens and bytes of text in each split."""
        return self.manifest.splits

    def split(self, name: SplitName, *, seq_len: int, document_mask: bool = False) -> Rows:
        """Cut a split into rows. Raises DataError if it does not fill one row."""
        stream = self.streams[name]
        rows = PackedStream(stream, seq_len, document_mask)
        if not len(rows):
            cure = "raise data.val_fraction, add documents" if name == "val" else "add documents"
            raise DataError(
                f"the {name} split has {stream.num_tokens:,} tokens, too few for one row of data.seq_len {seq_len:,} "
                f"(+ 1); {cure} or lower data.seq_len"
            )
        return rows

    @cached_property
    def streams(self) -> dict[SplitName, TokenStream]:
        dtype = token_dtype(self.vocab_size)
        return {
            name: TokenStream([Shard(self.folder / s.name, s, dtype) for s in self.counts[name].shards])
            for name in SPLITS
        }


def prepare(data: Data, progress: Progress = no_progress, *, rows: int | None = None) -> Prepared:
    """
    Make the tokens that `data` asks for, or open them if they exist. Of several processes, one prepares and the others wait.

    After a kill at any moment, the next call resumes after the last finished shard and writes the same bytes.
    `data.rebuild` makes the tokens again unless they are intact and the corpus is unchanged, so repeated or
    concurrent calls rebuild once. rows: the number of rows of the model's embedding, None if unknown; a tokenizer with more
    tokens is rejected before the corpus is read.

    Raises DataError if the tokenizer cannot be loaded, the corpus has changed, an unprepared corpus cannot be read, or a file
    cannot be written.
    """
    given = named_tokenizer(data)
    if given is not None and rows is not None:
        given.check_rows(rows)
    options = token_options(data, given)
    folder = find_folder(data, options)
    if not data.rebuild and (folder / MANIFEST).exists():  # before locking: the folder may be read-only
        return _open_checked(folder, data)
    make_folder(folder)
    with exclusive_lock(folder / ".lock", lambda: progress("waiting for another process", 0, 0)):
        if (folder / MANIFEST).exists():
            if not data.rebuild:
                return _open_checked(folder, data)
            if not _is_current(folder, data, progress):
                clear(folder)
        notes = [] if (folder / MANIFEST).exists() else _build(folder, data, given, options, progress)
    return open_prepared(folder, notes)


def prepared_manifest(data: Data) -> Manifest | None:
    """
    Return the manifest of the tokens of `data`; None if they are not prepared.

    Raises DataError if the manifest or the tokenizer cannot be read.
    """
    folder = find_folder(data, token_options(data, named_tokenizer(data)))
    return load_manifest(folder) if (folder / MANIFEST).exists() else None


def open_prepared(folder: Path, notes: Sequence[str] = ()) -> Prepared:
    """
    Open finished tokens without checking their corpus.

    Raises DataError if a file is missing or truncated, or if the manifest or tokenizer was altered.
    """
    manifest = load_manifest(folder)
    path = folder / TOKENIZER
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; {CURE}") from error
    if hashlib.sha256(text).hexdigest() != manifest.tokenizer_sha256:
        raise DataError(f"{path} was altered; {CURE}")
    skipped = [manifest.skips.note()] if manifest.skips.count else []
    tokenizer = tokenize.parse_tokenizer(text.decode(), str(path))
    prepared = Prepared(folder, tokenizer, manifest, (*notes, *skipped))
    _ = prepared.streams  # open every shard, so that a missing one is found now
    return prepared


def _open_checked(folder: Path, data: Data) -> Prepared:
    """Open finished tokens if the corpus is unchanged. If the corpus is gone, its tokens suffice."""
    manifest = load_manifest(folder)
    try:
        corpus = open_corpus(data, downloads_of(data, offline=True))
    except DataError as error:
        return open_prepared(folder, [f"the corpus is gone or cannot be read ({error}); using its prepared tokens"])
    check_unchanged(manifest, corpus)
    return open_prepared(folder, _notes(corpus))


def downloads_of(
    data: Data, progress: Progress = no_progress, *, refresh: bool = False, offline: bool = False
) -> Downloads:
    """Return where the remote files of `data` are or will be."""
    return Downloads(Path(data.folder).expanduser() / "downloads", refresh, offline, progress)


def _notes(corpus: Corpus) -> list[str]:
    """Return a line on the files that were skipped, if any."""
    files = corpus.skipped_files()
    if not files:
        return []
    count = sum(files.values())
    return [f"{count:,} file{'s were' if count > 1 else ' was'} skipped: {count_kinds(files)}"]


def _is_current(folder: Path, data: Data, progress: Progress) -> bool:
    """Return whether preparing again would give the same bytes. Reads every byte. Raises DataError if the corpus is gone."""
    corpus = open_corpus(data, downloads_of(data, progress, refresh=True))
    try:
        manifest = load_manifest(folder)
        check_unchanged(manifest, corpus)
        open_prepared(folder)
        return all(sha256_of(folder / s.name) == s.sha256 for name in SPLITS for s in manifest.splits[name].shards)
    except DataError:
        return False


def _build(folder: Path, data: Data, given: Tokenizer | None, options: dict[str, Any], progress: Progress) -> list[str]:
    """Prepare the corpus, under the lock. Returns warnings for the user."""
    corpus = open_corpus(data, downloads_of(data, progress))
    listing = corpus.listing()
    ticks = _Ticks(listing, progress)
    journal = _resume_or_start(folder, options, listing)
    _check_space(folder, data, listing)
    split = choose_split(corpus, data.val_fraction, ticks.of("reading"))
    tokenizer = _tokenizer(folder, data, given, corpus, split, ticks)
    note = write_shards(folder, corpus, split, tokenizer, data.shard_tokens, journal, ticks.of("tokens"))
    if corpus.listing() != listing:
        raise DataError("the corpus changed while it was read; start again once it no longer changes")
    digests = [corpus.digest(index) for index in range(len(listing))]
    finish(journal, digests, (folder / TOKENIZER).read_bytes(), tokenizer.vocab_size).save(folder)
    clear(folder, [JOURNAL])
    return [*_notes(corpus), *([] if note is None else [note])]


def _resume_or_start(folder: Path, options: dict[str, Any], listing: list[CorpusFile]) -> Journal:
    """Return the journal of an interrupted preparation, or a new one in a cleared folder."""
    journal = load_journal(folder, options, listing)
    if journal is None:
        clear(folder)
        journal = Journal(options, listing)
        journal.save(folder)
    return journal


def _tokenizer(
    folder: Path, data: Data, given: Tokenizer | None, corpus: Corpus, split: Split, ticks: _Ticks
) -> Tokenizer:
    """Return the given tokenizer, the one an interrupted preparation saved, or one trained now."""
    path = folder / TOKENIZER
    if given is not None:
        tokenizer = given
    elif path.exists():
        return tokenize.parse_tokenizer(path.read_text("utf-8"), str(path))
    else:
        tick = ticks.of("tokenizer")
        texts = training_sample(corpus, split, data.tokenizer_sample_bytes, ticks.total, tick)
        tokenizer = tokenize.train_bpe(texts, data.tokenizer_vocab_size, ticks.repeat)
    write_atomically(path, [tokenizer.to_json().encode()])
    return tokenizer


def _check_space(folder: Path, data: Data, listing: Sequence[CorpusFile]) -> None:
    """Raise DataError if the tokens cannot fit on the disk. The estimate is low, so that it rejects nothing that fits."""
    text_bytes = sum(entry.bytes * (3 if entry.name.endswith(".gz") else 1) for entry in listing)
    needed = int(text_bytes * (2 if data.tokenizer == "bytes" else 0.4))
    done = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(folder).free
        if free < needed - done:
            raise DataError(
                f"{folder} has {gigabytes(free)} free, but the tokens need about {gigabytes(needed)}; "
                "free some space or set data.folder to a larger disk"
            )


class _Ticks:
    """Converts a place in the corpus to bytes, and calls `progress` with them."""

    def __init__(self, listing: Sequence[CorpusFile], progress: Progress) -> None:
        self._before = list(accumulate((entry.bytes for entry in listing), initial=0))
        self._progress = progress
        self._last = ("", 0)
        self.total = self._before[-1]

    def of(self, phase: str) -> Callable[[Cursor], None]:
        """Return a function that reports the place reached in `phase`."""

        def tick(cursor: Cursor) -> None:
            done = min(self._before[cursor.file] + cursor.offset, self.total)
            self._last = (phase, done)
            if phase != "tokenizer":  # `repeat` reports that phase, from the main thread
                self.repeat()

        return tick

    def repeat(self) -> None:
        """Report the place reached last. Called repeatedly while nothing is read."""
        phase, done = self._last
        self._progress(phase, done, self.total)


def open_data(data: Data, console: Console, *, rows: int | None = None) -> Prepared:
    """Open the tokens of `data`, preparing them if needed, with progress and warnings on the console. See `prepare`."""
    with console.progress("preparing") as progress:
        prepared = prepare(data, progress, rows=rows)
    for note in prepared.notes:
        console.warn(note)
    return prepared
