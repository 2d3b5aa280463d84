"""Held-out files (data.val_paths), compared with preparing both sets of files alone."""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import random
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
import torch

from shoal.commands.data import data as look_at
from shoal.config.data_options import BlendSource, Data
from shoal.config.options import Config
from shoal.data.check import check_tokens
from shoal.data.corpus.sources import open_corpus
from shoal.data.dataset import prepare_dataset
from shoal.data.prepare import prepare
from shoal.data.stored.manifest import JOURNAL
from shoal.data.token_folder import folder_name, named_tokenizer, token_options
from shoal.errors import DataError
from shoal.infer.load import load_path
from shoal.resolve.resolve import resolve
from shoal.run.records import read_metrics
from shoal.training.loop import complete
from shoal.training.run import Run
from tests.data.chats import alpaca_records
from tests.data.chats import documents as spans_of
from tests.data.test_formats import check_cursors
from tests.data.test_prepare import files_of, texts_of
from tests.data.test_restart import start
from tests.training.test_equivalence import ALONE, NeverStop

END = 256  # of the tokenizer `bytes`
Write = Callable[[Path, Sequence[str]], Path]


def texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    words = ["tide", "più", "漢字", "🐟", '"so"', "a,b", "line\nend", "shoal"]
    return [f"{seed} {n} " + " ".join(draw.choices(words, k=draw.randint(3, 40))) for n in range(count)]


def write_jsonl(path: Path, rows: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows), "utf-8")
    return path


def write_json(path: Path, rows: Sequence[str]) -> Path:
    path.write_text(json.dumps([{"text": text} for text in rows]), "utf-8")
    return path


def write_csv(path: Path, rows: Sequence[str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "text"], *([n, text] for n, text in enumerate(rows))])
    return path


def write_parquet(path: Path, rows: Sequence[str]) -> Path:
    pa.parquet.write_table(pa.table({"text": list(rows)}), path, row_group_size=7)
    return path


def write_arrow(path: Path, rows: Sequence[str]) -> Path:
    table = pa.table({"text": list(rows)})
    with pa.ipc.new_file(path, table.schema) as file:
        file.write_table(table, 7)
    return path


def write_separated(path: Path, rows: Sequence[str]) -> Path:
    path.write_text("\n<|endoftext|>\n".join(rows), "utf-8")
    return path


def write_wikitext(path: Path, rows: Sequence[str]) -> Path:
    """Write pages as WikiText does: blank lines around titles, the first of them before the first title."""
    path.write_text("".join(f" \n = {n} = \n \n {text} @-@ so \n" for n, text in enumerate(rows)), "utf-8")
    return path


def write_alpaca(path: Path, rows: Sequence[str]) -> Path:
    records = alpaca_records(len(rows))
    path.write_text(
        json.dumps([{**r, "id": n, "output": t} for n, (r, t) in enumerate(zip(records, rows, strict=True))])
    )
    return path


FORMATS: list[tuple[str, Write, dict[str, Any]]] = [
    (".txt", write_separated, {"corpus": "text", "separator": "<|endoftext|>"}),
    (".txt", write_wikitext, {"corpus": "text", "wikitext": True}),
    (".jsonl", write_jsonl, {"corpus": "jsonl"}),
    (".json", write_json, {"corpus": "json"}),
    (".csv", write_csv, {"corpus": "csv"}),
    (".parquet", write_parquet, {"corpus": "parquet"}),
    (".arrow", write_arrow, {"corpus": "arrow"}),
    (".parquet", write_parquet, {"corpus": "files"}),
    (".json", write_alpaca, {"corpus": "json", "format": "alpaca"}),
]


def data_in(tmp_path: Path, **options: Any) -> Data:
    usual: dict[str, Any] = {
        "tokenizer": "bytes",
        "folder": str(tmp_path / "prepared"),
        "shard_tokens": 1024,
        "seq_len": 32,
    }
    return Data(**{**usual, **{key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}})


def alone(folder: Path, paths: Sequence[Path], options: dict[str, Any]) -> tuple[list[str], dict[Any, Any]]:
    """Prepare files alone. Returns the documents of both splits, sorted, and the learned spans of each."""
    prepared = prepare(data_in(folder, paths=[str(path) for path in paths], **options))
    return every(texts_of(prepared)), spans_of(prepared) if "format" in options else {}


