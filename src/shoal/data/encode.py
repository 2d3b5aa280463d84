"""Documents -> token shards: on all cores, in bounded memory, resumable after a kill at any moment. No torch."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.data.corpus.documents import START, Conversation, Corpus, Cursor, Document, Skipped
from shoal.data.corpus.paths import count_kinds
from shoal.data.encoded import Encoded, Rejected
from shoal.data.instruct import ConversationEncoder
from shoal.data.manifest import SPLITS, Journal, Skips, SplitName
from shoal.data.shards import token_dtype, write_shard
from shoal.data.stream import Spans, Tokens
from shoal.data.tokens.fastokens import DifferentIdsError, FastEncoder, fast_encoder
from shoal.data.tokens.tokenize import Tokenizer
from shoal.errors import DataError
from shoal.system.background import in_background

CHUNK_BYTES = 8_000_000  # of text encoded in one task; fastokens takes a sixth longer for chunks of 2 MB
BATCH_CHARACTERS = 2_000_000  # of one call of tokenizers: its tokens take about fifty times the memory of their text
PART_CHARACTERS = 1 << 20  # longer documents are encoded in parts, for the same reason
CHUNKS_IN_FLIGHT = 4  # enough to encode while a shard is written
COMPARED_CHUNKS = 4  # fastokens and tokenizers both encode texts of one chunk in this many, the first included
COMPARED_CHARACTERS = 1 << 16  # of such a chunk, since tokenizers takes about twenty times as long

FIELDS_AT_MOST = 100  # maximum number of field names to collect, to suggest a data.text_key

Encode = Callable[[bool, Sequence["_Item"]], list[Encoded | Rejected]]
"""Encodes documents; the first argument says whether to compare the ids of two tokenizers."""


@dataclass(frozen=True, slots=True)
class _Item:
    split: SplitName
    name: str
    text: str
    text_bytes: int
    after: Cursor
    conversation: Conversation | None


def fraction_of(text: bytes) -> tuple[float, float]:
    """
    Return two numbers in [0, 1) that depend on the text alone.

    The first decides whether the text is held out, the second whether the tokenizer's training sample includes it.
    """
    digest = _digest(text)
    return tuple(int.from_bytes(half, "big") / 2**64 for half in (digest[:8], digest[8:]))  # type: ignore[return-value]


@dataclass(frozen=True)
class Split:
    """
    Assigns documents to splits. By text: those whose hash is below `border` are held out. By file: those of the first `files`.

    digests: of the texts of held-out files, to count training documents that equal one.
    """

    border: float = 0.0
    files: int = 0
    digests: frozenset[bytes] = frozenset()

    def of(self, text: bytes, after: Cursor) -> SplitName:
        """Return the split of a document. after: the cursor after it."""
        held_out = after.file < self.files if self.files else fraction_of(text)[0] < self.border
        return "val" if held_out else "train"

    def overlaps(self, text: bytes) -> bool:
        """Return whether a held-out file has a document with the text of a training document."""
        return bool(self.digests) and _digest(text) in self.digests


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=16).digest()


def choose_split(corpus: Corpus, val_fraction: float, bad_records: int, tick: Callable[[Cursor], None]) -> Split:
    """
    Return how documents are assigned to splits: by their files if the corpus has held-out files, and else by their texts.

    By text, names, order and other texts do not matter. If a split of a small corpus would be empty, it gets the text whose
    hash is nearest to the border between the splits.
    Raises DataError if a split has no documents, if there are no two different texts for two splits, or if more than
    `bad_records` records before them are damaged.
    """
    look = _FirstLook(corpus, bad_records, tick)
    if corpus.held_out_files:
        return _split_by_file(corpus, look)
    seen: set[float] = set()
    for document in look.documents():
        seen.add(fraction_of(document.text.encode())[0])
        if min(seen) < val_fraction <= max(seen):
            return Split(val_fraction)
    if not seen:
        raise DataError(f"the corpus has no documents{look.why_none()}")
    if len(seen) == 1:
        raise DataError(
            "the corpus has one document only (or copies of one), so none can be held out; add documents to data.paths, or set "
            "data.val_paths" + (f" ({look.skips.note()})" if look.skips.count else "")
        )
    # All texts are on one side of the border: move it past the nearest one.
    return Split(sorted(seen)[1] if min(seen) >= val_fraction else max(seen))


def _split_by_file(corpus: Corpus, look: _FirstLook) -> Split:
    """Read the held-out documents, and the training documents up to the first."""
    digests, has_training = set[bytes](), False
    for document in look.documents():
        has_training = document.after.file >= corpus.held_out_files
        if has_training:
            break
        digests.add(_digest(document.text.encode()))
    if not digests:
        raise DataError(f"the held-out files have no documents{look.why_none('data.val_paths')}")
    if not has_training:
        raise DataError(f"the corpus has no documents to train on{look.why_none()}")
    return Split(files=corpus.held_out_files, digests=frozenset(digests))


@dataclass
class _FirstLook:
    """Reads documents before any is encoded, and remembers what was skipped and which fields the records have instead."""

    corpus: Corpus
    bad_records: int
    tick: Callable[[Cursor], None]
    skips: Skips = field(default_factory=Skips)
    fields: Counter[str] = field(default_factory=Counter)

    def documents(self) -> Iterator[Document]:
        """Yield documents. Raises DataError if too many records are damaged."""
        for item in self.corpus.read():
            self.tick(item.after)
            if isinstance(item, Document):
                yield item
                continue
            self.skips.add(item)
            if len(self.fields) < FIELDS_AT_MOST:
                self.fields.update(item.fields)
            self.skips.check(self.bad_records)

    def why_none(self, option: str = "data.paths") -> str:
        """Return the end of the message "the corpus has no documents": what it has instead, and which option to set."""
        said = f": {self.skips.note()}" if self.skips.count else ""
        if files := self.corpus.skipped_files():
            said += f"; files that were skipped: {count_kinds(files)}"
        if not self.fields:
            return f"{said}; correct {option} or data.corpus"
        named = ", ".join(ascii(name) for name, _ in self.fields.most_common(10))  # first the fields with the most text
        return f"{said}. The records have text under {named}; set data.text_key to one of them"


def training_sample(
    corpus: Corpus, split: Split, sample_bytes: int, total_bytes: int, tick: Callable[[Cursor], None]
) -> Iterator[str]:
    """
    Yield training texts of about `sample_bytes` in all, chosen evenly over the corpus by their hash.

    total_bytes: size of the corpus without held-out files.
    """
    share, taken = sample_bytes / max(total_bytes, 1), 0
    for document in corpus.read(Cursor(corpus.held_out_files)):
        tick(document.after)
        if isinstance(document, Skipped):
            continue
        text = document.text.encode()
        if fraction_of(text)[1] >= share or split.of(text, document.after) != "train":
            continue
        taken += len(text)
        if taken > sample_bytes and taken > len(text):
            return
        yield document.text if document.conversation is None else document.conversation.words()


def write_shards(
    folder: Path,
    corpus: Corpus,
    split: Split,
    tokenizer: Tokenizer,
    shard_tokens: int,
    bad_records: int,
    journal: Journal,
    tick: Callable[[Cursor], None],
    conversations: ConversationEncoder | None = None,
) -> str | None:
    """
    Write the shards that `journal` lacks, and record each in it. Returns a warning for the user, if any.

    conversations: encodes a corpus of conversations; None for texts. Raises DataError if more than `bad_records` records are
    damaged, or if no conversation can be learned.

    A shard ends with the document that fills it, so shards do not depend on chunks or interruptions. The ids of
    fastokens, if used, are compared with those of tokenizers on some chunks. If they differ, everything is encoded again
    without fastokens.
    """

    def write(encode: Encode) -> None:
        _write(folder, corpus, split, encode, tokenizer.vocab_size, shard_tokens, bad_records, journal, tick)

    if conversations is not None:  # fastokens does not recognize special tokens
        write(partial(_encode_chats, conversations))
        if not any(written.shards for written in journal.splits.values()):
            why = "; ".join(journal.rejected.kinds("dropped"))
            raise DataError(f"no conversation can be learned: {why}; correct data.template or the data")
        return None
    note = None
    if journal.fast:
        try:
            write(partial(_encode, tokenizer, in_background(lambda: fast_encoder(tokenizer)).result))
            return None
        except DifferentIdsError as error:
            journal.start_again_without_fast(folder)
            note = (
                f"fastokens and tokenizers give different ids ({error}); the tokens were made again without fastokens"
            )
    write(partial(_encode, tokenizer, lambda: None))
    return note


def _write(
    folder: Path,
    corpus: Corpus,
    split: Split,
    encode: Encode,
    vocab_size: int,
    shard_tokens: int,
    bad_records: int,
    journal: Journal,
    tick: Callable[[Cursor], None],
) -> None:
    builders = {name: _ShardBuilder(name, folder, vocab_size, journal) for name in SPLITS}
    for items, documents in _encoded(_chunks(corpus, split, bad_records, journal), encode):
        for item, document in zip(items, documents, strict=True):
            if isinstance(document, Rejected):
                detail = f" ({document.detail})" if document.detail else ""
                journal.rejected.add(Skipped(item.name + detail, document.reason, item.after))
                continue
            journal.flaws.add_all(item.name, document.flaws, item.after)
            builder = builders[item.split]
            builder.add(document, item)
            if builder.num_tokens >= shard_tokens:
                builder.flush()
        tick(items[-1].after)
    for builder in builders.values():
        if builder.num_tokens:
            builder.flush()


def _chunks(corpus: Corpus, split: Split, bad_records: int, journal: Journal) -> Iterator[list[_Item]]:
    """Yield documents that are in no finished shard, in chunks of about CHUNK_BYTES."""
    done = {name: journal.splits[name].after for name in SPLITS}
    chunk: list[_Item] = []
    chunk_bytes = 0
    for document in corpus.read(journal.resume_at()):
        if isinstance(document, Skipped):
            journal.skips.add(document)
            journal.skips.check(bad_records)
            continue
        text = document.text.encode()
        name = split.of(text, document.after)
        if document.after <= done[name]:
            continue
        if name == "train" and split.overlaps(text):
            journal.overlap.add_all(document.name, ["equal to a held-out one"], document.after)
        counted = len(text) if document.counted_bytes is None else document.counted_bytes
        chunk.append(_Item(name, document.name, document.text, counted, document.after, document.conversation))
        chunk_bytes += len(text)
        if chunk_bytes >= CHUNK_BYTES:
            yield chunk
            chunk, chunk_bytes = [], 0
    if chunk:
        yield chunk


def _encoded(chunks: Iterator[list[_Item]], encode: Encode) -> Iterator[tuple[list[_Item], list[Encoded | Rejected]]]:
    """
    Yield each chunk with its tokens, in order.

    Two threads: while one converts Rust's tokens to arrays, the other keeps every core busy encoding.
    """
    in_flight: deque[tuple[list[_Item], Future[list[Encoded | Rejected]]]] = deque()
    with ThreadPoolExecutor(2, "encode") as executor:
        try:
            for number, items in enumerate(chunks):
                compare = number % COMPARED_CHUNKS == 0
                future = executor.submit(encode, compare, items)
                in_flight.append((items, future))
                if len(in_flight) == CHUNKS_IN_FLIGHT:
                    done, future = in_flight.popleft()
                    yield done, future.result()
            while in_flight:
                done, future = in_flight.popleft()
                yield done, future.result()
        finally:
            executor.shutdown(wait=False, cancel_futures=True)


def _encode_chats(encoder: ConversationEncoder, _compare: bool, items: Sequence[_Item]) -> list[Encoded | Rejected]:
    talks = [(item.name, item.conversation) for item in items if item.conversation is not None]
    flaws = [talk.flaws for _, talk in talks]
    encoded = encoder.encode(talks)
    return [
        replace(e, flaws=(*known, *e.flaws)) if isinstance(e, Encoded) else e
        for e, known in zip(encoded, flaws, strict=True)
    ]


def _encode(
    tokenizer: Tokenizer, opened: Callable[[], FastEncoder | None], compare: bool, items: Sequence[_Item]
) -> list[Encoded | Rejected]:
    """Return each text as tokens, with the tokens that begin and end a document. opened: waits for the encoder to be made."""
    fast = opened()
    dtype = token_dtype(tokenizer.vocab_size)
    parts = [_parts(item.text) if tokenizer.can_be_cut else [item.text] for item in items]
    flat = [part for text in parts for part in text]
    compared = COMPARED_CHARACTERS if compare else 0
    encoded = _arrays(tokenizer, flat, dtype) if fast is None else iter(fast.encode_batch(flat, compared))
    begin = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], dtype)
    end = np.array([tokenizer.eot_id], dtype)
    ids = (
        np.concatenate([begin, *(next(encoded) for _ in text), end], dtype=dtype, casting="unsafe") for text in parts
    )
    return [Encoded(next(ids), item.text_bytes) for item in items]


def _arrays(tokenizer: Tokenizer, texts: Sequence[str], dtype: np.dtype[Any]) -> Iterator[npt.NDArray[Any]]:
    code = "H" if dtype == np.uint16 else "I"
    for batch in _batches(texts):
        for ids in tokenizer.encode_batch(batch):
            yield np.frombuffer(array(code, ids), dtype)  # several times faster than np.array(ids)


def _batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield the texts, in order, in lists of about BATCH_CHARACTERS."""
    first = characters = 0
    for place, text in enumerate(texts, 1):
        characters += len(text)
        if characters >= BATCH_CHARACTERS or place == len(texts):
            yield texts[first:place]
            first, characters = place, 0


