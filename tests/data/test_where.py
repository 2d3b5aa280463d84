"""Where documents are trained on, against reading every row of every step; and on a blend of ten trillion tokens."""

from __future__ import annotations

import json
import tracemalloc
from collections import defaultdict
from math import inf
from pathlib import Path

import numpy as np
import pytest
from scripts.bench_blend import LAST, open_finder

from shoal.config.data_options import BlendSource, Data
from shoal.data.dataset import Dataset, new_order, prepare_dataset
from shoal.data.document_index import find_documents
from shoal.data.order.quarantine import candidates
from shoal.data.where import Finder, Instead, Life, Place, Timeline

SEQ_LEN, BATCH, MICRO = 32, 6, 2
LIVES = [Life(0, 0, BATCH, stop=60), Life(78, 10, BATCH)]  # steps 1 to 10, then 18 positions passed over


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("blend")
    sources = {}
    for name, weight in (("a", 0.6), ("b", 0.3), ("c", 0.1)):
        path = folder / f"{name}.jsonl"
        texts = [f"{name} {n} " + "x" * (n * 37 % 90) for n in range(25)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        sources[name] = BlendSource(corpus="jsonl", paths=(str(path),), weight=weight)
    data = Data(
        sources=sources, stages={"8 steps": {"a": 1, "c": 2}}, tokenizer="bytes", seq_len=SEQ_LEN,
        folder=str(folder / "data"), val_fraction=0.1, shard_tokens=1024,
    )  # fmt: skip
    return prepare_dataset(data)


@pytest.mark.parametrize("replaced", [0, 3])
def test_every_document_is_where_reading_all_steps_finds_it(dataset: Dataset, replaced: int) -> None:
    rows = dataset.rows("train")
    order = new_order(dataset.data, rows.sizes, 3, BATCH)
    last = 24
    unread = {row: candidates(order, row)[0] for row in order.rows_at(np.arange(20, 20 + replaced)).tolist()}
    since = 20  # the position from which these rows could not be read
    finder = Finder.of(dataset, order, Timeline(LIVES, MICRO, [Instead(since, inf, *each) for each in unread.items()]))
    # by hand: the tokens of each step's rows, cut at the ends of documents, whose first token names source and number
    found: dict[tuple[str, str], list[tuple[int, int, int]]] = defaultdict(list)
    text_of = {}
    for name, part in dataset.parts.items():
        stream, documents = part.streams["train"], find_documents(part, "train")
        assert documents.num_documents == part.counts["train"].documents
        for number in range(documents.num_documents):
            text_of[name, number] = part.tokenizer.decode(stream.read(*documents.document_span(number)).tolist())
    assert len(set(text_of.values())) == len(text_of) > 50
    for step in range(1, last + 1):
        first = (step - 1) * BATCH if step <= 10 else 78 + (step - 11) * BATCH
        listed = {each.place: each for each in finder.at(step)}
        for at, row in enumerate(order.rows_at(np.arange(first, first + BATCH)).tolist()):
            row = unread.get(row, row) if first + at >= since else row
            seen = listed.pop(Place(step, at // MICRO, at % MICRO))
            assert seen.row == row - order.first_row(list(dataset.parts).index(seen.source))
            own = [text_of[seen.source, number] for number in seen.documents]
            text = dataset.tokenizer.decode(rows.read([row]).tokens[0].tolist())
            assert text in "".join(own)
            assert len(own) == 1 or own[0].endswith(text[: text.index("<|endoftext|>") + 13])
            for each in own:
                found[seen.source, each].append((step, seen.place.slot, seen.place.index))
        assert not listed
    for (name, number), text in text_of.items():
        places = [(s.place.step, s.place.slot, s.place.index) for s in finder.where(name, number, last)]
        assert places == sorted(found[name, text])
    with pytest.raises(IndexError):
        finder.where("a", 10**6, last)


def test_the_timeline_follows_resumes_rollbacks_and_other_batches(tmp_path: Path) -> None:
    header = {"rows": 10, "seed": 0, "copies": 1, "data_id": "", "sources": [], "stages": []}
    lines = [
        {"after": 0, "position": 0, "global_batch": 4, **header},
        *({"step": n, "first": 4 * n - 4, "stop": 4 * n, "skipped": False, "sum": 0} for n in range(1, 6)),
        {"after": 2, "position": 8, "global_batch": 4, **header},  # back to step 2
        {"passed_over": [8, 16]},
        {"step": 3, "first": 16, "stop": 20, "skipped": False, "sum": 0},
        {"after": 3, "position": 20, "global_batch": 6, **header},  # resumed with a larger batch
    ]
    path = tmp_path / "ledger.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    timeline, last = Timeline.of_ledger(path, micro_batch=2)
    assert last.global_batch == 6
    assert [timeline.positions(step) for step in (1, 2, 3, 4, 5)] == [
        range(4), range(4, 8), range(16, 20), range(20, 26), range(26, 32),
    ]  # fmt: skip
    assert [timeline.place(p) for p in (0, 7, 8, 15, 16, 25)] == [
        Place(1, 0, 0), Place(2, 1, 1), None, None, Place(3, 0, 0), Place(4, 2, 1),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no step 0"):
        timeline.positions(0)


def test_ten_trillion_tokens_need_no_memory(tmp_path: Path) -> None:
    """Answers come from formulas: `scripts/bench_blend.py` times them; here nothing may grow with the corpus."""
    finder = open_finder(tmp_path)
    tracemalloc.start()
    for step in (1, 10_000_000, 10_000_001, LAST):  # the second stage begins after 10 million
        for seen in finder.at(step)[::31]:
            again = finder.where(seen.source, seen.documents[0], LAST)
            assert [each.row for each in again if each.place == seen.place] == [seen.row]
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
