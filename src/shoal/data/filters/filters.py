"""
Remove documents by length, contamination and duplication, before anything else reads the corpus. No torch.

A pass over the corpus decides about each document, in reading order, and writes segments into the folder of the tokens:
which documents it removed, and what it must remember of those it kept. After a kill it continues after the last segment.
The split, the tokenizer's training and the shards then read a corpus without the removed documents.

Documents of held-out files are not removed. The pass reads them first, so a training document that equals one is a duplicate.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.config.data_options import Source
from shoal.data.corpus.documents import START, Corpus, CorpusFile, Cursor, Document, Skipped
from shoal.data.filters.contamination import EvaluationTexts
from shoal.data.filters.near_duplicates import SLOTS, NearIndex, Signatures, signatures_of, version
from shoal.data.filters.sorted_runs import SortedRuns
from shoal.data.stored.files import write_atomically
from shoal.data.stored.manifest import JOURNAL, Filtered, Journal, segment_name
from shoal.errors import DataError

BATCH_DOCUMENTS, BATCH_BYTES = 1024, 4_000_000  # documents decided about together, which does not change the decisions
SEGMENT_BYTES_A_TOKEN = 4  # a segment is written after about a shard's text
DIGEST_BYTES = 16
EXACT, NEAR = "exact duplicate", "near duplicate"

Digests = npt.NDArray[Any]  # [documents], bytes of length DIGEST_BYTES
NO_DIGESTS: Digests = np.zeros(0, f"S{DIGEST_BYTES}")
NO_SIGNATURES: Signatures = np.zeros((0, SLOTS), np.uint32)

Removed = npt.NDArray[np.int64]  # [documents, 3]: the cursors after the removed documents, ascending
NOTHING: Removed = np.zeros((0, 3), np.int64)


@dataclass(frozen=True)
class Filters:
    """The filters of a source, and the evaluation texts that one of them reads."""

    source: Source
    evaluation: EvaluationTexts | None

    @classmethod
    def of(cls, source: Source) -> Filters | None:
        """Return a source's filters; None if it has none. Raises DataError if a file of evaluation texts is missing."""
        evaluation = EvaluationTexts(source.decontaminate, source.decontaminate_ngram) if source.decontaminate else None
        if evaluation or source.deduplicate != "none" or source.shortest_document or source.longest_document:
            return cls(source, evaluation)
        return None

    @property
    def deduplicates(self) -> bool:
        return self.source.deduplicate != "none"

    @property
    def version(self) -> int:
        """The version of the near duplicates' signatures: state of another one is of no use."""
        return version() if self.source.deduplicate == "near" else 0

    def why_alone(self, text: str, text_bytes: int) -> str | None:
        """Return why to remove a document whatever the others are; None to keep it."""
        if text_bytes < self.source.shortest_document:
            return "shorter than data.shortest_document"
        if self.source.longest_document and text_bytes > self.source.longest_document:
            return "longer than data.longest_document"
        if self.evaluation is not None and self.evaluation.touches(text):
            return f"shares {self.source.decontaminate_ngram} words with data.decontaminate"
        return None


class KeptCorpus:
    """
    A corpus without the documents that filters removed.

    Its listing ends with the evaluation texts, since the tokens depend on them too.
    """

    def __init__(self, corpus: Corpus, filters: Filters | None, removed: Removed = NOTHING) -> None:
        self._corpus, self._filters, self._removed = corpus, filters, removed
        self._evaluation = filters.evaluation if filters else None

    @property
    def held_out_files(self) -> int:
        return self._corpus.held_out_files

    def without(self, removed: Removed) -> KeptCorpus:
        """Return this corpus without some documents. removed: their cursors, ascending, int64 [documents, 3]."""
        return KeptCorpus(self._corpus, self._filters, removed)

    def listing(self) -> list[CorpusFile]:
        return [*self._corpus.listing(), *(self._evaluation.listing() if self._evaluation else ())]

    def digest(self, index: int) -> str:
        own = len(self._corpus.listing()) if self._evaluation else index + 1
        if self._evaluation is None or index < own:
            return self._corpus.digest(index)
        return self._evaluation.digest(index - own)

    def read(self, start: Cursor = START) -> Iterator[Document | Skipped]:
        removed = _Cursors(self._removed, start)
        for item in self._corpus.read(start):
            if isinstance(item, Skipped) or item.after != removed.next:
                yield item
            else:
                removed.advance()

    def skipped_files(self) -> Mapping[str, int]:
        return self._corpus.skipped_files()


