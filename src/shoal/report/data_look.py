"""A first look at prepared data: its sources, the lengths of documents, and rows as the model reads them. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from shoal.config.options import Config
from shoal.data.dataset import Dataset, new_order
from shoal.data.document_index import find_documents, has_documents
from shoal.data.nearby_documents import SpansIn, nearby, numbered
from shoal.data.order.blend import Blend
from shoal.data.packing.best_fit_rows import Identity, rows_in_index
from shoal.data.packing.pack import IGNORED_LABEL, PlacedRows
from shoal.data.packing_report import WINDOWS, DocumentSample, PackingRecord, compare_packings, sample_documents
from shoal.data.prepare import Prepared
from shoal.data.where import Timeline
from shoal.plan.length import count_steps
from shoal.system.output import visible

BAR = 40  # columns of the histogram's longest bar


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a row: of one document, all learned or none. document: None for padding."""

    document: int | None
    learned: bool
    tokens: Sequence[int]


@dataclass(frozen=True)
class Look:
    """
    The sources of a new run, by name, opened without writing anything.

    order: of rows; its sizes are estimates where `rows` is None: of a large source whose rows are not packed yet. samples:
    documents to count. owners: the documents of some tokens, by number, or by their first token where the number is in no index.
    """

    order: Blend
    rows: Mapping[str, PlacedRows | None]
    samples: Mapping[str, DocumentSample]
    packings: Mapping[str, Sequence[PackingRecord]]
    owners: Mapping[str, SpansIn]
    is_numbered: Mapping[str, bool]


def open_look(config: Config, dataset: Dataset, ledger: Path | None = None) -> Look:
    """Open the sources. ledger: of a run, gives its order with earlier weights. Raises DataError if a source does not fill a row."""
    data = config.data
    samples = {name: sample_documents(part, "train") for name, part in dataset.parts.items()}
    packings = {name: compare_packings("train", sample, data.seq_len) for name, sample in samples.items()}
    rows = {name: _rows_as_they_are(dataset, name, samples[name].sampled) for name in dataset.parts}
    packed = {name: records[-1].rows for name, records in packings.items()}  # by best fit
    sizes = [packed[name] if found is None else len(found) for name, found in rows.items()]
    order = None if ledger is None else _order_of_run(ledger, config, dataset)
    if order is None:
        order = new_order(data, sizes, config.train.seed, config.train.global_batch)
    is_numbered = {name: has_documents(part, "train") for name, part in dataset.parts.items()}
    owners = {
        name: numbered(find_documents(part, "train")) if is_numbered[name] else nearby(part.streams["train"])
        for name, part in dataset.parts.items()
    }
    return Look(order, rows, samples, packings, owners, is_numbered)


def _order_of_run(ledger: Path, config: Config, dataset: Dataset) -> Blend | None:
    """Return the order in a run's ledger; None if there is none, or if it is of other tokens."""
    try:
        header = Timeline.of_ledger(ledger, config.train.micro_batch)[1]
    except (OSError, ValueError):
        return None
    return header.order if header.data_id == dataset.data_id else None


def _rows_as_they_are(dataset: Dataset, name: str, is_large: bool) -> PlacedRows | None:
    """Return the rows of a source; None if it is large and they are not packed yet."""
    part, data = dataset.parts[name], dataset.data
    identity = Identity(part.data_id, "train", data.seq_len)
    if is_large and data.packing == "best_fit" and rows_in_index(part.folder, identity) is None:
        return None
    return dataset.part_rows(name, "train", keep=False)


def source_table(config: Config, dataset: Dataset, look: Look) -> Table:
    """Return a table with a line for each source: its documents, tokens and bytes, and how much of it the run reads."""
    order = look.order
    steps = count_steps(config.train, config.data.seq_len, order.num_rows)
    shares = _shares(order, min(steps * config.train.global_batch, order.end))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("\nsource", overflow="fold")
    table.add_column("\nsplit")
    for name in ("\ndocuments", "\ntokens", "bytes\nper token", "\nrows", "share\nof run", "\nepochs"):
        table.add_column(name, justify="right", no_wrap=True)
    for index, (name, part) in enumerate(dataset.parts.items()):
        share, epochs = shares[index]
        about = "~" * (look.rows[name] is None)
        more = (f"{about}{order.sizes[index]:,}", f"{share:.1%}", f"{about}{epochs:.3g}")
        _add_line(table, name or config.data.corpus, part, "train", *more)
        _add_line(table, "", part, "val", "", "", "")
    return table


def _add_line(table: Table, source: str, part: Prepared, split: Any, *more: str) -> None:
    counts = part.counts[split]
    about = "~" * counts.estimated
    width = f"{about}{counts.text_bytes / max(counts.tokens, 1):.2f}"
    table.add_row(visible(source), split, f"{about}{counts.documents:,}", f"{counts.tokens:,}", width, *more)


