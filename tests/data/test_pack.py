"""Packed rows, compared with rows written out in the tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shoal.data.packing.pack import PackedStream
from shoal.data.stored.shards import Shard, write_shard
from shoal.data.stored.stream import TokenStream

# Documents of 3, 1, 4 and 5 tokens, each ending with the end-of-text token (0); the first shard ends after the second document.
FIRST = [11, 12, 0, 0]
SECOND = [21, 22, 23, 0, 31, 32, 33, 34, 0]


@pytest.fixture
def stream(tmp_path: Path) -> TokenStream:
    shards = []
    for name, tokens, starts in [("a", FIRST, [0, 3]), ("b", SECOND, [0, 4])]:
        record = write_shard(tmp_path / name, np.array(tokens, np.uint16), np.array(starts, np.int64), 0)
        shards.append(Shard(tmp_path / name, record, np.dtype(np.uint16)))
    return TokenStream(shards)


def test_rows_cover_the_stream_across_shards(stream: TokenStream) -> None:
    rows = PackedStream(stream, 4, False)
    packed = rows.read([0, 1, 2])
    assert len(rows) == 3
    assert packed.tokens.tolist() == [[11, 12, 0, 0], [21, 22, 23, 0], [31, 32, 33, 34]]
    assert packed.labels.tolist() == [[12, 0, 0, 21], [22, 23, 0, 31], [32, 33, 34, 0]]
    assert packed.positions.tolist() == [[0, 1, 2, 3]] * 3
    assert packed.document_ids is None


def test_documents_are_kept_apart(stream: TokenStream) -> None:
    packed = PackedStream(stream, 6, True).read([0, 1])
    assert packed.tokens.tolist() == [[11, 12, 0, 0, 21, 22], [23, 0, 31, 32, 33, 34]]
    assert packed.labels.tolist() == [[12, 0, -100, -100, 22, 23], [0, -100, 32, 33, 34, 0]]
    assert packed.positions.tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 0, 1, 2, 3]]
    assert packed.document_ids is not None
    assert packed.document_ids.tolist() == [[0, 0, 0, 1, 2, 2], [0, 0, 1, 1, 1, 1]]


def test_a_border_at_the_end_of_a_row_is_seen_from_both_sides(stream: TokenStream) -> None:
    packed = PackedStream(stream, 4, True).read([1, 0])  # in the requested order
    assert packed.labels.tolist() == [[22, 23, 0, -100], [12, 0, -100, -100]]
    assert packed.positions.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0]]


@pytest.mark.parametrize(("seq_len", "count"), [(1, 12), (2, 6), (3, 4), (5, 2), (6, 2), (11, 1), (12, 1), (13, 0)])
def test_only_a_tail_shorter_than_a_row_is_dropped(stream: TokenStream, seq_len: int, count: int) -> None:
    rows = PackedStream(stream, seq_len, False)
    assert len(rows) == count
    if count:
        labels = rows.read(np.arange(count)).labels.ravel()
        assert labels.tolist() == (FIRST + SECOND)[1 : 1 + count * seq_len]
    with pytest.raises(IndexError):
        rows.read([count])
