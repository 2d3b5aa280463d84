"""Arrays of integers in files that are cut while they are open: an error, not SIGBUS; answers equal NumPy's and bisect's."""

from __future__ import annotations

import bisect
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.config.data_options import Data
from shoal.data.document_index import find_documents
from shoal.data.order.blend import Blend
from shoal.data.order.quarantine import Quarantine
from shoal.data.prepare import Prepared, prepare
from shoal.data.pretokenized.megatron import MegatronIndex
from shoal.errors import DataError, UnreadableError
from shoal.system.byte_file import ByteFile
from shoal.system.number_file import BLOCK_ITEMS, NumberFile, search_near
from tests.data import token_writers as writers

DOCUMENTS, END = 3000, 256


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """Return a Megatron .idx of 3,000 documents of 1 to 7 tokens and an end token, in one or two sequences."""
    draw = random.Random(0)
    documents = [[65 + n % 7] * draw.randint(1, 7) for n in range(DOCUMENTS)]
    return writers.megatron(tmp_path / "t", documents, END, sequences=2)


def opened(folder: Path, index: Path, **options: Any) -> Prepared:
    data = Data(corpus="tokens", paths=(str(index),), tokenizer="bytes", folder=str(folder / "data"), **options)
    return prepare(data)


@pytest.mark.parametrize("dtype", ["<i4", "<i8"])
def test_items_ranges_and_searches_equal_those_of_arrays(tmp_path: Path, dtype: str) -> None:
    draw = np.random.default_rng(1)
    numbers = np.sort(draw.integers(-5, 9000, 3 * BLOCK_ITEMS + 7)).astype(dtype)
    (tmp_path / "n").write_bytes(b"head" + numbers.tobytes() + b"tail")
    found = NumberFile(ByteFile(tmp_path / "n", "n", "copy it again"), dtype, 4, len(numbers))
    assert list(found) == numbers.tolist()
    assert found[-1] == numbers[-1]
    assert found.read(500, 1100).tolist() == numbers[500:1100].tolist()
    assert found.read(1500, 9999).tolist() == numbers[1500:].tolist()
    assert found.read(7, 7).tolist() == []
    for indices in ([0, 1, 1, 5], [3, 1500], []):
        assert found.take(np.array(indices, np.int64)).tolist() == numbers[indices].tolist()
    for outside in (len(numbers), -len(numbers) - 1):
        with pytest.raises(IndexError):
            found[outside]
    for low in (0, 600, len(numbers)):
        for value in (-9, 0, 17, 4000, 9000):
            wanted = max(low, bisect.bisect_left(numbers.tolist(), value))
            assert search_near(found.__getitem__, value, low, len(found)) == wanted


def test_an_idx_that_is_cut_while_open_is_an_error_that_names_it(index: Path) -> None:
    bin_bytes = index.with_suffix(".bin").stat().st_size
    found = MegatronIndex("t.idx", index, "t.bin", bin_bytes)
    tokens = bin_bytes // 2
    before = found.starts(0, 100)
    with index.open("r+b") as file:
        file.truncate(100)  # the header, and a few lengths
    with pytest.raises(UnreadableError, match=r"t\.idx was cut short while it was read; copy both files again"):
        found.starts(tokens // 3, tokens // 3 + 100)
    with pytest.raises(UnreadableError, match=r"t\.idx was cut short"):
        found.check()
    assert len(before)


def test_a_row_whose_part_of_the_idx_is_lost_is_replaced(tmp_path: Path, index: Path) -> None:
    rows = opened(tmp_path, index, seq_len=32).split("train", seq_len=32, document_mask=True)
    size = index.stat().st_size
    with index.open("r+b") as file:
        file.truncate(size - 8 * 800)  # the entries of the last documents
    last = len(rows) - 1
    read = Quarantine(rows, Blend(0, [len(rows)]), {}).read(np.array([0, last]))
    assert read.row_ids[0] == 0
    [replaced] = read.replaced
    assert (replaced.row, "t.idx was cut short while it was read" in replaced.why) == (last, True)


def test_an_index_of_documents_that_is_cut_while_open_is_an_error(tmp_path: Path, index: Path) -> None:
    prepared = opened(tmp_path, index)
    documents, stream = find_documents(prepared, "train"), prepared.streams["train"]
    starts = stream.starts(0, stream.num_tokens).tolist()
    assert [documents.document_span(n)[0] for n in (0, 1, 2)] == starts[:3]
    assert documents.documents_in(starts[700] + 1, starts[703]) == range(700, 703)
    [path] = prepared.folder.glob("documents-train-*.bin")
    with path.open("r+b") as file:
        file.truncate(8 * 1000)
    for question in (lambda: documents.document_span(2000), lambda: documents.documents_in(*starts[2000:2002])):
        with pytest.raises(
            DataError, match=r"documents-train-\w+\.bin was cut short .*; remove it: it will be made again"
        ):
            question()