def _parts(text: str) -> list[str]:
    """Split a text into parts of at most PART_CHARACTERS, at a line end if possible."""
    parts, at = [], 0
    while len(text) - at > PART_CHARACTERS:
        end = text.rfind("\n", at, at + PART_CHARACTERS) + 1 or at + PART_CHARACTERS
        parts.append(text[at:end])
        at = end
    return [*parts, text[at:]]


@dataclass
class _ShardBuilder:
    """The shard that is being filled for a split."""

    split: SplitName
    folder: Path
    vocab_size: int
    journal: Journal
    arrays: list[Tokens] = field(default_factory=list)
    starts: array[int] = field(default_factory=lambda: array("q"))
    answers: list[Spans] = field(default_factory=list)  # one array per conversation; empty for texts
    num_tokens: int = 0
    text_bytes: int = 0
    learned_bytes: int = 0
    after: Cursor = START

    def add(self, document: Encoded, item: _Item) -> None:
        if document.answers is not None:
            self.answers.append(document.answers + self.num_tokens)
            self.learned_bytes += document.learned_bytes or 0
        self.arrays.append(document.ids)
        self.starts.append(self.num_tokens)
        self.num_tokens += len(document.ids)
        self.text_bytes += document.text_bytes
        self.after = item.after

    def flush(self) -> None:
        """Write the shard, then record it. After a kill in between, the same bytes are written again."""
        written = self.journal.splits[self.split]
        path = self.folder / f"{self.split}-{len(written.shards):05d}.safetensors"
        tokens = np.concatenate(self.arrays, dtype=token_dtype(self.vocab_size))
        answers = np.concatenate(self.answers) if self.answers else None
        starts = np.array(self.starts, np.int64)
        record = write_shard(path, tokens, starts, self.text_bytes, answers, self.learned_bytes)
        written.shards.append(record)
        written.after = self.after
        self.journal.save(self.folder)
        self.arrays, self.starts, self.answers = [], array("q"), []
        self.num_tokens, self.text_bytes, self.learned_bytes = 0, 0, 0
