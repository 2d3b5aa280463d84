"""Best-fit packing, compared with the textbook's algorithm and with the documents."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from shoal.data.packing import best_fit_rows
from shoal.data.packing.best_fit import best_fit, cut_documents
from shoal.data.packing.best_fit_rows import BestFitRows, Identity, open_index, rows_in_index
from shoal.data.packing.pack import IGNORED_LABEL, PackedStream, PlacedRows
from shoal.data.packing_report import WINDOW_TOKENS, compare_packings, packing_report, sample_documents
from shoal.data.prepare import Prepared, prepare, prepared_rows
from shoal.data.stored.shards import Shard, write_shard
from shoal.data.stored.stream import TokenStream
from shoal.errors import DataError, UnreadableError
from tests.data.conftest import MakeData

PAD = 7


def textbook(lengths: list[int], capacity: int) -> list[int]:
    """Return the free room of each row, placing one piece after the other."""
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [left for left in room if left >= length]
        if fits:
            room.remove(min(fits))
        room.append((min(fits) if fits else capacity) - length)
    return sorted(room)


def make_stream(folder: Path, lengths: list[int], per_shard: int = 5) -> TokenStream:
    """Write documents whose tokens are all different, so that each token's place can be told."""
    shards, token = [], 100
    for number, part in enumerate(_batched(lengths, per_shard)):
        tokens = np.arange(token, token + sum(part), dtype=np.uint16)
        starts = np.cumsum([0, *part[:-1]]).astype(np.int64)
        record = write_shard(folder / f"{number}.safetensors", tokens, starts, 0)
        shards.append(Shard(folder / f"{number}.safetensors", record, np.dtype(np.uint16)))
        token += sum(part)
    return TokenStream(shards)


