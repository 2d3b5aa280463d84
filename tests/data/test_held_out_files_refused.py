"""Held-out files that cannot be used, and options that contradict them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml

from shoal.data.prepare import prepare
from shoal.errors import DataError
from shoal.resolve.resolve import resolve
from tests.data.test_held_out_files import data_in, texts, write_jsonl
from tests.resolve.test_resolve import problems


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({"paths": ["a.jsonl"], "val_paths": ["*.jsonl"]}, "data.val_paths has all the files of data.paths"),
        ({"paths": ["a.jsonl"], "val_paths": ["x*.jsonl"]}, r"no file matches .*x\*\.jsonl; correct data.val_paths"),
        ({"paths": ["a.jsonl"], "val_paths": ["folder"]}, "no .jsonl or .ndjson files in .*; correct data.val_paths"),
        ({"paths": ["a.jsonl"], "val_paths": ["empty.jsonl"]}, "the held-out files have no documents.*; correct data.val_paths"),
        ({"paths": ["a.jsonl"], "val_paths": ["other.jsonl"]}, "the held-out files have no documents.* 'body'"),
        ({"paths": ["empty.jsonl"], "val_paths": ["a.jsonl"]}, "the corpus has no documents to train on"),
        ({"paths": ["other.parquet"], "val_paths": ["bad.jsonl"], "bad_records": 3}, "other.parquet has no column text"),
        ({"paths": ["a.jsonl"], "val_paths": ["bad.jsonl"], "bad_records": 3}, "more than 3 records are damaged .*bad.jsonl:1"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_held_out(tmp_path: Path, names: dict[str, Any], says: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts(5, 1))
    write_jsonl(tmp_path / "b.jsonl", texts(5, 2))
    (tmp_path / "other.jsonl").write_text('{"body": "text"}\n')
    (tmp_path / "bad.jsonl").write_text("{\n" * 4)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    pa.parquet.write_table(pa.table({"body": ["text"]}), tmp_path / "other.parquet")
    options = {k: [str(tmp_path / name) for name in v] if isinstance(v, list) else v for k, v in names.items()}
    corpus = "files" if "other.parquet" in str(names) else "jsonl"
    with pytest.raises(DataError, match=says):
        prepare(data_in(tmp_path, corpus=corpus, **options))


def test_too_few_held_out_tokens_for_a_row(tmp_path: Path) -> None:
    paths = {"paths": [str(write_jsonl(tmp_path / "a.jsonl", texts(9, 1)))], "val_paths": [str(write_jsonl(tmp_path / "b.jsonl", ["few"]))]}  # fmt: skip
    prepared = prepare(data_in(tmp_path, corpus="jsonl", **paths))
    with pytest.raises(DataError, match=r"the val split has 4 tokens, .*; add documents or lower data.seq_len"):
        prepared.split("val", seq_len=32)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"val_paths": ["docs"]}, "data.val_paths has no effect on a stdlib corpus; remove it"),
        ({"corpus": "datasets", "paths": ["a/b"], "val_paths": ["docs"]}, "no effect on a datasets corpus; set data.val_split"),
        ({"corpus": "datasets", "paths": ["a/b"], "val_split": "train"}, "data.val_split is data.split"),
        ({"corpus": "datasets", "paths": ["a/b"], "val_split": "test", "val_fraction": 0.1}, "data.val_split says what is held out"),
        ({"corpus": "text", "paths": ["docs"], "val_split": "test"}, "data.val_split has no effect on a text corpus"),
        ({"corpus": "text", "paths": ["docs"], "val_paths": ["docs"], "val_fraction": 0.1}, "data.val_paths says what is held out"),
        ({"corpus": "text", "paths": ["docs"], "val_paths": ["gone"]}, "data.val_paths does not exist: gone"),
        ({"sources": {"a": {"paths": ["docs"], "val_paths": ["docs"]}}, "val_fraction": 0.1}, "data.sources.a.val_paths says what"),
    ],
)  # fmt: skip
def test_options_that_contradict(tmp_path: Path, data: dict[str, Any], says: str) -> None:
    [found] = problems(tmp_path, {"train": {"steps": 1}, "data": {**data, "folder": str(tmp_path)}})
    assert says in found


def test_both_kinds_of_paths_say_what_corpus_it_is(tmp_path: Path) -> None:
    kinds = {"a.txt b.txt": "text", "a.jsonl b.jsonl": "jsonl", "a.txt b.parquet": "files", "a.bin folder": "tokens"}
    for names, corpus in kinds.items():
        paths = [tmp_path / name for name in names.split()]
        for path in paths:
            path.touch()
        recipe = tmp_path / "recipe.yaml"
        data = {"paths": [str(paths[0])], "val_paths": [str(paths[1])], "tokenizer": "bytes"}
        recipe.write_text(yaml.safe_dump({"train": {"steps": 1}, "data": data}))
        assert resolve(recipe).config.data.corpus == corpus, names
