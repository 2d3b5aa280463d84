"""Blends of every format as a user trains them: killed, resumed in another layout with other weights, and accounted for."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard

from tests.cli.commands import Place
from tests.cli.public_datasets import alpaca, separated, texts, wikitext
from tests.data import token_writers
from tests.data.chats import CHATML, chat_folder, conversations, write_lines

Sources = dict[str, dict[str, Any]]
END = 256  # of the tokenizer `bytes`
ROWS = 60


class Blend(NamedTuple):
    """
    A blend's sources and layouts.

    write: writes the files and returns the sources. documents: their number in all files. off: the source with a weight of 0
    after the kill.
    """

    write: Callable[[Path], Sources]
    documents: int
    data: Mapping[str, Any]
    before: tuple[str, ...]
    after: tuple[str, ...]
    off: str
    bitwise: bool = True


def table(delimiter: str, found: list[str]) -> bytes:
    out = io.StringIO(newline="")
    rows: list[list[Any]] = [["text", "id"], *([text + "\nend", n] for n, text in enumerate(found))]
    csv.writer(out, delimiter=delimiter).writerows(rows)
    return out.getvalue().encode()


def lines(found: list[str], **more: Any) -> bytes:
    return "".join(json.dumps({"text": text, **more}) + "\n" for text in found).encode()


def arrow(found: list[str], open_writer: Callable[..., Any]) -> bytes:
    rows, sink = pa.table({"text": found}), pa.BufferOutputStream()
    with open_writer(sink, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=7)
    return bytes(sink.getvalue())


def write_documents(folder: Path) -> Sources:
    """Write the formats of documents, each with its own texts."""
    found = [texts(ROWS, seed, words=30) for seed in range(20)]
    pq.write_table(pa.table({"story": found[0], "id": range(ROWS)}), folder / "a.parquet")
    datasets.Dataset.from_dict({"text": found[1]}).save_to_disk(folder / "saved", num_shards=2)
    datasets.disable_progress_bars()
    files = {
        "a.jsonl.gz": gzip.compress(lines(found[2])),
        "a.jsonl.zst": zstandard.compress(lines(found[3], meta={"pile_set_name": "Books"})),
        "a.ndjson": lines(found[4]),
        "a.json": json.dumps([{"text": text} for text in found[5]]).encode(),
        "b.json.xz": lzma.compress(json.dumps([{"text": text} for text in found[6]]).encode()),
        "a.csv": table(",", found[7]),
        "a.tsv.gz": gzip.compress(table("\t", found[8])),
        "a.txt": separated(found[9]),
        "b.txt.gz": gzip.compress(separated(found[10])),
        "c.txt.zst": zstandard.compress(separated(found[11])),
        "d.txt.xz": lzma.compress(separated(found[12])),
        "a.arrow": arrow(found[13], pa.ipc.new_file),
        "b.arrow": arrow(found[14], pa.ipc.new_stream),
        "wiki.train.raw": "".join(row or " \n" for row in wikitext(15, 15)).encode(),
        "mixed/a.md": "\n".join(found[16][:30]).encode(),
        "mixed/b.jsonl": lines(found[17]),
        "mixed/c.csv": table(",", found[18]),
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return {
        "parquet": {"paths": ["a.parquet"], "text_key": "story"},
        "saved": {"corpus": "datasets", "paths": ["saved"]},
        "lines": {"paths": ["a.jsonl.gz", "a.jsonl.zst", "a.ndjson"]},
        "arrays": {"paths": ["a.json", "b.json.xz"]},
        "tables": {"paths": ["a.csv", "a.tsv.gz"]},
        "texts": {"paths": ["a.txt", "b.txt.gz", "c.txt.zst", "d.txt.xz"], "separator": "<|endoftext|>"},
        "arrow": {"paths": ["a.arrow", "b.arrow"]},
        "pages": {"corpus": "text", "paths": ["wiki.train.raw"], "wikitext": True},
        "mixed": {"corpus": "files", "paths": ["mixed"]},
    }  # fmt: skip


def write_tokens(folder: Path) -> Sources:
    """Write the formats of token files, each with its own documents; of megatron, one source names the .idx."""
    sources: Sources = {}
    for seed, write in enumerate((*token_writers.APPENDED, *token_writers.PREPENDED)):
        documents = [list(text.encode()) for text in texts(ROWS, seed, words=10)]
        path = write(folder / f"{seed}", documents, END)
        sources[write.__name__.replace("_", "-")] = {"corpus": "tokens", "paths": [path.name]}
    return sources


def write_conversations(folder: Path) -> Sources:
    """Write the formats of conversations, and a tokenizer with a chat template."""
    chat_folder(folder / "chatty", CHATML)
    columns = alpaca(ROWS, 30)
    records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    (folder / "a.json").write_text(json.dumps(records))
    pq.write_table(pa.table({name: list(each) for name, each in alpaca(ROWS, 32).items()}), folder / "b.parquet")
    write_lines(folder / "c.jsonl", [{"messages": chat} for chat in conversations(ROWS)])
    speakers = {"user": "human", "assistant": "gpt", "system": "system"}
    spoken = [
        {"id": n, "conversations": [{"from": speakers[m["role"]], "value": m["content"]} for m in chat]}
        for n, chat in enumerate(conversations(ROWS, seed=1))
    ]
    (folder / "d.json").write_text(json.dumps(spoken))
    return {
        "alpaca": {"paths": ["a.json"], "format": "alpaca"},
        "alpaca-prompt": {"paths": ["b.parquet"], "format": "alpaca", "template": "alpaca"},
        "messages": {"paths": ["c.jsonl"], "format": "messages"},
        "chatml": {"paths": ["c.jsonl"], "format": "messages", "template": "chatml", "learn": "all"},
        "sharegpt": {"paths": ["d.json"], "format": "sharegpt"},
    }


BLENDS = {
    "documents": Blend(
        write_documents, 16 * ROWS + 15 + 1 + ROWS, {"tokenizer": "bpe", "tokenizer_vocab_size": 400, "tokenizer_sample_bytes": 9_000},
        ("--launch.processes=2", "--parallel.dp_shard=2"), ("--launch.processes=1",), "arrays",
    ),
    "tokens": Blend(
        write_tokens, 9 * ROWS, {"tokenizer": "bytes"}, ("--launch.processes=1",),
        ("--launch.processes=2", "--parallel.tp=2"), "raw", bitwise=False,
    ),
    "conversations": Blend(
        write_conversations, 5 * ROWS, {"tokenizer": "chatty", "packing": "best_fit"},
        ("--launch.processes=2", "--parallel.pp=2"), ("--launch.processes=2", "--parallel.dp_shard=2"), "messages",
    ),
}  # fmt: skip


def write_recipe(place: Place, blend: Blend) -> dict[str, float]:
    """Write the recipe; return the weights of its sources."""
    sources = blend.write(place.folder)
    weights = {name: 1.0 + number for number, name in enumerate(sources)}
    recipe = yaml.safe_load((place.folder / "recipe.yaml").read_text())
    recipe["data"] = {
        **blend.data, "seq_len": 32, "val_fraction": 0.2,
        "sources": {name: {**source, "weight": weights[name]} for name, source in sources.items()},
    }  # fmt: skip
    recipe["model"]["num_layers"] = 2
    recipe["train"] |= {
        "steps": 24, "eval_every": 0, "sample_prompt": "", "repro": "bitwise" if blend.bitwise else "fast"
    }  # fmt: skip
    (place.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return weights


@pytest.mark.parametrize(
    "name", ["documents", *(pytest.param(name, marks=pytest.mark.ci) for name in ("tokens", "conversations"))]
)
def test_every_format_in_a_run_that_is_killed_and_resumed(tmp_path: Path, name: str) -> None:
    blend, place = BLENDS[name], Place(tmp_path)
    weights = write_recipe(place, blend)
    place.kill_in_step(14, "all", "recipe.yaml", *blend.before)
    last = list(weights)[-1]
    changed = {**weights, last: 30.0, blend.off: 0.0}
    flags = [f"--data.sources.{source}.weight={changed[source]}" for source in (last, blend.off)]
    output = place.good("train", "recipe.yaml", "--name", "all", *blend.after, *flags)
    resumed = re.search(r"resumed from runs/all/checkpoints/step-0*(\d+)\n", output)
    assert resumed is not None, output
    assert "is gone" not in output, "the tokenizer is there"
    assert f"data.sources.{last}.weight was {weights[last]} and is 30.0 from step {int(resumed[1]) + 1}" in output
    check_ledger(place, list(weights))
    check_source_losses(place, weights, last, blend.off)
    check_look(place, blend.documents, list(weights))

    stages = json.dumps({f"{resumed[1]} steps": changed})
    place.good("train", "recipe.yaml", "--name", "whole", "--launch.processes=1", f"--data.stages={stages}")
    found, expected = place.losses("all"), place.losses("whole")
    if blend.bitwise:
        assert found == expected
    else:
        assert [line[1] for line in found] == pytest.approx([line[1] for line in expected], rel=1e-4)


def check_ledger(place: Place, sources: list[str]) -> None:
    """Check that the ledger proves that each row of each source was read once per epoch, and that all sources were read."""
    ledger = json.loads(place.answer("ledger", "all", "--json"))
    assert ledger["passed"]
    assert ledger["lives"] == 2
    assert ledger["samples"] == 24 * 16
    assert list(ledger["sources"]) == sources
    for epochs in ledger["sources"].values():
        assert epochs["0"]["trained"] > 0
        assert all(each["again"] == each["skipped"] == each["passed_over"] == 0 for each in epochs.values())


def check_source_losses(place: Place, weights: dict[str, float], most: str, off: str) -> None:
    """Check that the last step read the source with the largest weight, not the one with 0, and that all are evaluated."""
    last = [line["source_loss"] for line in place.metrics("all") if "source_loss" in line][-1]
    assert most in last
    assert off not in last
    [held_out] = [line["val_source_loss"] for line in place.metrics("all") if "val_loss" in line]
    assert set(held_out) == set(weights)


def check_look(place: Place, documents: int, sources: list[str]) -> None:
    """Check that no document is missing, and that the documents of a step's row are found in that step."""
    look = place.good("data", "all", "--rows", "8")
    assert "[document" in look
    counts = re.findall(r"^(?:\S+ +train| +val) +([\d,]+)", look, re.MULTILINE)
    assert sum(int(count.replace(",", "")) for count in counts) == documents
    assert all(name[:12] in look for name in sources)  # a long name is cut
    [first, *_] = json.loads(place.answer("data", "at", "all", "--step", "1", "--json"))
    assert f"── row {first['row']} of {first['source']}, read at position 0 " in look
    [row, *_] = json.loads(place.answer("data", "at", "all", "--step", "20", "--json"))
    document = f"{row['source']}:{row['documents'][-1]}"
    seen = json.loads(place.answer("data", "where", "all", "--document", document, "--json"))
    assert any(each["step"] == 20 and each["row"] == row["row"] for each in seen)
