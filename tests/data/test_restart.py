"""Processes that are killed, or run at the same time, while they prepare one folder of tokens."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from shoal.config.data_options import Data
from shoal.data.prepare import Prepared, prepare
from shoal.data.stored.files import exclusive_lock
from shoal.data.stored.manifest import JOURNAL
from shoal.data.token_folder import folder_name, named_tokenizer, token_options
from tests.data.conftest import MakeData

# Prepares tokens, and kills itself at its n-th fsync. If that is of a file rather than a folder, it first halves the file.
PREPARE = """
import json, os, signal, stat, sys
from shoal.config.data_options import Data
from shoal.system import disk
from shoal.data.prepare import prepare

options, die_at = json.loads(sys.argv[1]), int(sys.argv[2])
options |= {key: tuple(options[key]) for key in ("paths", "val_paths", "decontaminate")}
writes = 0
real_sync = os.fsync

def sync(descriptor):
    global writes
    writes += 1
    if writes == die_at:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    real_sync(descriptor)

disk.os.fsync = sync
prepared = prepare(Data(**options), lambda phase, done, total: print(phase, flush=True))
print("data_id", prepared.data_id)
"""


def start(data: Data, die_at: int = 0) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", PREPARE, json.dumps(asdict(data)), str(die_at)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def files_of(prepared: Prepared) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(prepared.folder.iterdir()) if p.name != ".lock"}


@pytest.mark.parametrize(("tokenizer", "kind"), [("bytes", "text"), ("bpe", "parquet")])
def test_killed_again_and_again_it_ends_with_the_same_bytes(
    make_data: MakeData, corpus: Path, tokenizer: str, kind: str
) -> None:
    if kind == "parquet":
        texts: list[str | None] = [path.read_text("utf-8") for path in sorted(corpus.iterdir())]
        table = pa.table({"text": [*texts[:20], None, *texts[20:]]})
        pa.parquet.write_table(table, corpus / "texts.parquet", row_group_size=7)
    else:
        (corpus / "bad.txt").write_bytes(b"\xff")
    options = {"corpus": kind, "tokenizer": tokenizer, "tokenizer_vocab_size": 300}
    data = make_data(**options)
    whole = prepare(make_data(**options, folder=data.folder + "-whole"))
    assert len(whole.counts["train"].shards) > 2
    assert len(whole.counts["val"].shards) > 0
    folder = Path(data.folder) / folder_name(data, token_options(data, named_tokenizer(data)))
    finished: dict[str, int] = {}
    for die_at in (5, 6, 7, 3):  # each write syncs the file, then its folder
        process = start(data, die_at)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        assert not (folder / "manifest.json").exists()
        journal = json.loads((folder / JOURNAL).read_text())
        listed = [s["name"] for split in journal["splits"].values() for s in split["shards"]]
        assert {name: (folder / name).stat().st_mtime_ns for name in finished} == finished, "written only once"
        finished = {name: (folder / name).stat().st_mtime_ns for name in listed}
    assert finished
    ended = prepare(data)
    assert {name: (folder / name).stat().st_mtime_ns for name in finished} == finished
    assert files_of(ended) == files_of(whole)
    assert ended.notes == whole.notes


@pytest.mark.parametrize("deduplicate", ["exact", "near"])
def test_killed_at_every_write_it_removes_the_same_documents(
    make_data: MakeData, corpus: Path, deduplicate: str
) -> None:
    for number in range(0, 40, 3):  # copies and near copies of earlier documents, which later segments have to know
        text = (corpus / f"file{number:02d}.py").read_text("utf-8")
        (corpus / f"x{number:02d}.py").write_text(text, "utf-8")
        (corpus / f"y{number:02d}.py").write_text(text + "# the end\n", "utf-8")
    whole = prepare(make_data(deduplicate=deduplicate, near_threshold=0.6, folder=str(corpus) + "-whole"))
    removed = {reason: removal.count for reason, removal in whole.manifest.removed.items()}
    assert removed["exact duplicate"] == 14
    assert ("near duplicate" in removed) == (deduplicate == "near")
    data = make_data(deduplicate=deduplicate, near_threshold=0.6)
    folder = Path(data.folder) / folder_name(data, token_options(data, named_tokenizer(data)))
    segments = 0
    for die_at in (1, 4, 5, 6, 8, 11, 6):  # in the filters' pass, between it and the shards, and in the shards
        process = start(data, die_at)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        filtered = json.loads((folder / JOURNAL).read_text())["filtered"] if (folder / JOURNAL).exists() else {}
        assert filtered.get("segments", 0) >= segments, "no finished segment is lost"
        segments = filtered.get("segments", 0)
    assert segments > 1
    assert files_of(prepare(data)) == files_of(whole)


def test_a_corpus_that_changed_since_the_kill_starts_anew(make_data: MakeData, corpus: Path) -> None:
    data = make_data()
    start(data, 9).communicate(timeout=60)
    (corpus / "file00.py").write_text("something else altogether")
    whole = prepare(make_data(folder=data.folder + "-whole"))
    assert files_of(prepare(data)) == files_of(whole)


def test_of_two_processes_one_works(make_data: MakeData) -> None:
    processes = [start(make_data()) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0].split("\n") for process in processes]
    assert sum("tokens" in lines for lines in outputs) == 1
    assert len({lines[-2] for lines in outputs}) == 1
    assert outputs[0][-2].startswith("data_id ")


def test_who_waits_says_so_and_goes_on(make_data: MakeData) -> None:
    data = make_data()
    folder = Path(data.folder) / folder_name(data, token_options(data, named_tokenizer(data)))
    folder.mkdir(parents=True)
    with exclusive_lock(folder / ".lock", lambda: None):
        process = start(data)
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting for another process\n"
    output, _ = process.communicate(timeout=60)
    assert "data_id" in output
    assert process.returncode == 0
