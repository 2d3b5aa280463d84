"""Corpora read by Hugging Face's library, compared with the rows that the tests write. Offline."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shoal.config.data_options import Data, Source
from shoal.data.corpus.documents import Document, Skipped
from shoal.data.corpus.downloads import Downloads
from shoal.data.corpus.sources import open_corpus
from shoal.data.prepare import prepare
from shoal.errors import DataError
from tests.hub.server import Repository, running_hub

TEXTS = [f"row {n} " + "word " * (n % 50) for n in range(700)]


def table(texts: list[str]) -> Any:
    return pa.table({"id": list(range(len(texts))), "text": texts, "other": ["x"] * len(texts)})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a dataset with two splits, the first in two files; the library's cache is in the test's folder."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "stories" / "data"
    data.mkdir(parents=True)
    pq.write_table(table(TEXTS[:400]), data / "train-00000-of-00002.parquet", row_group_size=100)
    pq.write_table(table(TEXTS[400:]), data / "train-00001-of-00002.parquet")
    pq.write_table(table(["held out"]), data / "test-00000-of-00001.parquet")
    return data.parent


def corpus_of(path: str | Path, **options: Any) -> Any:
    return open_corpus(Source(corpus="datasets", paths=(str(path),), **options))


def texts_of(items: Iterator[Document | Skipped]) -> list[str]:
    return [item.text for item in items if isinstance(item, Document)]


def refused(pattern: str, path: str | Path, **options: Any) -> None:
    with pytest.raises(DataError) as caught:
        list(corpus_of(path, **options).read())
    assert re.search(pattern, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_come_in_order_and_from_any_row_on(folder: Path, streaming: bool) -> None:
    corpus = corpus_of("stories", streaming=streaming)
    items = list(corpus.read())
    assert texts_of(iter(items)) == TEXTS
    assert items[3].name == "stories:train row 3"
    for stop in (1, 255, 256, 257, 450, 700):
        assert list(corpus.read(items[stop - 1].after)) == items[stop:]
    offsets = [item.after.offset for item in items]
    assert offsets == sorted(offsets)
    assert streaming or offsets[-1] == corpus.listing()[0].bytes


def test_splits_and_parts_of_splits(folder: Path) -> None:
    assert texts_of(corpus_of(folder, split="test").read()) == ["held out"]
    assert texts_of(corpus_of(folder, split="train[:10]+test").read()) == [*TEXTS[:10], "held out"]


def test_the_listing_changes_with_the_content_and_the_digest_only_with_it(folder: Path) -> None:
    def state() -> tuple[Any, str]:
        corpus = corpus_of(folder)
        return corpus.listing(), corpus.digest(0)

    first = state()
    assert state() == first
    os.utime(folder / "data" / "train-00001-of-00002.parquet", (1, 1))
    touched = state()
    assert touched[0] != first[0]
    assert touched[1] == first[1]
    pq.write_table(table([*TEXTS[400:-1], "changed"]), folder / "data" / "train-00001-of-00002.parquet")
    assert state()[1] != first[1]


def test_what_save_to_disk_wrote(folder: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": TEXTS})
    rows.save_to_disk("saved", num_shards=3)
    datasets.DatasetDict(train=rows, test=rows.select([5])).save_to_disk("splits")
    assert texts_of(corpus_of("saved").read()) == TEXTS
    assert texts_of(corpus_of("splits").read()) == TEXTS
    assert texts_of(corpus_of("splits", split="test").read()) == [TEXTS[5]]
    for where in ("saved", "splits"):
        assert texts_of(corpus_of(where, split="train[:90%]").read()) == TEXTS[: len(TEXTS) * 9 // 10]
        assert texts_of(corpus_of(where, split="train[10:12]+train[-1:]").read()) == [*TEXTS[10:12], TEXTS[-1]]
        refused(r"has no split 'nonsense\[:x'; set data.split to one of train", where, split="nonsense[:x")
    refused("has no split 'val'; set data.split to one of train, test", "splits", split="val")
    refused("has no split 'test'; set data.split to one of train", "saved", split="test")
    refused("data.subset has no effect", "saved", subset="a")
    for part in Path("saved").glob("*.arrow"):
        part.write_bytes(part.read_bytes()[:100])
    refused("is damaged|cannot read row", "saved")


def test_subsets(folder: Path) -> None:
    parts = {"big": "train", "small": "test"}
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: data/{split}-*\n"
        for name, split in parts.items()
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert texts_of(corpus_of(folder, subset="small").read()) == ["held out"]
    assert len(texts_of(corpus_of(folder, subset="big").read())) == 700
    refused("has several subsets; set data.subset to one of big, small", folder)
    refused("has no subset 'huge'; set data.subset to one of big, small", folder, subset="huge")
    refused("has no split 'val'; set data.split to one of train", folder, subset="big", split="val")


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_refused(folder: Path, streaming: bool) -> None:
    options = {"streaming": streaming}
    refused(
        "stories:train has no column body; its columns are id, text, other; set data.text_key",
        folder,
        text_key="body",
        **options,
    )
    refused("has no split 'val'; set data.split to one of train, test", folder, split="val", **options)
    refused("there is no folder org/none, and the hub cannot be reached .* `shoal fetch data hf:org/none`, and copy its folder to datasets/org/none", "org/none", **options)  # fmt: skip
    refused(r"there is no folder ../none.*, and a dataset on the hub is named OWNER/NAME", "../none", **options)
    refused("is a file, not a dataset's folder; set data.corpus to files", folder / "data" / "test-00000-of-00001.parquet", **options)  # fmt: skip
    Path("script").mkdir()
    Path("script/script.py").write_text("raise SystemExit('ran')")
    refused("is read by a Python script, which .* no longer runs", "script", **options)
    Path("empty").mkdir()
    refused("has no data files", "empty", **options)
    pq.write_table(pa.table({"text": ["a"], "more": [1]}), folder / "data" / "train-00002-of-00003.parquet")
    refused("cannot read (stories: .*column|row 700)", "stories", **options)


def test_records_without_text_are_skipped_and_counted(folder: Path) -> None:
    rows = pa.table({"text": ["a", "", None, "b"], "n": [1, 2, 3, 4]})
    Path("some").mkdir()
    pq.write_table(rows, "some/train.parquet")
    items = list(corpus_of("some").read())
    assert [type(item).__name__ for item in items] == ["Document", "Skipped", "Skipped", "Document"]


def test_a_fetched_dataset_is_found_by_its_name(folder: Path) -> None:
    Path("datasets/org").mkdir(parents=True)
    folder.rename("datasets/org/stories")
    Path("datasets/org/stories/.fetched.json").write_text("{}")
    corpus = corpus_of("org/stories")
    assert texts_of(corpus.read()) == TEXTS
    assert corpus.listing()[0].name == "org/stories:train"


def test_it_is_prepared_like_jsonl_and_resumed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    options: dict[str, Any] = {
        "tokenizer": "bytes",
        "seq_len": 32,
        "folder": str(tmp_path / "data"),
        "shard_tokens": 4096,
    }
    tokens = prepare(Data(corpus="datasets", paths=("stories",), **options))
    assert tokens.data_id == prepare(Data(corpus="jsonl", paths=("a.jsonl",), **options)).data_id
    assert prepare(Data(corpus="datasets", paths=("stories",), streaming=True, **options)).data_id == tokens.data_id
    assert prepare(Data(corpus="datasets", paths=("stories",), rebuild=True, **options)).notes == ()


def test_prepared_tokens_of_a_dataset_on_the_hub_need_no_hub(folder: Path) -> None:
    source = Source(corpus="datasets", paths=("org/stories",))
    with pytest.raises(DataError, match="is on the hub, which is not asked again"):
        open_corpus(source, Downloads(Path("data"), offline=True))


BY_NAME = """
from shoal.config.data_options import Source
from shoal.data.corpus.sources import open_corpus
from shoal.errors import DataError
for name, streaming in (("org/stories", False), ("org/stories", True), ("org/none", False)):
    try:
        corpus = open_corpus(Source(corpus="datasets", paths=(name,), streaming=streaming))
        print(corpus.listing()[0].mtime_ns, sum(1 for _ in corpus.read()))
    except DataError as error:
        print(error)
