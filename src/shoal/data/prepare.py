"""A corpus made ready for training: corpus -> tokenizer -> token shards, once, and then only opened. No torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from shoal.config.data_options import Data
from shoal.data.corpus.documents import Corpus, Cursor, Entry
from shoal.data.corpus.paths import describe
from shoal.data.corpus.sources import open_corpus
from shoal.data.encode import Split, choose_split, training_sample, write_shards
from shoal.data.files import exclusive_lock, make_folder, write_atomically
from shoal.data.manifest import (
    FORMAT,
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
from shoal.data.pack import Rows
from shoal.data.shards import CURE, Shard, TokenStream, token_dtype
from shoal.data.tokens import tokenize
from shoal.data.tokens.tokenize import Tokenizer
from shoal.errors import DataError
from shoal.run.console import Console
from shoal.system.disk import gigabytes, sha256_of

SAMPLE_PIECES = 32  # of a text that is too long to be taken whole
NAME_CHARACTERS = 80  # of a tokenizer's name in that of a folder: file systems take 255 in all

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how much of how many bytes; a total of 0 is not known."""


def no_progress(phase: str, done_bytes: int, total_bytes: int) -> None:
    """Says nothing."""


@dataclass(frozen=True)
class Prepared:
    """Tokens on disk, opened. Sizes are checked; bytes are when they are first read."""

    folder: Path
    tokenizer: Tokenizer
    manifest: Manifest
    notes: tuple[str, ...] = ()  # what the user should know

    @property
    def data_id(self) -> str:
        """Names the tokens by their content: runs with equal ids read equal tokens."""
        return self.manifest.data_id

    @property
    def vocab_size(self) -> int:
        return self.manifest.vocab_size

    @property
    def counts(self) -> Mapping[SplitName, SplitRecord]:
        """Documents, tokens and bytes of text of each split."""
        return self.manifest.splits

    def split(self, name: SplitName, *, seq_len: int, document_mask: bool = False) -> Rows:
        """A split in rows. Raises DataError where it does not fill one."""
        rows = Rows(self.streams[name], seq_len, document_mask, self._bytes_of_token(name))
        if not rows.num_rows:
            cure = "raise data.val_fraction, add documents" if name == "val" else "add documents"
            raise DataError(
                f"the {name} split has {rows.num_tokens:,} tokens, too few for one row of data.seq_len {seq_len:,} "
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

    def _bytes_of_token(self, name: SplitName) -> np.ndarray[Any, np.dtype[np.float64]]:
        exact = self.tokenizer.token_bytes()
        if exact is not None:
            return exact.astype(np.float64)
        counts = self.counts[name]
        return np.full(self.vocab_size, counts.text_bytes / counts.tokens)


def prepare(data: Data, progress: Progress = no_progress, *, rows: int | None = None) -> Prepared:
    """
    Make the tokens that `data` asks for, or find them made; of several processes one works, the others wait.

    Killed at any moment, the next call goes on after the last finished shard, to the same bytes.
    `data.rebuild` makes them anew, unless every byte is there and of this very corpus: that several processes
    ask for it, or one asks twice, is the same as once. `rows`, where they are known, are those of the model: a
    tokenizer that has more tokens is refused before anything is read. Raises DataError.
    """
    given = named_tokenizer(data)
    if given is not None and rows is not None:
        given.check_rows(rows)
    options = token_options(data, given)
    folder = _folder(data, options)
    if not data.rebuild and (folder / MANIFEST).exists():  # also where the folder is not ours to write
        return _open_checked(folder, data)
    make_folder(folder)
    with exclusive_lock(folder / ".lock", lambda: progress("waiting for another process", 0, 0)):
        if (folder / MANIFEST).exists():
            if not data.rebuild:
                return _open_checked(folder, data)
            if not _is_current(folder, data):
                clear(folder)
        notes = [] if (folder / MANIFEST).exists() else _build(folder, data, given, options, progress)
    return open_prepared(folder, notes)


def prepared_manifest(data: Data) -> Manifest | None:
    """What the finished tokens of `data` say of themselves; None where they are not prepared. Raises DataError."""
    folder = _folder(data, token_options(data, named_tokenizer(data)))
    return load_manifest(folder) if (folder / MANIFEST).exists() else None


def open_prepared(folder: Path, notes: Sequence[str] = ()) -> Prepared:
    """Finished tokens, without a look at their corpus. Raises DataError where something is missing or cut short."""
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
    _ = prepared.streams  # opens every shard, so that a missing one is found now
    return prepared


def held_out_text(prepared: Prepared, at_most: int | None = None) -> bytes:
    """
    The text of the val split, or about `at_most` bytes of it, for a comparison with gzip or xz.

    Raises DataError where the tokenizer does not give a text back as it was.
    """
    if at_most is not None and prepared.counts["val"].text_bytes > at_most:
        return sample_of(prepared, "val", at_most)
    text = _text(prepared, "val", [(0, prepared.streams["val"].num_tokens)])
    if len(text) != prepared.counts["val"].text_bytes:
        raise DataError("this tokenizer does not give a text back as it was: set data.tokenizer to bpe or bytes")
    return text


def sample_of(prepared: Prepared, split: SplitName, at_most: int) -> bytes:
    """A split's text; of one that is longer, about `at_most` bytes in pieces from all over it."""
    num_tokens, text_bytes = prepared.streams[split].num_tokens, prepared.counts[split].text_bytes
    if text_bytes <= at_most:
        return _text(prepared, split, [(0, num_tokens)])
    length = max(1, num_tokens * at_most // (text_bytes * SAMPLE_PIECES))
    firsts = [piece * num_tokens // SAMPLE_PIECES for piece in range(SAMPLE_PIECES)]
    return _text(prepared, split, [(first, min(first + length, num_tokens)) for first in firsts])[:at_most]


def _text(prepared: Prepared, split: SplitName, spans: Sequence[tuple[int, int]]) -> bytes:
    """The text of tokens [first, last) of each span, without what stands at the ends of documents."""
    stream, tokenizer = prepared.streams[split], prepared.tokenizer
    ends = {tokenizer.eot_id, tokenizer.bos_id}
    texts = []
    for first, last in spans:
        starts = [first, *(start for start in stream.starts(first, last).tolist() if start > first), last]
        for low in range(0, len(starts) - 1, 64):
            pieces = [stream.read(a, b).tolist() for a, b in pairwise(starts[low : low + 65])]
            texts += tokenizer.decode_batch([_between(ids, ends) for ids in pieces])
    return "".join(texts).encode()


def _between(ids: list[int], ends: set[int | None]) -> list[int]:
    first = ids[0] in ends
    return ids[first : len(ids) - (ids[-1] in ends and len(ids) > first)]


def named_tokenizer(data: Data) -> Tokenizer | None:
    """The tokenizer that `data` names; None where one is to be trained. Raises DataError."""
    return None if data.tokenizer == "bpe" else tokenize.load_tokenizer(data.tokenizer, data.kept)


def token_options(data: Data, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Everything the tokens depend on but the corpus's content; rows and their order do not belong here."""
    options: dict[str, Any] = {"format": FORMAT, "corpus": data.corpus, "val_fraction": data.val_fraction}
    options["shard_tokens"] = data.shard_tokens
    match data.corpus:
        case "stdlib":
            options["python"] = list(sys.version_info[:3])
        case "text":
            options["paths"] = list(data.paths)
        case "jsonl":
            options |= {"paths": list(data.paths), "text_key": data.text_key}
        case "dummy":
            options["dummy_documents"] = data.dummy_documents
    if tokenizer is None:  # one is trained
        options["bpe"] = [tokenize.PATTERN_VERSION, data.tokenizer_vocab_size, data.tokenizer_sample_bytes]
    else:
        options["tokenizer"] = hashlib.sha256(tokenizer.to_json().encode()).hexdigest()
        if tokenizer.bos_id is not None:
            options["bos"] = tokenizer.bos_id
    return options


def _folder(data: Data, options: dict[str, Any]) -> Path:
    """
    Where these tokens are or will be, whatever their tokenizer was called then: only options are what they depend on.

    Raises DataError where nobody can look.
    """
    own = folder_name(data, options)
    digest = own.rpartition("-")[2]
    try:
        above = Path(data.folder).expanduser()
        others = sorted(path.parent for path in above.glob(f"{data.corpus}-*-{digest}/{MANIFEST}"))
        has_own = (above / own / MANIFEST).exists()
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"cannot look into {data.folder} ({why}); set data.folder to another") from error
    return above / own if has_own or not others else others[0]


def folder_name(data: Data, options: dict[str, Any]) -> str:
    """`stdlib-bpe4096-1a2b3c4d`: to be read by people, and of its own for each set of options."""
    tokenizer = Path(data.tokenizer)
    kind = tokenizer.parent.name if tokenizer.name in ("tokenizer.json", "tokenizer.model") else tokenizer.name
    kind = f"bpe{data.tokenizer_vocab_size}" if data.tokenizer == "bpe" else re.sub(r"[^\w.]+", "_", kind)
    digest = hashlib.blake2b(json.dumps(options, sort_keys=True).encode(), digest_size=4).hexdigest()
    return f"{data.corpus}-{kind[:NAME_CHARACTERS] or 'tokenizer'}-{digest}"


def _open_checked(folder: Path, data: Data) -> Prepared:
    """Open, after a look whether the corpus is still the same. A corpus that is gone is fine: its tokens are not."""
    manifest = load_manifest(folder)
    try:
        corpus = open_corpus(data)
    except DataError as error:
        return open_prepared(
            folder, [f"the corpus is gone or cannot be read ({error}): going on with its prepared tokens"]
        )
    check_unchanged(manifest, corpus)
    return open_prepared(folder, _notes(corpus))


def _notes(corpus: Corpus) -> list[str]:
    """What was not read, in one line, if anything."""
    files = corpus.skipped_files()
    if not files:
        return []
    count = sum(files.values())
    return [f"{count:,} file{'s were' if count > 1 else ' was'} skipped: {describe(files)}"]


def _is_current(folder: Path, data: Data) -> bool:
    """Whether preparing anew would give what is there. Reads every byte; raises DataError if the corpus is gone."""
    corpus = open_corpus(data)
    try:
        manifest = load_manifest(folder)
        check_unchanged(manifest, corpus)
        open_prepared(folder)
        return all(sha256_of(folder / s.name) == s.sha256 for name in SPLITS for s in manifest.splits[name].shards)
    except DataError:
        return False


def _build(folder: Path, data: Data, given: Tokenizer | None, options: dict[str, Any], progress: Progress) -> list[str]:
    """The story of preparing, under the lock. Returns what the user should know."""
    corpus = open_corpus(data)
    listing = corpus.listing()
    ticks = _Ticks(listing, progress)
    journal = _go_on_or_start(folder, options, listing)
    _check_space(folder, data, listing)
    split = choose_split(corpus, data.val_fraction, ticks.of("reading"))
    tokenizer = _tokenizer(folder, data, given, corpus, split, ticks)
    note = write_shards(folder, corpus, split, tokenizer, data.shard_tokens, journal, ticks.of("tokens"))
    if corpus.listing() != listing:
        raise DataError("the corpus changed while it was read; start again when it is still")
    digests = [corpus.digest(index) for index in range(len(listing))]
    finish(journal, digests, (folder / TOKENIZER).read_bytes(), tokenizer.vocab_size).save(folder)
    clear(folder, [JOURNAL])
    return [*_notes(corpus), *([] if note is None else [note])]


def _go_on_or_start(folder: Path, options: dict[str, Any], listing: list[Entry]) -> Journal:
    """The journal of an interrupted preparation, or a new one in a cleared folder."""
    journal = load_journal(folder, options, listing)
    if journal is None:
        clear(folder)
        journal = Journal(options, listing)
        journal.save(folder)
    return journal


def _tokenizer(
    folder: Path, data: Data, given: Tokenizer | None, corpus: Corpus, split: Split, ticks: _Ticks
) -> Tokenizer:
    """The one that was given, the one an interrupted preparation left, or one trained now."""
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


def _check_space(folder: Path, data: Data, listing: Sequence[Entry]) -> None:
    """Refuse what cannot end well; an estimate on the low side, so that nothing is refused that would."""
    text_bytes = sum(entry.bytes * (3 if entry.name.endswith(".gz") else 1) for entry in listing)
    needed = int(text_bytes * (2 if data.tokenizer == "bytes" else 0.4))
    done = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(folder).free
        if free < needed - done:
            raise DataError(
                f"{folder} has {gigabytes(free)} free, and the tokens need about {gigabytes(needed)}; "
                "free some space or set data.folder to a larger disk"
            )


class _Ticks:
    """Turns a place in the corpus into calls of `progress`."""

    def __init__(self, listing: Sequence[Entry], progress: Progress) -> None:
        self._before = list(accumulate((entry.bytes for entry in listing), initial=0))
        self._progress = progress
        self._last = ("", 0)
        self.total = self._before[-1]

    def of(self, phase: str) -> Callable[[Cursor], None]:
        def tick(cursor: Cursor) -> None:
            done = min(self._before[cursor.file] + cursor.offset, self.total)
            self._last = (phase, done)
            if phase != "tokenizer":  # that phase is told by `repeat`, from the main thread
                self.repeat()

        return tick

    def repeat(self) -> None:
        """Say the last again, where nothing is read for a while."""
        phase, done = self._last
        self._progress(phase, done, self.total)


def open_data(data: Data, console: Console, *, rows: int | None = None) -> Prepared:
    """The tokens of `data` for a model of so many `rows`, made now where they are not there. One process makes them."""
    with console.progress("preparing") as progress:
        prepared = prepare(data, progress, rows=rows)
    for note in prepared.notes:
        console.warn(note)
    return prepared
