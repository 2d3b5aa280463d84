"""Prepare a corpus for training, once: corpus -> tokenizer -> token shards. Later calls open the result. No torch."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from shoal.config.data_options import Data, Packing
from shoal.data.corpus.documents import Corpus, CorpusFile, Cursor
from shoal.data.corpus.downloads import Downloads
from shoal.data.corpus.paths import count_kinds
from shoal.data.corpus.sources import check_marks, open_corpus, text_bytes
from shoal.data.encode import write_shards
from shoal.data.filters.filters import Filters, KeptCorpus, filter_documents
from shoal.data.instruct import ConversationEncoder, open_template
from shoal.data.packing.best_fit_rows import BestFitRows, Identity, open_index, rows_in_index
from shoal.data.packing.pack import IGNORED_LABEL, PackedStream, PlacedRows, Rows, count_rows
from shoal.data.split import Split, choose_split, training_sample
from shoal.data.stored.files import locked_folder, write_atomically
from shoal.data.stored.manifest import (
    JOURNAL,
    MANIFEST,
    SEGMENTS,
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
    name_changes,
    set_aside,
)
from shoal.data.stored.shards import CURE, Shard, token_dtype
from shoal.data.stored.stream import Stream, TokenStream
from shoal.data.token_corpus import Opened, load_record, open_recorded, prepare_token_files
from shoal.data.token_folder import find_folder, named_tokenizer, token_options
from shoal.data.tokens import tokenize
from shoal.data.tokens.tokenize import Tokenizer
from shoal.errors import DataError, TooSmallError
from shoal.system.background import in_background
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
    streams: Mapping[SplitName, Stream]
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

    @property
    def in_place(self) -> bool:
        """Whether the tokens are in other trainers' files, read in place."""
        return not any(self.counts[name].shards for name in SPLITS)

    def shards(self, name: SplitName) -> list[Shard]:
        """Return the shards of a split; none of token files that are read in place."""
        return _open_shards(self.folder, self.manifest, name)

    def split(
        self,
        name: SplitName,
        *,
        seq_len: int,
        document_mask: bool = False,
        packing: Packing = "stream",
        keep: bool = True,
    ) -> PlacedRows:
        """
        Cut a split into rows. Raises TooSmallError if it does not fill one row, or if held-out rows have nothing to learn.

        The first use of `best_fit` makes an index in the folder, under its lock; if not `keep`, only in memory.
        """
        stream = self.streams[name]
        rows: PlacedRows
        if packing == "stream":
            rows = PackedStream(stream, seq_len, document_mask)
        else:
            index = open_index(self.folder, stream, Identity(self.data_id, name, seq_len), keep=keep)
            rows = BestFitRows(stream, index, seq_len, self.tokenizer.eot_id, document_mask)
        by_text = name == "val" and not self.manifest.has_held_out_files
        cure = "raise data.val_fraction, add documents" if by_text else "add documents"
        if not len(rows):
            raise TooSmallError(
                f"the {name} split has {stream.num_tokens:,} tokens, too few for one row of data.seq_len {seq_len:,} "
                f"(+ 1); {cure} or lower data.seq_len"
            )
        if name == "val" and self.counts[name].learned_tokens < stream.num_tokens and not _has_labels(rows):
            raise TooSmallError(
                f"no learned token of the {name} split is in its rows of data.seq_len {seq_len:,}; {cure} or lower data.seq_len"
            )
        return rows


def _has_labels(rows: Rows) -> bool:
    """Return whether any row has a label: of conversations, the rest of the stream may hold the only answers."""
    return any(bool((rows.read(row).labels != IGNORED_LABEL).any()) for row in range(len(rows)))


def prepare(data: Data, progress: Progress = no_progress, *, rows: int | None = None, past: bool = False) -> Prepared:
    """
    Make the tokens that `data` asks for, or open them if they exist. Of several processes, one prepares and the others wait.

    After a kill at any moment, the next call resumes after the last finished shard and writes the same bytes.
    `data.rebuild` makes the tokens again unless they are intact and the corpus is unchanged, so repeated or
    concurrent calls rebuild once. rows: the number of rows of the model's embedding, None if unknown; a tokenizer with more
    tokens is rejected before the corpus is read. past: open tokens even if their corpus has changed since, with a note.

    Raises DataError if the tokenizer cannot be loaded, the corpus has changed, an unprepared corpus cannot be read, or a file
    cannot be written.
    """
    given = named_tokenizer(data)
    if given is not None and rows is not None:
        given.check_rows(rows)
    options = token_options(data, given)
    folder = find_folder(data, options)
    if data.corpus == "tokens":
        if given is None:
            raise DataError("a tokens corpus needs the tokenizer that made its tokens; set data.tokenizer to it")
        waits = partial(progress, "waiting for another process", 0, 0)
        return _of_token_files(folder, given, prepare_token_files(folder, data, given, options, waits))
    if not data.rebuild and (folder / MANIFEST).exists():  # before locking: the folder may be read-only
        return open_checked(folder, data, given, past=past)
    notes: list[str] = []
    with locked_folder(folder, lambda: progress("waiting for another process", 0, 0)):
        if (folder / MANIFEST).exists():
            if not data.rebuild:
                return open_checked(folder, data, given, past=past)
            notes = _make_way(folder, data, progress)
        if not (folder / MANIFEST).exists():
            notes += _build(folder, data, given, options, progress)
    return open_prepared(folder, notes, given)


