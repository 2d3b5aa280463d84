"""Compare the packings of prepared tokens: documents cut over rows, and padding. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shoal.config.data_options import Packing
from shoal.data.packing.best_fit import Ints, best_fit, pieces_of
from shoal.data.packing.pack import count_rows
from shoal.data.prepare import Prepared
from shoal.data.stored.manifest import SPLITS, SplitName
from shoal.data.stored.stream import Stream

WINDOWS = 64  # parts of a sample
WINDOW_TOKENS = 1 << 20
SAMPLED_DOCUMENTS = 400_000  # of a sample, about: packing them takes half a second
AHEAD_TOKENS = 1 << 24  # searched for the end of a window's last document


@dataclass(frozen=True)
class PackingRecord:
    """
    Counts of one packing of one split.

    cut_documents: documents whose predicted tokens are in several rows. cut_tokens: the tokens of these documents.
    padding: the share of the rows' tokens that is padding, from 0 to 1. dropped_tokens: tokens in no row.
    sampled: whether the documents and tokens, and rows of `best_fit` scaled to all tokens, are those of a sample.
    """

    split: SplitName
    packing: Packing
    rows: int
    documents: int
    tokens: int
    cut_documents: int
    cut_tokens: int
    padding: float
    dropped_tokens: int
    sampled: bool = False

    @property
    def shares(self) -> tuple[str, str, str]:
        """The documents cut, their tokens, and the padding, in percent."""
        documents, tokens = (
            f"{100 * part / max(whole, 1):.1f}%"
            for part, whole in ((self.cut_documents, self.documents), (self.cut_tokens, self.tokens))
        )
        return documents, tokens, f"{100 * self.padding:.2f}%"

    def line(self) -> str:
        """Return the record as a line for a terminal."""
        documents, tokens, padding = self.shares
        return (
            f"{self.split}, packing {self.packing}: {self.rows:,} rows; {documents} of documents ({tokens} of tokens) are "
            f"cut over several rows; {padding} padding"
            + (f"; {self.dropped_tokens:,} tokens in no row" if self.dropped_tokens else "")
        )


@dataclass(frozen=True)
class DocumentSample:
    """Start and length of documents, [documents], in tokens. in_all: tokens of the split. sampled: whether it has other documents."""

    starts: Ints
    lengths: Ints
    in_all: int
    sampled: bool


def packing_report(prepared: Prepared, seq_len: int, splits: Sequence[SplitName] = SPLITS) -> list[PackingRecord]:
    """
    Return a record for each split and packing, for rows of `seq_len` tokens.

    Reads where documents start, not their tokens: for 10 million documents some 5 s and 1 GB of memory.
    """
    return [record for name in splits for record in compare_packings(name, _all(prepared.streams[name]), seq_len)]


def sample_documents(prepared: Prepared, split: SplitName) -> DocumentSample:
    """
    Return all documents of a split; of a large one, those that start in evenly spaced windows.

    So the time does not grow with the corpus.
    """
    stream, count = prepared.streams[split], prepared.counts[split].documents
    total = stream.num_tokens
    size = min(WINDOW_TOKENS, SAMPLED_DOCUMENTS * total // max(count, 1) // WINDOWS)
    if total <= 2 * WINDOWS * size:
        return _all(stream)
    begins = np.linspace(0, total - size, WINDOWS).astype(np.int64).tolist()
    starts, lengths = zip(*(_window(stream, low, low + size) for low in begins), strict=True)
    return DocumentSample(np.concatenate(starts), np.concatenate(lengths), total, sampled=True)


def compare_packings(name: SplitName, documents: DocumentSample, seq_len: int) -> list[PackingRecord]:
    """Return a record for each packing of a split, for rows of `seq_len` tokens."""
    return [_of_stream(name, documents, seq_len), _of_best_fit(name, documents, seq_len)]


def _of_stream(name: SplitName, documents: DocumentSample, seq_len: int) -> PackingRecord:
    starts, lengths, tokens = documents.starts, documents.lengths, documents.in_all
    rows = count_rows(tokens, seq_len)
    # A token is predicted in the row that reads the token before it.
    is_cut = starts // seq_len < (starts + np.maximum(lengths - 2, 0)) // seq_len
    return PackingRecord(
        name, "stream", rows, len(lengths), int(lengths.sum()), int(is_cut.sum()), int(lengths[is_cut].sum()),
        padding=0.0, dropped_tokens=max(0, tokens - 1 - rows * seq_len), sampled=documents.sampled,
    )  # fmt: skip


def _of_best_fit(name: SplitName, documents: DocumentSample, seq_len: int) -> PackingRecord:
    lengths = documents.lengths
    pieces = pieces_of(documents.starts, lengths, seq_len)
    rows = best_fit(pieces.lengths, seq_len + 1)[1]
    padding = 1.0 - int(pieces.lengths.sum()) / max(rows * (seq_len + 1), 1)
    is_cut, dropped = lengths > seq_len + 1, int((lengths == 1).sum())
    if documents.sampled:
        scale = documents.in_all / max(int(lengths.sum()), 1)
        rows, dropped = round(rows * scale), round(dropped * scale)
    return PackingRecord(
        name, "best_fit", rows, len(lengths), int(lengths.sum()), int(is_cut.sum()), int(lengths[is_cut].sum()),
        padding=padding, dropped_tokens=dropped, sampled=documents.sampled,
    )  # fmt: skip


def _all(stream: Stream) -> DocumentSample:
    total = stream.num_tokens
    starts = stream.starts(0, total) if total else np.zeros(0, np.int64)
    return DocumentSample(starts, np.diff(starts, append=total), total, sampled=False)


def _window(stream: Stream, low: int, high: int) -> tuple[Ints, Ints]:
    """Return start and length of the documents that start in tokens [low, high): so long ones are no less likely than short ones."""
    starts = stream.starts(low, high)
    return starts, np.diff(starts, append=_next_start(stream, high)) if len(starts) else starts


def _next_start(stream: Stream, at: int) -> int:
    """Return the first document's start from `at` on, or the end of the stream, or of the tokens that are searched for it."""
    stop = min(at + AHEAD_TOKENS, stream.num_tokens)
    for low in range(at, stop, WINDOW_TOKENS):
        if len(found := stream.starts(low, min(low + WINDOW_TOKENS, stop))):
            return int(found[0])
    return stop