def _shares(order: Blend, samples: float) -> list[tuple[float, float]]:
    """Return each source's share of the first samples, and how often it is read in them."""
    last = int(samples)
    # without weights, all rows are equally likely
    taken = order.taken_at(last)[0].tolist() if order.stages else [last * n / order.num_rows for n in order.sizes]
    return [(count / max(last, 1), count / size) for count, size in zip(taken, order.sizes, strict=True)]


def packing_table(config: Config, look: Look) -> tuple[str, Table]:
    """Return a title, and a table of the documents that each packing cuts, and of its padding, in the training rows of each source."""
    seq_len, found = config.data.seq_len, look.packings
    sampled = any(sample.sampled for sample in look.samples.values())
    title = f"training rows of {seq_len:,} tokens; data.packing is {config.data.packing}"
    if sampled:
        title += f"\n(~ marks estimates, from the documents in {WINDOWS} evenly spaced parts)"
    table = Table(box=None, pad_edge=False, header_style="bold")
    if config.data.sources:
        table.add_column("\nsource", overflow="fold")
    table.add_column("\npacking", no_wrap=True)
    for column in ("\nrows", "documents\ncut", "tokens\nof these", "\npadding", "tokens\nin no row"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, records in found.items():
        for record in records:
            source = [visible(name) if record.packing == "stream" else ""] if config.data.sources else []
            table.add_row(*source, record.packing, *_packing_cells(record))
    return title, table


def _packing_cells(record: PackingRecord) -> list[str]:
    documents, tokens, padding = record.shares
    exact = record.packing == "stream"  # its rows and padding follow from the number of tokens
    of_sample = "~" * record.sampled
    guessed = "" if exact else of_sample
    return [
        f"{guessed}{record.rows:,}", of_sample + documents, of_sample + tokens, guessed + padding,
        f"{guessed}{record.dropped_tokens:,}",
    ]  # fmt: skip


def histogram(sample: DocumentSample, seq_len: int) -> list[str]:
    """Return lines with the share of documents by length in tokens, in powers of two."""
    lengths, count = sample.lengths, len(sample.lengths)
    if not count:
        return ["no document begins in the tokens"]
    powers = np.bincount(np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64))
    first = int(np.flatnonzero(powers)[0])
    labels = [f"{1 << power:,} to {(2 << power) - 1:,}" for power in range(len(powers))]
    width = max(map(len, labels[first:]))
    lines = [
        f"{labels[power]:>{width}}  {'█' * max(round(BAR * number / powers.max()), number > 0):<{BAR}} {_share(number / count):>6}"
        for power, number in enumerate(powers.tolist())
        if power >= first
    ]
    longer = float((lengths > seq_len).mean())
    of = f"{count:,}" + " sampled" * sample.sampled
    return [f"tokens per document, of {of}; {longer:.1%} are longer than a row of {seq_len:,}", *lines]


def _share(share: float) -> str:
    return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def pieces(rows: PlacedRows, owners: SpansIn, row: int) -> list[Piece]:
    """Return a row in pieces. Its first token, and the first of each document, count as learned if the next one is."""
    arrays = rows.read([row])
    tokens, labels = arrays.tokens[0], arrays.labels[0]
    learned = np.concatenate([[True], labels[:-1] != IGNORED_LABEL])
    owner = np.full(len(tokens), -1, np.int64)
    at = 0
    for start, stop in rows.place(row).spans:
        for number, first, last in owners(start, stop):
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


def show_rows(dataset: Dataset, look: Look, count: int, colored: bool) -> Iterator[Text]:
    """Yield the first rows of the training, as text; what is not learned is dim or, without color, what is learned is in brackets."""
    names = list(dataset.parts)
    for position in range(int(min(count, look.order.end))):
        index, own = look.order.locate(int(look.order.rows_at(position)))
        name = names[index]
        rows = look.rows[name]
        if rows is None:
            yield Text(
                f"no rows are shown: those of {name or 'this corpus'} are not packed yet; shoal prepare packs them",
                "dim",
            )
            return
        found = pieces(rows, look.owners[name], own)
        title = f"row {own:,}" + (f" of {name}" if name else "") + f", read at position {position}"
        yield Text(f"── {title} " + "─" * max(0, 60 - len(title)), style="bold")
        called = "document" if look.is_numbered[name] else "document from token"
        yield _row_text(found, dataset.parts[name], colored, called)


def _row_text(found: Sequence[Piece], part: Prepared, colored: bool, called: str) -> Text:
    """Return the text of a row, with a line at each document's border."""
    everything = all(piece.learned for piece in found if piece.document is not None)
    text, last = Text(), None
    for piece in found:
        if piece.document is None:
            text.append(f"\n({len(piece.tokens):,} tokens of padding)", "dim")
            continue
        if piece.document != last:
            text.append(f"{'' if last is None else chr(10)}[{called} {piece.document:,}] ", "cyan")
            last = piece.document
        said = visible(part.tokenizer.decode(piece.tokens))
        if everything:
            text.append(said)
        elif colored:
            text.append(said, "green" if piece.learned else "dim")
        else:
            text.append(f"[{said}]" if piece.learned else said)
    return text