def prepared_rows(data: Data) -> tuple[Manifest | None, int | None]:
    """
    Return the manifest of the tokens of `data`, and the number of training rows; None for what is not prepared yet.

    Raises DataError if the manifest or the tokenizer cannot be read.
    """
    folder = find_folder(data, token_options(data, named_tokenizer(data)))
    if data.corpus == "tokens":
        record = load_record(folder)
        manifest = None if record is None else record.manifest
    else:
        manifest = load_manifest(folder) if (folder / MANIFEST).exists() else None
    if manifest is None:
        return None, None
    if data.packing == "stream":
        return manifest, count_rows(manifest.splits["train"].tokens, data.seq_len)
    return manifest, rows_in_index(folder, Identity(manifest.data_id, "train", data.seq_len))


def open_prepared(folder: Path, notes: Sequence[str] = (), given: Tokenizer | None = None) -> Prepared:
    """
    Open finished tokens without checking their corpus.

    given: a tokenizer that is used, instead of parsing the saved one, if it is the same. Raises DataError if a file is missing or truncated, or if the manifest or tokenizer was altered.
    """
    record = load_record(folder)
    if record is not None:
        tokenizer = _saved_tokenizer(folder, record.manifest, given)
        return _of_token_files(folder, tokenizer, open_recorded(record, tokenizer))
    manifest = load_manifest(folder)
    every = (*notes, *manifest.skip_notes(), *manifest.share_notes())
    tokenizer = _saved_tokenizer(folder, manifest, given)
    return Prepared(folder, tokenizer, manifest, _shard_streams(folder, manifest), every)


def _saved_tokenizer(folder: Path, manifest: Manifest, given: Tokenizer | None) -> Tokenizer:
    path = folder / TOKENIZER
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; {CURE}") from error
    if hashlib.sha256(text).hexdigest() != manifest.tokenizer_sha256:
        raise DataError(f"{path} was altered; {CURE}")
    if given is not None and given.to_json().encode() == text:
        return given
    return tokenize.parse_tokenizer(text.decode(), str(path))


def _shard_streams(folder: Path, manifest: Manifest) -> dict[SplitName, Stream]:
    """Open every shard, so that a missing one is found now."""
    return {name: TokenStream(_open_shards(folder, manifest, name)) for name in SPLITS}


def _open_shards(folder: Path, manifest: Manifest, name: SplitName) -> list[Shard]:
    dtype = token_dtype(manifest.vocab_size)
    return [Shard(folder / record.name, record, dtype) for record in manifest.splits[name].shards]


def _of_token_files(folder: Path, tokenizer: Tokenizer, opened: Opened) -> Prepared:
    return Prepared(folder, tokenizer, opened.manifest, opened.streams, opened.notes)


def open_checked(folder: Path, data: Data, given: Tokenizer | None = None, *, past: bool = False) -> Prepared:
    """
    Open finished tokens if the corpus is unchanged. If the corpus is gone, its tokens suffice.

    given: a tokenizer that is used, instead of parsing the saved one, if it is the same. past: tokens of an earlier run, so
    a changed corpus is only a note. Raises DataError as `prepare` does.
    """
    manifest = load_manifest(folder)
    try:
        corpus = KeptCorpus(open_corpus(data, downloads_of(data, offline=True)), Filters.of(data))
    except DataError as error:
        return open_prepared(
            folder, [f"the corpus is gone or cannot be read ({error}); using its prepared tokens"], given
        )
    if not past:
        check_unchanged(manifest, corpus)
    elif changes := _changes(manifest, corpus):
        return open_prepared(folder, [f"{changes}; using its prepared tokens"], given)
    return open_prepared(folder, _notes(corpus), given)


def _changes(manifest: Manifest, corpus: Corpus) -> str:
    try:
        return name_changes(manifest, corpus)
    except DataError as error:
        return f"the corpus cannot be read ({error})"


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