def _batched(items: list[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(items[at : at + size]) for at in range(0, len(items), size)]


@pytest.mark.parametrize("capacity", [2, 3, 7, 30])
def test_rows_are_as_full_as_those_of_the_textbook(capacity: int) -> None:
    draw = np.random.default_rng(capacity)
    for count in (0, 1, 5, 60, 200):
        lengths = draw.integers(1, capacity + 1, count)
        row, rows = best_fit(lengths, capacity)
        filled = np.bincount(row, lengths, minlength=rows).astype(int)
        assert sorted((capacity - filled).tolist()) == textbook(lengths.tolist(), capacity)
        assert (best_fit(lengths, capacity)[0] == row).all()
    with pytest.raises(ValueError, match="does not fit"):
        best_fit(np.array([capacity + 1]), capacity)


def test_the_first_rows_are_not_those_of_the_longest_documents() -> None:
    """An evaluation of few tokens reads the first rows, so they should be like the others."""
    lengths = np.random.default_rng(0).permutation(np.repeat(np.arange(2, 102), 50))
    row, rows = best_fit(lengths, 101)
    longest = np.zeros(rows)
    np.maximum.at(longest, row, lengths)
    assert abs(longest[: rows // 4].mean() - longest.mean()) < 2


def test_documents_are_cut_only_if_longer_than_a_row(tmp_path: Path) -> None:
    pieces = cut_documents(make_stream(tmp_path, [1, 2, 5, 6, 9, 10, 3]), 4)
    spans = [(int(s), int(s + n)) for s, n in zip(pieces.starts, pieces.lengths, strict=True)]
    assert spans == [(1, 3), (3, 8), (8, 13), (12, 14), (14, 19), (18, 23), (23, 28), (27, 32), (31, 33), (33, 36)]


def make_rows(folder: Path, lengths: list[int], seq_len: int, document_mask: bool) -> tuple[TokenStream, BestFitRows]:
    stream = make_stream(folder, lengths)
    index = open_index(folder, stream, Identity("id", "train", seq_len))
    return stream, BestFitRows(stream, index, seq_len, PAD, document_mask)


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("seq_len", [1, 4, 16])
def test_every_token_of_a_document_but_the_first_is_predicted_once(
    tmp_path: Path, seq_len: int, document_mask: bool
) -> None:
    lengths = np.random.default_rng(seq_len).integers(1, 40, 60).tolist()
    stream, rows = make_rows(tmp_path, lengths, seq_len, document_mask)
    whole = rows.read(np.arange(len(rows)))
    predicted = [
        (token, label)
        for token, label in zip(whole.tokens.ravel(), whole.labels.ravel(), strict=True)
        if label != IGNORED_LABEL
    ]
    tokens = stream.read(0, stream.num_tokens).tolist()
    starts = {0, *itertools.accumulate(lengths)}
    assert sorted(predicted) == [pair for at, pair in enumerate(itertools.pairwise(tokens), 1) if at not in starts]
    for number in range(len(rows)):
        spans = rows.place(number).spans
        written = np.concatenate([stream.read(*span) for span in spans])
        padding = seq_len + 1 - len(written)
        assert whole.tokens[number].tolist() == [*written, *[PAD] * padding][:-1]
        ids = np.repeat(np.arange(len(spans) + 1), [*(b - a for a, b in spans), padding])[:-1]
        at = [np.arange(count) for count in np.bincount(ids)]
        if document_mask:
            assert whole.document_ids is not None
            assert whole.document_ids[number].tolist() == ids.tolist()
            assert whole.positions[number].tolist() == np.concatenate(at).tolist()
        else:
            assert whole.document_ids is None
            assert whole.positions[number].tolist() == list(range(seq_len))


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_the_rows_of_a_token_are_those_whose_spans_have_it(tmp_path: Path, packing: str) -> None:
    lengths = np.random.default_rng(5).integers(1, 30, 40).tolist()
    stream, best = make_rows(tmp_path, lengths, 8, False)
    rows: PlacedRows = best if packing == "best_fit" else PackedStream(stream, 8, False)
    spans = [rows.place(row).spans for row in range(len(rows))]
    draw = np.random.default_rng(6)
    for start in [0, *draw.integers(0, stream.num_tokens - 1, 200).tolist()]:
        stop = min(stream.num_tokens, start + int(draw.integers(1, 50)))
        expected = [r for r, found in enumerate(spans) if any(a < stop and start < b for a, b in found)]
        assert rows.rows_of(start, stop) == expected


def test_the_index_is_made_once_and_a_damaged_one_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = make_stream(tmp_path, [5, 9, 3, 12, 7])
    identity = Identity("id", "train", 6)
    path = tmp_path / best_fit_rows.index_name("train", 6)
    assert rows_in_index(tmp_path, identity) is None
    rows = open_index(tmp_path, stream, identity).num_rows
    stamp, good = path.stat().st_mtime_ns, path.read_bytes()
    assert open_index(tmp_path, stream, identity).num_rows == rows == rows_in_index(tmp_path, identity)
    assert path.stat().st_mtime_ns == stamp
    path.write_bytes(good[:-1] + b"\1")
    with pytest.raises(DataError, match="was altered; remove it"):
        BestFitRows(stream, open_index(tmp_path, stream, identity), 6, PAD, False).place(0)
    for bad in (b"", good[:10], good[:-8], b"x" + good[1:], good[:30] + b"?" + good[31:]):
        path.write_bytes(bad)
        open_index(tmp_path, stream, identity)
        assert path.read_bytes() == good
    open_index(tmp_path, stream, Identity("other", "train", 6))
    assert path.read_bytes() != good
    path.unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)  # a read-only folder, which the superuser may write to
    assert open_index(tmp_path, stream, identity).num_rows == rows
    assert not path.exists()


def test_an_index_that_is_cut_while_it_is_open_is_named(tmp_path: Path) -> None:
    """Through a memory map, this would be a SIGBUS."""
    stream, rows = make_rows(tmp_path, [30] * 2_000, 6, False)
    path = tmp_path / best_fit_rows.index_name("train", 6)
    last = len(rows) - 1
    assert len(rows.place(last).spans) == 1
    os.truncate(path, path.stat().st_size // 2)
    assert rows.place(0).spans
    with pytest.raises(DataError, match="was cut short while it was read; remove it: it will be made again") as caught:
        rows.rows_of(stream.num_tokens - 1, stream.num_tokens)
    assert not isinstance(caught.value, UnreadableError), "no other row is read instead"
    assert open_index(tmp_path, stream, Identity("id", "train", 6)).num_rows == len(rows)


def tokens_of(rows: PlacedRows) -> npt.NDArray[np.int64]:
    return rows.read(np.arange(len(rows))).tokens


def test_prepared_data_is_split_as_asked(make_data: MakeData) -> None:
    data = make_data(packing="best_fit", seq_len=64)
    prepared = prepare(data)
    assert prepared_rows(data) == (prepared.manifest, None)
    rows = prepared.split("train", seq_len=64, packing="best_fit")
    assert prepared_rows(data)[1] == len(rows)
    assert (tokens_of(prepare(data).split("train", seq_len=64, packing="best_fit")) == tokens_of(rows)).all()
    assert not list(prepared.folder.glob("*-rows-32.index"))
    rebuilt = prepare(make_data(rebuild=True, shard_tokens=2048))
    assert rebuilt.folder != prepared.folder
    with pytest.raises(IndexError):
        rows.read([len(rows)])


def test_a_rebuilt_corpus_gets_another_index(make_data: MakeData, corpus: Path) -> None:
    before = prepare(make_data()).split("train", seq_len=32, packing="best_fit")
    (corpus / "more.py").write_text("more = 1\n" * 50)
    rebuilt = prepare(make_data(rebuild=True))
    assert not list(rebuilt.folder.glob("*.index"))
    assert len(rebuilt.split("train", seq_len=32, packing="best_fit")) != len(before)


def brute_report(prepared: Prepared, packing: str, seq_len: int) -> tuple[int, int, float]:
    """Return cut documents, their tokens, and the share of padding, read off the rows of the val split."""
    stream = prepared.streams["val"]
    starts = [*stream.starts(0, stream.num_tokens).tolist(), stream.num_tokens]
    rows = prepared.split("val", seq_len=seq_len, packing=packing)  # type: ignore[arg-type]
    spans = [span for row in range(len(rows)) for span in rows.place(row).spans]
    cut = [(a, b) for a, b in itertools.pairwise(starts) if not any(s <= a and b <= e for s, e in spans)]
    if packing == "stream":  # the tail, and a document that ends with the last token, which is in no row
        end = len(rows) * seq_len + 1
        cut = [(a, b) for a, b in cut if a < end - 1]
    used = sum(b - a for a, b in spans)
    return len(cut), sum(b - a for a, b in cut), 1 - used / (len(rows) * (seq_len + 1))


@pytest.mark.parametrize("seq_len", [16, 100, 250])
def test_the_report_counts_what_the_rows_have(make_data: MakeData, seq_len: int) -> None:
    prepared = prepare(make_data(val_fraction=0.4))
    records = packing_report(prepared, seq_len)
    assert [(r.split, r.packing) for r in records] == list(itertools.product(("train", "val"), ("stream", "best_fit")))
    for record in records[2:]:
        cut, tokens, padding = brute_report(prepared, record.packing, seq_len)
        assert (record.cut_documents, record.cut_tokens) == (cut, tokens)
        assert record.padding == pytest.approx(padding)
        assert record.rows == len(prepared.split("val", seq_len=seq_len, packing=record.packing))
        assert record.documents == prepared.counts["val"].documents
    assert records[3].cut_documents <= records[2].cut_documents
    assert f"packing best_fit: {records[3].rows:,} rows; " in records[3].line()


class Formula:
    """A stream of a trillion tokens, whose documents have 100, 200, ..., 2,000 tokens in turn; a part of it can be read."""

    num_tokens, period = 10**12, 21_000
    most_asked = 0

    def starts(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        self.most_asked = max(self.most_asked, stop - start)
        first = start // self.period * self.period
        each = np.cumsum([0, *range(100, 2000, 100)])
        found = np.add.outer(np.arange(first, stop, self.period), each).ravel()
        return np.asarray(found[(found >= start) & (found < stop)], np.int64)


def test_the_report_on_a_large_split_is_an_estimate_from_a_part_of_it() -> None:
    stream = Formula()
    counts = SimpleNamespace(documents=stream.num_tokens // 1050)
    prepared: Any = SimpleNamespace(streams={"train": stream}, counts={"train": counts})
    plain, best = compare_packings("train", sample_documents(prepared, "train"), 1000)
    assert plain.sampled
    assert best.sampled
    assert stream.most_asked <= WINDOW_TOKENS
    # documents longer than 1,001 tokens: 10 of 20, with 15,500 of each 21,000 tokens
    assert best.cut_documents / best.documents == pytest.approx(0.5, abs=0.01)
    assert best.cut_tokens / best.tokens == pytest.approx(15_500 / 21_000, abs=0.01)
    assert best.rows == pytest.approx(stream.num_tokens / 1000, rel=0.03)
    # each 21 rows have the same documents: a token is predicted in the row of the token before it
    spans = itertools.pairwise(np.cumsum([0, *range(100, 2100, 100)]).tolist())
    crossing = sum(first // 1000 < (stop - 2) // 1000 for first, stop in spans) / 20
    assert plain.cut_documents / plain.documents == pytest.approx(crossing, abs=0.01)
    assert plain.rows == (stream.num_tokens - 1) // 1000


def test_the_report_on_a_small_split_is_exact(make_data: MakeData) -> None:
    prepared = prepare(make_data(val_fraction=0.4))
    assert compare_packings("train", sample_documents(prepared, "train"), 100) == packing_report(prepared, 100)[:2]