class _Cursors:
    """The cursors after a place, in order."""

    def __init__(self, rows: Removed, start: Cursor) -> None:
        self._rows = rows
        low, high = 0, len(rows)
        while low < high:  # bisect: the first row after `start`
            middle = (low + high) // 2
            low, high = (middle + 1, high) if Cursor(*rows[middle].tolist()) <= start else (low, middle)
        self._at = low - 1
        self.advance()

    def advance(self) -> None:
        self._at += 1
        self.next = Cursor(*self._rows[self._at].tolist()) if self._at < len(self._rows) else None


def filter_documents(
    folder: Path,
    corpus: KeptCorpus,
    filters: Filters,
    journal: Journal,
    shard_tokens: int,
    tick: Callable[[Cursor], None],
) -> KeptCorpus:
    """
    Decide about the documents that `journal` lacks, and return the corpus of kept ones.

    Raises DataError if no document is left.
    """
    if journal.filtered.version != filters.version:
        journal.filtered = Filtered(version=filters.version)
    if not journal.filtered.done:
        _Pass(folder, filters, journal).run(corpus, SEGMENT_BYTES_A_TOKEN * shard_tokens, tick)
    found = journal.filtered
    if found.removed and not found.kept:
        why = ", ".join(f"{reason} ({removal.count:,})" for reason, removal in found.removed.items())
        raise DataError(f"the filters removed every document: {why}; change or disable them")
    removed = [_Segment.load(folder / segment_name(n)).removed for n in range(found.segments)]
    return corpus.without(np.concatenate([NOTHING, *removed]))


@dataclass(frozen=True)
class _Segment:
    """What a part of the pass found: removed documents, and digests and signatures of the kept ones."""

    removed: Removed
    digests: Digests
    signatures: Signatures

    def save(self, path: Path) -> None:
        buffer = io.BytesIO()
        for array in (self.signatures, self.removed, self.digests):
            np.save(buffer, array, allow_pickle=False)
        write_atomically(path, [buffer.getbuffer()])

    @classmethod
    def joined(cls, parts: Sequence[_Segment]) -> _Segment:
        parts = [cls(NOTHING, NO_DIGESTS, NO_SIGNATURES), *parts]
        fields = ([getattr(part, f.name) for part in parts] for f in dataclasses.fields(cls))
        return cls(*(np.concatenate(arrays) for arrays in fields))

    @classmethod
    def load(cls, path: Path) -> _Segment:
        try:
            with path.open("rb") as file:
                signatures, removed, digests = (np.load(file, allow_pickle=False) for _ in range(3))
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"cannot read {path} ({error}); remove {path.parent / JOURNAL} to filter again") from error
        return cls(removed, digests, signatures)


@dataclass(frozen=True)
class _Read:
    """A document of the pass, with its UTF-8 text. held_out: whether its file is."""

    document: Document
    encoded: bytes
    held_out: bool


def _batches(corpus: Corpus, start: Cursor) -> Iterator[list[_Read]]:
    """Yield the documents after `start`, held-out ones and others apart."""
    batch: list[_Read] = []
    batch_bytes = 0
    for item in corpus.read(start):
        if isinstance(item, Skipped):  # counted when the shards are written
            continue
        held_out = item.after.file < corpus.held_out_files
        if batch and batch[-1].held_out != held_out:
            yield batch
            batch, batch_bytes = [], 0
        batch.append(_Read(item, item.text.encode(), held_out))
        batch_bytes += len(batch[-1].encoded)
        if len(batch) == BATCH_DOCUMENTS or batch_bytes >= BATCH_BYTES:
            yield batch
            batch, batch_bytes = [], 0
    if batch:
        yield batch