def _make_way(folder: Path, data: Data, progress: Progress) -> list[str]:
    """
    Remove finished tokens, unless preparing again would give the same bytes; return what the user is told.

    Tokens of a corpus that has changed are kept in another folder. Reads every byte. Raises DataError if the corpus is gone.
    """
    corpus = KeptCorpus(open_corpus(data, downloads_of(data, progress, refresh=True)), Filters.of(data))
    notes = []
    with contextlib.suppress(DataError):
        manifest = open_prepared(folder).manifest
        if name_changes(manifest, corpus):
            aside = set_aside(folder, manifest.data_id)
            notes.append(
                f"the tokens before are kept in {aside}, for the runs that were trained on them; remove it if there are none"
            )
        elif all(sha256_of(folder / s.name) == s.sha256 for name in SPLITS for s in manifest.splits[name].shards):
            return []
    clear(folder)
    return notes


def _build(folder: Path, data: Data, given: Tokenizer | None, options: dict[str, Any], progress: Progress) -> list[str]:
    """Prepare the corpus, under the lock. Returns warnings for the user."""
    filters = Filters.of(data)
    corpus = KeptCorpus(open_corpus(data, downloads_of(data, progress)), filters)
    listing = corpus.listing()
    ticks = Ticks(listing, progress, corpus.held_out_files)
    journal = _resume_or_start(folder, options, listing)
    _check_space(folder, data, listing)
    check_marks(data, downloads_of(data, progress))
    if filters is not None:
        corpus = filter_documents(folder, corpus, filters, journal, data.shard_tokens, ticks.of("filtering"))
    split = choose_split(corpus, data.val_fraction, data.bad_records, ticks.of("reading"))
    tokenizer = _tokenizer(folder, data, given, corpus, split, ticks)
    hashed = in_background(lambda: [corpus.digest(index) for index in range(len(listing))])
    chats = None
    if data.format != "text":
        chats = ConversationEncoder(tokenizer, open_template(data), answers_only=data.learn == "answers")
    note = write_shards(
        folder, corpus, split, tokenizer, data.shard_tokens, data.bad_records, journal, ticks.of("tokens"), chats
    )
    digests = hashed.result()
    if corpus.listing() != listing:
        raise DataError("the corpus changed while it was read; start again once it no longer changes")
    manifest = finish(journal, digests, (folder / TOKENIZER).read_bytes(), tokenizer.vocab_size)
    manifest.save(folder)
    clear(folder, [JOURNAL, SEGMENTS])
    return [*_notes(corpus), *([] if note is None else [note]), *manifest.overlaps()]


def _resume_or_start(folder: Path, options: dict[str, Any], listing: list[CorpusFile]) -> Journal:
    """Return the journal of an interrupted preparation, or a new one in a cleared folder."""
    journal = load_journal(folder, options, listing)
    if journal is None:
        clear(folder)
        journal = Journal(options, listing)
        journal.save(folder)
    return journal


def _tokenizer(
    folder: Path, data: Data, given: Tokenizer | None, corpus: Corpus, split: Split, ticks: Ticks
) -> Tokenizer:
    """Return the given tokenizer, the one an interrupted preparation saved, or one trained now."""
    path = folder / TOKENIZER
    if given is not None:
        tokenizer = given
    elif path.exists():
        return tokenize.parse_tokenizer(path.read_text("utf-8"), str(path))
    else:
        tick = ticks.of("tokenizer")
        texts = training_sample(corpus, split, data.tokenizer_sample_bytes, ticks.training_bytes, tick)
        tokenizer = tokenize.train_bpe(texts, data.tokenizer_vocab_size, ticks.repeat)
    write_atomically(path, [tokenizer.to_json().encode()])
    return tokenizer


def _check_space(folder: Path, data: Data, listing: Sequence[CorpusFile]) -> None:
    """Raise DataError if the tokens cannot fit on the disk. The estimate is low, so that it rejects nothing that fits."""
    unpacked = sum(text_bytes(entry.name, entry.bytes) for entry in listing)
    needed = int(unpacked * (2 if data.tokenizer == "bytes" else 0.4))
    done = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(folder).free
        if free < needed - done:
            raise DataError(
                f"{folder} has {gigabytes(free)} free, but the tokens need about {gigabytes(needed)}; "
                "free some space or set data.folder to a larger disk"
            )


class Ticks:
    """
    Converts a place in the corpus to bytes, and calls `progress` with them.

    total: bytes of all files. training_bytes: those of files that are not held out.
    """

    def __init__(self, listing: Sequence[CorpusFile], progress: Progress, held_out_files: int) -> None:
        self._before = list(accumulate((entry.bytes for entry in listing), initial=0))
        self._progress = progress
        self._last = ("", 0)
        self.total = self._before[-1]
        self.training_bytes = self.total - self._before[held_out_files]

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
