"""Documents -> token shards: on all cores, in bounded memory, resumable after a kill at any moment. No torch."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.data.corpus.documents import START, Conversation, Corpus, Cursor, Skipped
from shoal.data.instruct import NOT_A_PREFIX, ConversationEncoder
from shoal.data.split import Split
from shoal.data.stored.encoded import Encoded, Rejected
from shoal.data.stored.manifest import SPLITS, Journal, SplitName
from shoal.data.stored.shards import token_dtype, write_shard
from shoal.data.stored.stream import Spans, Tokens
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
            alike = ", which must begin an answer as its add_generation_prompt does," if NOT_A_PREFIX in why else ""
            raise DataError(f"no conversation can be learned: {why}; correct data.template{alike} or the data")
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