def every(splits: dict[str, list[str]]) -> list[str]:
    """Return the documents of all splits, sorted."""
    return sorted(itertools.chain(*splits.values()))


@pytest.mark.parametrize(("suffix", "write", "options"), FORMATS, ids=lambda value: getattr(value, "__name__", None))
def test_each_split_is_what_its_files_are_alone(
    tmp_path: Path, suffix: str, write: Write, options: dict[str, Any]
) -> None:
    """The held-out file is in the folder of data.paths too, and its records have ids that training records have."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    training = [write(folder / f"{name}{suffix}", texts(30, seed)) for seed, name in enumerate("ac")]
    held_out = write(folder / f"b{suffix}", texts(20, 9))
    prepared = prepare(data_in(tmp_path, paths=[str(folder)], val_paths=[str(held_out)], **options))
    found, counts, learned = texts_of(prepared), prepared.counts, dict[Any, Any]()
    for name, paths in (("train", training), ("val", [held_out])):
        own, spans = alone(tmp_path, paths, options)
        assert sorted(found[name]) == own
        assert counts[name].documents == len(own)  # type: ignore[index]
        learned |= spans
    total = 50 if "format" in options else 80  # the ids of the second training file repeat those of the first
    assert counts["train"].documents + counts["val"].documents == total
    if "format" in options:
        assert spans_of(prepared) == learned
        assert len(learned) == total
    if not options.get("wikitext"):  # which counts the bytes before detokenizing
        assert counts["val"].text_bytes == sum(len(text.encode()) for text in found["val"])
    assert str(held_out) in prepared.manifest.listing[0].name
    assert len(prepared.manifest.listing) == 3
    assert check_tokens(prepared).endswith(f"; {total} documents")
    assert len(check_cursors(open_corpus(Data(paths=(str(folder),), val_paths=(str(held_out),), **options)))) == 80


def test_the_order_is_that_of_the_files_and_a_single_text_is_one_document(tmp_path: Path) -> None:
    """Without held-out files a single text is cut into parts, so that some can be held out."""
    for name in ("train", "val"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} line {n}\n" for n in range(900)))
    paths = {name: [str(tmp_path / f"{name}.txt")] for name in ("train", "val")}
    found = texts_of(prepare(data_in(tmp_path, corpus="text", paths=paths["train"], val_paths=paths["val"])))
    assert found == {name: [(tmp_path / f"{name}.txt").read_text()] for name in ("train", "val")}
    assert len(every(texts_of(prepare(data_in(tmp_path, corpus="text", paths=paths["train"]))))) > 1


# --- filters and copies ----------------------------------------------------------------------------------


def write_copies(folder: Path) -> tuple[list[str], list[str], dict[str, Any]]:
    """Write files in which some texts are in both, some twice in one. Returns the texts, and the options of the paths."""
    held_out, training = texts(30, 1), texts(60, 2)
    held_out += [held_out[0], held_out[1] + " shoal"]
    training += [held_out[2], training[3], held_out[-1], training[4] + "!", held_out[2], held_out[5] + "!"]
    paths = [write_jsonl(folder / f"{name}.jsonl", rows) for name, rows in (("train", training), ("val", held_out))]
    return training, held_out, {"corpus": "jsonl", "paths": [str(paths[0])], "val_paths": [str(paths[1])]}


def test_copies_of_held_out_documents_are_removed_from_training_alone(tmp_path: Path) -> None:
    training, held_out, options = write_copies(tmp_path)
    prepared = prepare(data_in(tmp_path, deduplicate="exact", **options))
    first = [text for n, text in enumerate(training) if text not in held_out and text not in training[:n]]
    assert texts_of(prepared) == {"train": first, "val": held_out}
    assert {why: removal.count for why, removal in prepared.manifest.removed.items()} == {"exact duplicate": 4}
    assert prepared.notes == ()
    near = prepare(data_in(tmp_path, deduplicate="near", near_threshold=0.6, **options))
    assert texts_of(near)["val"] == held_out
    assert set(texts_of(near)["train"]) == {text for text in first if not text.endswith("!")}


def test_copies_are_counted_where_they_stay(tmp_path: Path) -> None:
    training, held_out, options = write_copies(tmp_path)
    prepared = prepare(data_in(tmp_path, **options))
    assert texts_of(prepared) == {"train": training, "val": held_out}
    named = ", ".join(f"{tmp_path}/train.jsonl:{line}" for line in (61, 63, 65))
    assert prepared.notes == (
        f"3 training documents equal a held-out one: {named}; data.deduplicate exact removes them",
    )
    again = prepare(data_in(tmp_path, **options))
    assert again.notes == ()
    assert tuple(again.manifest.overlaps()) == prepared.notes


def test_filters_of_single_documents_are_for_training_alone(tmp_path: Path) -> None:
    held_out, training = texts(20, 3), texts(40, 4)
    shortest = sorted(len(text.encode()) for text in training)[10]
    tested = write_jsonl(tmp_path / "tested.jsonl", [training[0], held_out[0]])
    prepared = prepare(
        data_in(
            tmp_path,
            corpus="jsonl",
            paths=[str(write_jsonl(tmp_path / "train.jsonl", training))],
            val_paths=[str(write_jsonl(tmp_path / "val.jsonl", held_out))],
            shortest_document=shortest,
            decontaminate=[str(tested)],
            decontaminate_ngram=5,
        )
    )
    assert texts_of(prepared)["val"] == held_out
    assert 0 < len(texts_of(prepared)["train"]) < 31
    assert set(texts_of(prepared)["train"]) <= {text for text in training[1:] if len(text.encode()) >= shortest}
    with pytest.raises(DataError, match="the filters removed every document"):
        prepare(data_in(tmp_path, corpus="jsonl", paths=[f"{tmp_path}/train.jsonl"], val_paths=[f"{tmp_path}/val.jsonl"], longest_document=1))  # fmt: skip


@pytest.mark.parametrize(
    ("tokenizer", "deduplicate", "deaths"),
    [("bytes", "none", (3, 8, 7)), ("bpe", "near", (2, 6, 5, 6, 9))],
)
def test_killed_again_and_again_it_ends_with_the_same_bytes(
    tmp_path: Path, tokenizer: str, deduplicate: str, deaths: tuple[int, ...]
) -> None:
    _, held_out, options = write_copies(tmp_path)
    options |= {"tokenizer": tokenizer, "tokenizer_vocab_size": 300, "deduplicate": deduplicate, "near_threshold": 0.6}
    for name in ("train", "val"):  # damaged records, to be counted once
        with (tmp_path / f"{name}.jsonl").open("a") as file:
            file.write("{\n")
    whole = prepare(data_in(tmp_path, **options, folder=str(tmp_path / "whole")))
    assert len(whole.counts["train"].shards) > 1
    assert len(whole.counts["val"].shards) > 1
    assert whole.counts["val"].documents == len(held_out)
    assert (whole.manifest.skips.count, whole.manifest.skips.damaged) == (2, 2)
    assert whole.manifest.overlap.count == (3 if deduplicate == "none" else 0)
    data = data_in(tmp_path, **options)
    folder = Path(data.folder) / folder_name(data, token_options(data, named_tokenizer(data)))
    progress = 0
    for die_at in deaths:
        process = start(data, die_at)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        journal = json.loads((folder / JOURNAL).read_text()) if (folder / JOURNAL).exists() else None
        done = _progress(journal) if journal else 0
        assert done >= progress, "nothing finished is lost"
        progress = done
    assert progress
    assert files_of(prepare(data)) == files_of(whole)


def _progress(journal: dict[str, Any]) -> int:
    return int(journal["filtered"]["segments"]) + sum(len(split["shards"]) for split in journal["splits"].values())


def test_a_held_out_file_that_changed_is_noticed(tmp_path: Path) -> None:
    _, held_out, options = write_copies(tmp_path)
    before = prepare(data_in(tmp_path, **options))
    write_jsonl(tmp_path / "val.jsonl", [*held_out[1:], "new"])
    with pytest.raises(DataError, match=r"has changed since .*: 1 changed \(.*val\.jsonl\)"):
        prepare(data_in(tmp_path, **options))
    after = prepare(data_in(tmp_path, **options, rebuild=True))
    assert texts_of(after)["val"] == [*held_out[1:], "new"]
    assert after.folder == before.folder


def test_folders_keep_their_names_without_held_out_files(tmp_path: Path) -> None:
    options = {"corpus": "jsonl", "paths": ["a.jsonl"], "val_fraction": 0.1}
    found = token_options(data_in(tmp_path, **options), None)
    assert found["val_fraction"] == 0.1
    assert not {"val_paths", "val_split"} & found.keys()
    assert folder_name(data_in(tmp_path, **options), found) == "jsonl-bytes-76bee596"
    held_out = token_options(data_in(tmp_path, **options, val_paths=["b.jsonl"]), None)
    assert held_out == {k: v for k, v in found.items() if k != "val_fraction"} | {"val_paths": ["b.jsonl"]}


# --- blends and runs -------------------------------------------------------------------------------------


def test_a_blend_with_held_out_files_in_one_source(tmp_path: Path) -> None:
    secret = [f"{text} secret secret secret" for text in texts(60, 5)]
    write_jsonl(tmp_path / "val.jsonl", secret)
    for seed, name in enumerate(("one", "two")):
        write_jsonl(tmp_path / f"{name}.jsonl", texts(60, seed))
    paths = {name: (str(tmp_path / f"{name}.jsonl"),) for name in ("one", "two", "val")}
    sources = {
        "one": BlendSource(corpus="jsonl", paths=paths["one"], val_paths=paths["val"], weight=1.0),
        "two": BlendSource(corpus="jsonl", paths=paths["two"], weight=1.0),
    }
    options = {"tokenizer": "bpe", "tokenizer_vocab_size": 300}
    dataset = prepare_dataset(data_in(tmp_path, sources=sources, val_fraction=0.3, **options))
    found = {name: texts_of(part) for name, part in dataset.parts.items()}
    assert found["one"] == {"train": texts(60, 0), "val": secret}
    assert every(found["two"]) == sorted(texts(60, 1))
    assert 0 < len(found["two"]["val"]) < 40
    assert dataset.counts["val"].documents == 60 + len(found["two"]["val"])
    assert len(dataset.tokenizer.encode(" shoal")) < 3, "a word of the training documents"
    assert len(dataset.tokenizer.encode(" secret")) > 4, "a word of the held-out ones"
    other = prepare_dataset(data_in(tmp_path, sources=sources, val_fraction=0.4, **options, rebuild=False))
    assert other.parts["one"].folder.name.split("-")[0] == "jsonl"
    assert texts_of(other.parts["one"]) == found["one"]


def run_config(folder: Path, **options: Any) -> Config:
    given = {
        "model.preset": "tiny", "model.dim": 16, "model.num_layers": 1, "model.num_heads": 2, "model.ffn_dim": 16,
        "data.tokenizer": "bytes", "data.seq_len": 32, "data.folder": folder / "data", "train.steps": 2,
        "train.global_batch": 2, "train.micro_batch": 2, "train.dtype": "float32", "train.eval_tokens": 1_000_000,
        "launch.runs": folder / "runs", "metrics.peak_tflops": 1.0, **{f"data.{k}": v for k, v in options.items()},
    }  # fmt: skip
    return resolve(None, [(key, str(value), "test") for key, value in given.items()]).config


def test_the_held_out_loss_of_a_run_is_over_exactly_those_tokens(tmp_path: Path) -> None:
    held_out = texts(12, 7)
    config = run_config(
        tmp_path,
        paths=write_parquet(tmp_path / "train.parquet", texts(40, 6)),
        val_paths=write_jsonl(tmp_path / "val.jsonl", held_out),
    )
    assert config.data.corpus == "files"
    run = Run.open(config, ALONE, NeverStop())
    complete(run)
    run.close()
    evaluation = read_metrics(run.folder.metrics_file).evaluations[-1]
    tokens = torch.tensor([token for text in held_out for token in (*text.encode(), END)])
    rows = (len(tokens) - 1) // 32
    inputs, labels = tokens[: rows * 32].view(rows, 32), tokens[1 : rows * 32 + 1].view(rows, 32)
    model = load_path(run.folder.path, device="cpu").model
    with torch.no_grad():
        loss = model.loss(model(inputs), labels).item() / labels.numel()
    assert math.isclose(evaluation.val_loss, loss, rel_tol=1e-5)
    per_byte = evaluation.val_loss * len(tokens) / sum(len(text.encode()) for text in held_out) / math.log(2)
    assert math.isclose(evaluation.val_bits_per_byte, per_byte)
    asked = argparse.Namespace(words=["where", str(run.folder.path)], document="40", step=None, json=False)
    with pytest.raises(
        DataError, match="no document 40 in the training; the training documents are 0 to 39, and held-out"
    ):
        look_at(asked, [], [])
