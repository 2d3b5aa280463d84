"""A first look at prepared data: its sources, the lengths of documents, and rows as the model reads them. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from shoal.config.options import Config
from shoal.data.blend import Blend
from shoal.data.dataset import Dataset, new_order
from shoal.data.document_index import Documents
from shoal.data.pack import IGNORED_LABEL, PlacedRows
from shoal.data.prepare import Prepared, Progress
from shoal.data.where import Finder, Life, Timeline
from shoal.plan.length import count_steps
from shoal.system.output import visible

SAMPLED_DOCUMENTS = 20_000  # of each source, for the histogram
BAR = 40  # columns of the histogram's longest bar


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a row: of one document, all learned or none. document: None for padding."""

    document: int | None
    learned: bool
    tokens: Sequence[int]


def open_look(config: Config, dataset: Dataset, ledger: Path, progress: Progress) -> Finder:
    """Open the rows and documents of a run's sources, and its order: by its ledger, which knows earlier weights, or a new run's."""
    rows, train = dataset.rows("train"), config.train
    try:
        timeline, header = Timeline.of_ledger(ledger, train.micro_batch)
    except (OSError, ValueError):
        header = None
    if header is not None and header.data_id == dataset.data_id:
        return Finder.of(dataset, header.order, timeline, progress)
    order = new_order(config.data, rows.sizes, train.seed, train.global_batch)
    return Finder.of(dataset, order, Timeline([Life(0, 0, train.global_batch)], train.micro_batch), progress)


def source_table(config: Config, dataset: Dataset, order: Blend) -> Table:
    """Return a table with a line for each source: its documents, tokens and bytes, and how much of it the run reads."""
    steps = count_steps(config.train, config.data.seq_len, order.num_rows)
    shares = _shares(order, min(steps * config.train.global_batch, order.end))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("source", "split", "documents", "tokens", "bytes/token", "rows", "share of run", "epochs"):
        table.add_column(name, justify="left" if name in ("source", "split") else "right")
    for index, (name, part) in enumerate(dataset.parts.items()):
        share, epochs = shares[index]
        _add_line(
            table, name or config.data.corpus, part, "train", f"{order.sizes[index]:,}", f"{share:.1%}", f"{epochs:.3g}"
        )
        _add_line(table, "", part, "val", "", "", "")
    return table


def _add_line(table: Table, source: str, part: Prepared, split: Any, *more: str) -> None:
    counts = part.counts[split]
    width = f"{counts.text_bytes / max(counts.tokens, 1):.2f}"
    table.add_row(visible(source), split, f"{counts.documents:,}", f"{counts.tokens:,}", width, *more)


def _shares(order: Blend, samples: float) -> list[tuple[float, float]]:
    """Return each source's share of the first samples, and how often it is read in them."""
    last = int(samples)
    # without weights, all rows are equally likely
    taken = order.taken_at(last)[0].tolist() if order.stages else [last * n / order.num_rows for n in order.sizes]
    return [(count / max(last, 1), count / size) for count, size in zip(taken, order.sizes, strict=True)]


def histogram(documents: Documents, seq_len: int) -> list[str]:
    """Return lines with the share of documents by length in tokens, in powers of two; of many documents, a sample."""
    count = min(documents.num_documents, SAMPLED_DOCUMENTS)
    chosen = np.linspace(0, documents.num_documents - 1, count).astype(np.int64)
    lengths = np.array([stop - first for first, stop in map(documents.document_span, chosen.tolist())])
    powers = np.bincount(np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64))
    first = int(np.flatnonzero(powers)[0])
    labels = [f"{1 << power:,} to {(2 << power) - 1:,}" for power in range(len(powers))]
    width = max(map(len, labels[first:]))
    lines = [
        f"{labels[power]:>{width}}  {'█' * max(round(BAR * number / powers.max()), number > 0):<{BAR}} {number / count:6.1%}"
        for power, number in enumerate(powers.tolist())
        if power >= first
    ]
    longer = float((lengths > seq_len).mean())
    of = f"{count:,} evenly chosen" if count < documents.num_documents else f"{count:,}"
    return [f"tokens per document, of {of}; {longer:.1%} are longer than a row of {seq_len:,}", *lines]


def pieces(rows: PlacedRows, documents: Documents, row: int) -> list[Piece]:
    """Return a row in pieces. Its first token, and the first of each document, count as learned if the next one is."""
    arrays = rows.read([row])
    tokens, labels = arrays.tokens[0], arrays.labels[0]
    learned = np.concatenate([[True], labels[:-1] != IGNORED_LABEL])
    owner = np.full(len(tokens), -1, np.int64)
    at = 0
    for start, stop in rows.place(row).spans:
        for number in documents.documents_in(start, stop):
            first, last = documents.document_span(number)
            begin, end = at + max(first, start) - start, min(at + min(last, stop) - start, len(tokens))
            owner[begin:end] = number
            if begin < end:
                learned[begin] = learned[begin + 1] if begin + 1 < end else learned[begin]
        at += stop - start
    borders = np.flatnonzero((np.diff(owner) != 0) | (np.diff(learned.astype(np.int8)) != 0)) + 1
    return [
        Piece(None if owner[a] < 0 else int(owner[a]), bool(learned[a]), tokens[a:b].tolist())
        for a, b in zip([0, *borders.tolist()], [*borders.tolist(), len(tokens)], strict=True)
    ]


def show_rows(dataset: Dataset, finder: Finder, count: int, colored: bool) -> Iterator[Text]:
    """Yield the first rows of the training, as text; what is not learned is dim or, without color, what is learned is in brackets."""
    names = list(dataset.parts)
    for position in range(int(min(count, finder.order.end))):
        index, own = finder.order.locate(int(finder.order.rows_at(position)))
        name = names[index]
        found = pieces(finder.rows[name], finder.documents[name], own)
        title = f"row {own:,}" + (f" of {name}" if name else "") + f", read at position {position}"
        yield Text(f"── {title} " + "─" * max(0, 60 - len(title)), style="bold")
        yield _row_text(found, dataset.parts[name], colored)


def _row_text(found: Sequence[Piece], part: Prepared, colored: bool) -> Text:
    """Return the text of a row, with a line at each document's border."""
    everything = all(piece.learned for piece in found if piece.document is not None)
    text, last = Text(), None
    for piece in found:
        if piece.document is None:
            text.append(f"\n({len(piece.tokens):,} tokens of padding)", "dim")
            continue
        if piece.document != last:
            text.append(f"{'' if last is None else chr(10)}[document {piece.document:,}] ", "cyan")
            last = piece.document
        said = visible(part.tokenizer.decode(piece.tokens))
        if everything:
            text.append(said)
        elif colored:
            text.append(said, "green" if piece.learned else "dim")
        else:
            text.append(f"[{said}]" if piece.learned else said)
    return text