class _Pass:
    """
    The state of the pass: what it remembers of earlier documents, restored from the segments.

    Memory for each document: 20 bytes for `exact`, and 212 for `near` at a threshold of 0.8. Signatures of finished
    segments stay on disk.
    """

    def __init__(self, folder: Path, filters: Filters, journal: Journal) -> None:
        self._folder, self._filters, self._journal = folder, filters, journal
        self._done = journal.filtered
        self._seen = SortedRuns()
        self._index = NearIndex(filters.source.near_threshold, self._signatures_of)
        self._parts: list[Signatures] = []  # of remembered documents in order: one array a segment, then one a batch
        self._part_starts: list[int] = []  # number of each part's first signature
        self._signed = 0  # signatures so far
        self._pending: list[_Segment] = []  # one a batch since the last segment
        for number in range(self._done.segments):
            self._restore(number)

    def run(self, corpus: Corpus, segment_bytes: int, tick: Callable[[Cursor], None]) -> None:
        """Decide about every document after the last segment."""
        read_bytes, upto = 0, self._done.upto
        for batch in _batches(corpus, upto):
            self._pending.append(self._note(batch) if batch[0].held_out else self._decide(batch))
            upto = batch[-1].document.after
            tick(upto)
            read_bytes += sum(len(item.encoded) for item in batch)
            if read_bytes >= segment_bytes:
                self._save(upto, done=False)
                read_bytes = 0
        self._save(upto, done=True)

    def _note(self, batch: Sequence[_Read]) -> _Segment:
        """Remember the texts of held-out documents, which are all kept."""
        if not self._filters.deduplicates:
            return _Segment(NOTHING, NO_DIGESTS, NO_SIGNATURES)
        digests, new = self._new_texts([item.encoded for item in batch])
        signatures = NO_SIGNATURES
        if self._filters.source.deduplicate == "near":
            signatures = signatures_of([item.document.text for item, is_new in zip(batch, new, strict=True) if is_new])
            self._index.add(signatures, self._signed)
            self._remember(signatures)
        return _Segment(NOTHING, digests, signatures)

    def _decide(self, batch: Sequence[_Read]) -> _Segment:
        """Decide about training documents, and remember those that are kept."""
        reasons = [self._filters.why_alone(item.document.text, len(item.encoded)) for item in batch]
        digests, signatures = self._deduplicate(batch, reasons) if self._filters.deduplicates else (NO_DIGESTS, None)
        removed = [item.document for item, why in zip(batch, reasons, strict=True) if why is not None]
        for item, why in zip(batch, reasons, strict=True):
            if why is not None:
                self._done.remove(why, item.document.name)
        self._done.kept += len(batch) - len(removed)
        if signatures is not None:
            self._remember(signatures)
        after = np.array([dataclasses.astuple(document.after) for document in removed], np.int64).reshape(-1, 3)
        return _Segment(after, digests, NO_SIGNATURES if signatures is None else signatures)

    def _deduplicate(self, batch: Sequence[_Read], reasons: list[str | None]) -> tuple[Digests, Signatures | None]:
        """Add the reasons of duplicates. Returns the digests of new texts, and the signatures of kept documents."""
        places = [place for place, why in enumerate(reasons) if why is None]
        digests, new = self._new_texts([batch[place].encoded for place in places])
        for place, is_new in zip(places, new, strict=True):
            reasons[place] = None if is_new else EXACT
        if self._filters.source.deduplicate != "near":
            return digests, None
        places = [place for place, is_new in zip(places, new, strict=True) if is_new]
        signatures = signatures_of([batch[place].document.text for place in places])
        near = self._index.choose(signatures, self._signed)
        for place, is_near in zip(places, near, strict=True):
            reasons[place] = NEAR if is_near else None
        return digests, signatures[~near]

    def _new_texts(self, texts: Sequence[bytes]) -> tuple[Digests, npt.NDArray[np.bool_]]:
        """Remember texts. Returns the digests of new ones, and which of the texts are new."""
        digests = np.array([_digest(text) for text in texts], f"S{DIGEST_BYTES}")
        new = np.zeros(len(texts), np.bool_)
        new[np.unique(digests, return_index=True)[1]] = True  # the first of each
        new[self._seen.find(digests)[0]] = False
        self._seen.add(digests[new], np.zeros(new.sum(), np.int32))
        return digests[new], new

    def _remember(self, signatures: Signatures) -> None:
        self._parts.append(signatures)
        self._part_starts.append(self._signed)
        self._signed += len(signatures)

    def _signatures_of(self, numbers: Sequence[int]) -> Signatures:
        """Return signatures by their numbers."""
        parts = [bisect.bisect_right(self._part_starts, number) - 1 for number in numbers]
        return np.stack([self._parts[p][n - self._part_starts[p]] for p, n in zip(parts, numbers, strict=True)])

    def _save(self, upto: Cursor, *, done: bool) -> None:
        """Write a segment, then record it. After a kill in between, the same bytes are written again."""
        number = self._done.segments
        path = self._folder / segment_name(number)
        _Segment.joined(self._pending).save(path)
        if self._filters.source.deduplicate == "near":  # the part of the file replaces those in memory
            first = len(self._parts) - len(self._pending)
            starts = self._part_starts[first:] or [self._signed]
            self._parts[first:], self._part_starts[first:] = [np.load(path, mmap_mode="r")], [starts[0]]
        self._pending = []
        self._done.upto, self._done.segments, self._done.done = upto, number + 1, done
        self._journal.save(self._folder)

    def _restore(self, number: int) -> None:
        path = self._folder / segment_name(number)
        segment = _Segment.load(path)
        self._seen.add(segment.digests, np.zeros(len(segment.digests), np.int32))
        self._index.add(segment.signatures, self._signed)
        self._remember(np.load(path, mmap_mode="r"))


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=DIGEST_BYTES).digest()
