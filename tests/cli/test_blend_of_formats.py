"""A blend of every format as a user trains it: killed, resumed on other processes with other weights, and accounted for."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.cli.commands import Place, gone, wait_for, workers_of

END = 256  # of the tokenizer `bytes`


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Write a recipe whose sources have seven formats."""
    place = Place(tmp_path)
    texts = [f"story {n}: " + "the tide comes in and goes out. " * (n % 7 + 1) for n in range(60)]
    pq.write_table(pa.table({"story": texts}), tmp_path / "a.parquet")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as lines:
        lines.writelines(json.dumps({"text": text.upper()}) + "\n" for text in texts)
    (tmp_path / "c.json").write_text(json.dumps([{"text": text[::-1]} for text in texts]))
    with (tmp_path / "d.csv").open("w", newline="") as table:
        csv.writer(table).writerows([["text", "id"], *([text + "\nend", n] for n, text in enumerate(texts))])
    (tmp_path / "e.txt").write_text("\n====\n".join(texts))
    tokens = [token for text in texts for token in (*text.encode(), END)]
    np.array(tokens, np.uint16).tofile(tmp_path / "f.bin")
    chats = [{"instruction": f"Say {n}.", "input": "", "output": f"I say {n}. " * 9} for n in range(60)]
    (tmp_path / "g.json").write_text(json.dumps(chats))
    sources: dict[str, dict[str, Any]] = {
        "parquet": {"paths": ["a.parquet"], "text_key": "story"}, "lines": {"paths": ["b.jsonl.gz"]},
        "array": {"paths": ["c.json"]}, "table": {"paths": ["d.csv"]}, "text": {"paths": ["e.txt"], "separator": "===="},
        "tokens": {"paths": ["f.bin"], "corpus": "tokens"}, "chats": {"paths": ["g.json"], "format": "alpaca"},
    }  # fmt: skip
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    recipe["data"] = {
        "tokenizer": "bytes", "seq_len": 32, "sources": {n: {**s, "weight": 1 + i} for i, (n, s) in enumerate(sources.items())},
    }  # fmt: skip
    recipe["train"] |= {"steps": 24, "eval_every": 0, "sample_prompt": ""}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return place


def test_every_format_in_one_run_that_is_killed_and_resumed(place: Place) -> None:
    process = place.start("train", "recipe.yaml", "--name", "all", "--parallel.dp_shard", "2")
    wait_for(process, "step 13/24")
    workers = workers_of(process)
    process.kill()
    process.communicate()
    assert gone(workers)
    changed = ["--launch.processes", "1", "--data.sources.chats.weight", "30", "--data.sources.lines.weight", "0"]
    output = place.good("train", "recipe.yaml", "--name", "all", *changed)
    assert "resumed from runs/all/checkpoints/step-000000" in output
    assert "is gone" not in output, "the tokenizer is built in"
    assert "data.sources.chats.weight was 7.0 and is 30.0 from step" in output
    report = place.good("ledger", "all")
    assert "PASS: each sample was trained on once per epoch so far" in report
    names = ("parquet", "lines", "array", "table", "text", "tokens", "chats")
    assert all(f"\n{name}, epoch 0: " in report for name in names)
    last = [line["source_loss"] for line in place.metrics("all") if "source_loss" in line][-1]
    assert "lines" not in last
    assert "chats" in last
    [held_out] = [line["val_source_loss"] for line in place.metrics("all") if "val_loss" in line]
    assert set(held_out) == set(names)
    look = place.good("data", "all", "--rows", "8")
    assert "### Response:" in look or "[document" in look
    assert all(name in look for name in names)
    [row, *_] = json.loads(place.answer("data", "at", "all", "--step", "20", "--json"))
    document = f"{row['source']}:{row['documents'][-1]}"
    seen = json.loads(place.answer("data", "where", "all", "--document", document, "--json"))
    assert any(each["step"] == 20 and each["row"] == row["row"] for each in seen)