"""


@pytest.mark.ci
def test_a_name_on_the_hub_with_a_network_and_then_from_the_cache(folder: Path, tmp_path: Path) -> None:
    def read(address: str, offline: str) -> list[str]:
        environment = os.environ | {
            "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": address, "HF_HUB_OFFLINE": offline
        }  # fmt: skip
        done = subprocess.run([sys.executable, "-c", BY_NAME], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    with running_hub() as hub:
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.parquet")}
        hub.repositories["org/stories"] = Repository(files | {"README.md": b""}, "datasets")
        online, streamed, none = read(hub.url, "0")
    assert online == streamed
    assert online.endswith(" 700")
    assert "there is no dataset org/none" in none
    *cached, none = read(hub.url, "1")
    assert cached == [online, online]
    assert "there is no folder org/none, and the hub cannot be reached" in none


@pytest.mark.parametrize("streaming", [False, True])
def test_a_split_is_held_out(folder: Path, streaming: bool) -> None:
    source = Data(
        corpus="datasets", paths=("stories",), val_split="test", tokenizer="bytes", folder="data", streaming=streaming
    )
    items = list(open_corpus(source).read())
    assert texts_of(iter(items)) == ["held out", *TEXTS]
    for number in (0, 1, 500):
        assert list(open_corpus(source).read(items[number].after)) == items[number + 1 :]
    prepared = prepare(source)
    assert (prepared.counts["val"].documents, prepared.counts["train"].documents) == (1, 700)
    assert [entry.name for entry in prepared.manifest.listing] == ["stories:test", "stories:train"]
    with pytest.raises(DataError, match=r"has no split 'validation'; set data.val_split to one of train, test"):
        open_corpus(replace(source, val_split="validation"))


ABSENT = "import sys; sys.modules['datasets'] = None\n"  # as if it was not installed
READ = """
from shoal.config.data_options import Source
from shoal.data.corpus.sources import open_corpus
from shoal.errors import DataError
try:
    print(sum(1 for _ in open_corpus(Source(corpus="datasets", paths=("stories",))).read()))
except DataError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("code", "said"), [(READ, "700"), (ABSENT + READ, "needs Hugging Face's library: pip install 'shoal[data]'")]
)
def test_the_folder_datasets_does_not_hide_the_library_and_its_absence_is_said(
    folder: Path, tmp_path: Path, code: str, said: str
) -> None:
    """Run in a folder that has `datasets/`, which Python could import as an empty package."""
    Path("datasets/org").mkdir(parents=True)
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert said in done.stdout, done.stderr
