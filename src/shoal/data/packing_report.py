"""Compare the packings of prepared tokens: documents cut over rows, and padding. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shoal.config.data_options import Packing
from shoal.data.best_fit import Ints, best_fit, cut_documents
from shoal.data.manifest import SPLITS, SplitName
from shoal.data.pack import count_rows
from shoal.data.prepare import Prepared


@dataclass(frozen=True)
class PackingRecord:
    """
    Counts of one packing of one split.

    cut_documents: documents whose predicted tokens are in several rows. cut_tokens: the tokens of these documents.
    padding: the share of the rows' tokens that is padding, from 0 to 1. dropped_tokens: tokens in no row.
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

    def line(self) -> str:
        """Return the record as a line for a terminal."""
        documents, tokens = (
            f"{100 * part / max(whole, 1):.1f}%"
            for part, whole in ((self.cut_documents, self.documents), (self.cut_tokens, self.tokens))
        )
        return (
            f"{self.split}, packing {self.packing}: {self.rows:,} rows; {documents} of documents ({tokens} of tokens) are "
            f"cut over several rows; {100 * self.padding:.2f}% padding"
            + (f"; {self.dropped_tokens:,} tokens in no row" if self.dropped_tokens else "")
        )


def packing_report(prepared: Prepared, seq_len: int) -> list[PackingRecord]:
    """
    Return a record for each split and packing, for rows of `seq_len` tokens.

    Reads where documents start, not their tokens: for 10 million documents some 5 s and 1 GB of memory.
    """
    records = []
    for name in SPLITS:
        starts, lengths, tokens = _documents(prepared, name)
        records += [_of_stream(name, starts, lengths, tokens, seq_len), _of_best_fit(prepared, name, lengths, seq_len)]
    return records


def _of_stream(name: SplitName, starts: Ints, lengths: Ints, tokens: int, seq_len: int) -> PackingRecord:
    rows = count_rows(tokens, seq_len)
    # A token is predicted in the row that reads the token before it.
    is_cut = starts // seq_len < (starts + np.maximum(lengths - 2, 0)) // seq_len
    dropped = max(0, tokens - 1 - rows * seq_len)
    return _record(name, "stream", rows, lengths, is_cut, padding=0.0, dropped=dropped)


def _of_best_fit(prepared: Prepared, name: SplitName, lengths: Ints, seq_len: int) -> PackingRecord:
    pieces = cut_documents(prepared.streams[name], seq_len)
    rows = best_fit(pieces.lengths, seq_len + 1)[1]
    padding = 1.0 - int(pieces.lengths.sum()) / max(rows * (seq_len + 1), 1)
    dropped = int((lengths == 1).sum())
    return _record(name, "best_fit", rows, lengths, lengths > seq_len + 1, padding=padding, dropped=dropped)


def _documents(prepared: Prepared, name: SplitName) -> tuple[Ints, Ints, int]:
    """Return the start and the length of each document, and the number of tokens."""
    stream = prepared.streams[name]
    starts = stream.starts(0, stream.num_tokens) if stream.num_tokens else np.zeros(0, np.int64)
    return starts, np.diff(starts, append=stream.num_tokens), stream.num_tokens


def _record(
    name: SplitName,
    packing: Packing,
    rows: int,
    lengths: Ints,
    is_cut: npt.NDArray[np.bool_],
    *,
    padding: float,
    dropped: int,
) -> PackingRecord:
    return PackingRecord(
        name,
        packing,
        rows,
        len(lengths),
        int(lengths.sum()),
        int(is_cut.sum()),
        int(lengths[is_cut].sum()),
        padding,
        dropped,
    )
