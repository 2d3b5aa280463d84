"""Token files of other trainers: rows equal to those that shoal prepares itself, and every change noticed."""

from __future__ import annotations

import json
import os
import resource
import struct
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from shoal.config.data_options import Data
from shoal.config.options import Config, Model, Optim, Train
from shoal.config.run_options import Launch, Metrics
from shoal.data import token_corpus
from shoal.data.check import check_tokens
from shoal.data.decode import held_out_text
from shoal.data.document_index import find_documents
from shoal.data.packing.pack import IGNORED_LABEL, RowArrays
from shoal.data.prepare import Prepared, open_prepared, prepare, prepared_rows
from shoal.errors import DataError
from shoal.run.folder import RunFolder
from shoal.run.jsonl import whole_lines
from shoal.training.loop import train
from tests.data import token_writers as writers
from tests.data.token_writers import APPENDED, PREPENDED, Documents, Writer
from tests.parallel.layouts import NeverStop

SEQ_LEN = 32


class Own(NamedTuple):
    """A corpus that shoal prepared, and its documents as ids without their ends."""

    prepared: Prepared
    train: Documents
    val: Documents
    tokenizer: str

    @property
    def end(self) -> int:
        return self.prepared.tokenizer.eot_id


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Own:
    """Prepare 60 documents with a trained BPE of 300 tokens."""
    folder = tmp_path_factory.mktemp("own")
    lines = [json.dumps({"text": f"document {n}: più, 漢字 🐟 " + "some words again " * (n % 9)}) for n in range(60)]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    data = Data(
        corpus="jsonl",
        paths=(str(folder / "texts.jsonl"),),
        folder=str(folder),
        tokenizer_vocab_size=300,
        val_fraction=0.2,
    )
    prepared = prepare(data)
    return Own(
        prepared,
        documents_of(prepared, "train"),
        documents_of(prepared, "val"),
        str(prepared.folder / "tokenizer.json"),
    )


def documents_of(prepared: Prepared, split: Any) -> Documents:
    stream = prepared.streams[split]
    starts = [*stream.starts(0, stream.num_tokens).tolist(), stream.num_tokens]
    return [stream.read(a, b).tolist()[:-1] for a, b in pairwise(starts)]


def token_data(folder: Path, *paths: Path | str, **changes: Any) -> Data:
    options: dict[str, Any] = {"corpus": "tokens", "tokenizer": "bytes", "seq_len": SEQ_LEN, **changes}
    return Data(paths=tuple(map(str, paths)), folder=str(folder / "data"), **options)


def all_rows(prepared: Prepared, split: Any, document_mask: bool = True) -> RowArrays:
    rows = prepared.split(split, seq_len=SEQ_LEN, document_mask=document_mask)
    return rows.read(np.arange(len(rows)))


def assert_same_rows(one: RowArrays, other: RowArrays) -> None:
    for name in ("tokens", "labels", "positions", "document_ids"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


@pytest.mark.parametrize("writer", APPENDED)
def test_rows_equal_those_that_shoal_prepares(own: Own, tmp_path: Path, writer: Writer) -> None:
    train, val = writer(tmp_path / "tokens", own.train, own.end), writer(tmp_path / "held", own.val, own.end)
    data = token_data(tmp_path, train, val_paths=(str(val),), tokenizer=own.tokenizer)
    prepared = prepare(data)
    for split in ("train", "val"):
        for mask in (False, True):
            assert_same_rows(all_rows(prepared, split, mask), all_rows(own.prepared, split, mask))
        theirs, ours = prepared.counts[split], own.prepared.counts[split]
        assert replace(theirs, shards=()) == replace(ours, shards=()), "documents, tokens and bytes of text"
    assert held_out_text(prepared) == held_out_text(own.prepared)
    assert open_prepared(prepared.folder).data_id == prepared.data_id
    manifest, rows = prepared_rows(data)
    assert manifest is not None
    assert rows == len(prepared.split("train", seq_len=data.seq_len))
    assert manifest.splits == prepared.counts


@pytest.mark.parametrize("writer", PREPENDED)
def test_rows_of_llm_c_follow_its_borders_over_files(own: Own, tmp_path: Path, writer: Writer) -> None:
    """The second file begins in the middle of a document, as llm.c cuts them."""
    whole = [token for ids in own.train for token in [own.end, *ids]]
    cut = whole.index(own.end, len(whole) // 2) + 5
    magic, version = (20240520, 1) if writer is writers.llm_c else (20240801, 7)
    for name, tokens in (("a", whole[:cut]), ("b", whole[cut:])):
        writers.llm_c_file(tmp_path / f"{name}.bin", tokens, magic, version)
    val = writer(tmp_path / "held", own.val, own.end)
    data = token_data(tmp_path, tmp_path / "a.bin", tmp_path / "b.bin", val_paths=(str(val),), tokenizer=own.tokenizer)
    prepared = prepare(data)
    assert_same_rows(
        all_rows(prepared, "train"), brute_force(whole, [at for at, t in enumerate(whole) if t == own.end])
    )
    assert prepared.counts["train"].documents == len(own.train)
    for split in ("train", "val"):
        assert prepared.counts[split].text_bytes == own.prepared.counts[split].text_bytes
    assert held_out_text(prepared) == held_out_text(own.prepared)


def brute_force(tokens: Sequence[int], starts: Sequence[int]) -> RowArrays:
    """Return all rows with document masks, token by token."""
    found: dict[str, list[list[int]]] = {"tokens": [], "labels": [], "positions": [], "ids": []}
    for row in range((len(tokens) - 1) // SEQ_LEN):
        position = document = -1
        line: dict[str, list[int]] = {name: [] for name in found}
        for at in range(row * SEQ_LEN, (row + 1) * SEQ_LEN):
            begins = at in starts or at == row * SEQ_LEN
            position, document = (0 if begins else position + 1), document + begins
            label = IGNORED_LABEL if at + 1 in starts else tokens[at + 1]
            for name, value in zip(found, (tokens[at], label, position, document), strict=True):
                line[name].append(value)
        for name in found:
            found[name].append(line[name])
    arrays = [np.array(found[name]) for name in found]
    return RowArrays(*arrays)


@pytest.mark.parametrize("writer", [writers.nanogpt, writers.megatron])
def test_rows_over_a_file_border(own: Own, tmp_path: Path, writer: Writer) -> None:
    """Three files in a folder, one with less than a row, are one stream; another kind of file is counted."""
    (tmp_path / "many").mkdir()
    for name, documents in (("0", own.train[:20]), ("1", own.train[20:21]), ("2", own.train[21:])):
        writer(tmp_path / "many" / name, documents, own.end)
    (tmp_path / "many" / "meta.pkl").write_bytes(b"\x80")
    val = writer(tmp_path / "held", own.val, own.end)
    for paths in ([tmp_path / "many"], [tmp_path / "many" / "*.bin"], sorted((tmp_path / "many").glob("*.bin"))):
        prepared = prepare(token_data(tmp_path, *paths, val_paths=(str(val),), tokenizer=own.tokenizer))
        assert_same_rows(all_rows(prepared, "train"), all_rows(own.prepared, "train"))
        assert (".pkl (1)" in "".join(prepared.notes)) == (paths == [tmp_path / "many"])


def test_the_last_documents_are_held_out(own: Own, tmp_path: Path) -> None:
    whole = prepare(
        token_data(
            tmp_path, writers.nanogpt(tmp_path / "t", own.train, own.end), tokenizer=own.tokenizer, val_fraction=0.3
        )
    )
    train, val = documents_of(whole, "train"), documents_of(whole, "val")
    assert [*train, *val] == list(own.train)
    counts = whole.counts["train"].tokens, whole.counts["val"].tokens
    assert abs(counts[1] / sum(counts) - 0.3) < max(map(len, own.train)) / sum(counts)
    assert whole.counts["val"].documents == len(val)
    indexed = prepare(
        token_data(
            tmp_path, writers.megatron(tmp_path / "m", own.train, own.end), tokenizer=own.tokenizer, val_fraction=0.3
        )
    )
    assert documents_of(indexed, "val") == val
    assert indexed.counts["val"] == whole.counts["val"]


def test_tokens_without_documents_are_cut_with_a_note(tmp_path: Path) -> None:
    np.arange(1000, dtype=np.uint16).__mod__(256).tofile(tmp_path / "flat.bin")
    prepared = prepare(token_data(tmp_path, tmp_path / "flat.bin", val_fraction=0.25))
    assert (prepared.counts["train"].tokens, prepared.counts["val"].tokens) == (750, 250)
    assert "no document border (token 256, '<|endoftext|>')" in "".join(prepared.notes)


@pytest.mark.parametrize("bos", [True, False])
def test_a_tokenizer_that_begins_documents(own: Own, tmp_path: Path, bos: bool) -> None:
    """llm.c puts Llama 3's begin token before documents, and no end token."""
    tokenizer = json.loads(Path(own.tokenizer).read_text())
    tokenizer["added_tokens"].append(
        {
            "id": 300,
            "content": "<begin>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    )
    special = {"id": "<begin>", "ids": [300], "tokens": ["<begin>"]}
    single = [{"SpecialToken": {"id": "<begin>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokenizer["post_processor"] = (
        {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<begin>": special},
        }
        if bos
        else None
    )
    (tmp_path / "t.json").write_text(json.dumps(tokenizer))
    path = writers.llm_c(tmp_path / "tokens", own.train, 300)
    prepared = prepare(token_data(tmp_path, path, tokenizer=str(tmp_path / "t.json")))
    found = sum(counts.documents for counts in prepared.counts.values())
    assert found == (len(own.train) if bos else 0)


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """Write a nanoGPT file of 50 documents of bytes."""
    return writers.nanogpt(tmp_path / "one", [list(range(32, 100))] * 50, 256)


def test_changed_files_are_noticed(one: Path, tmp_path: Path) -> None:
    data = token_data(tmp_path, one)
    first = prepare(data)
    os.utime(one, ns=(1, 1))
    assert prepare(data).data_id == first.data_id, "another time alone is not a change"
    content = bytearray(one.read_bytes())
    content[-4] += 1
    one.write_bytes(content)
    with pytest.raises(DataError, match=r"1 changed \(.*one.bin\); `--data.rebuild true`"):
        prepare(data)
    with pytest.raises(DataError, match="the corpus has changed"):
        open_prepared(first.folder)
    again = prepare(replace(data, rebuild=True))
    assert again.data_id != first.data_id
    assert prepare(data).data_id == again.data_id
    one.unlink()
    with pytest.raises(DataError, match=r"no such file or folder: .*one.bin"):
        prepare(data)


def test_moved_files_are_the_same_data(one: Path, tmp_path: Path) -> None:
    first = prepare(token_data(tmp_path, one))
    (tmp_path / "elsewhere").mkdir()
    one.rename(tmp_path / "elsewhere" / "one.bin")
    assert prepare(token_data(tmp_path, tmp_path / "elsewhere")).data_id == first.data_id


@pytest.mark.parametrize("damage", [b"", b"{", b'{"format": 2}', b"[]"])
def test_a_damaged_record_is_made_again(one: Path, tmp_path: Path, damage: bytes) -> None:
    first = prepare(token_data(tmp_path, one))
    (first.folder / token_corpus.RECORD).write_bytes(damage)
    (first.folder / "tokenizer.json").write_bytes(damage)
    assert prepare(token_data(tmp_path, one)).manifest == first.manifest
    assert open_prepared(first.folder).data_id == first.data_id


def test_an_id_beyond_the_vocabulary_is_named_when_it_is_read(tmp_path: Path) -> None:
    tokens = np.tile(np.arange(200, dtype=np.int32), 200)
    tokens[::200] = 256
    tokens[12_345] = 300
    tokens.tofile(tmp_path / "t.bin")
    prepared_data = token_data(tmp_path, tmp_path / "t.bin", token_type="int32")
    with pytest.raises(
        DataError, match=r"t.bin: token 12,345 \(byte 49,380\) is 300, not an id of data.tokenizer bytes, which has 257"
    ):
        prepare(prepared_data)
    tokens[12_345] = -1
    tokens.tofile(tmp_path / "t.bin")
    with pytest.raises(DataError, match=r"token 12,345 \(byte 49,380\) is -1"):
        prepare(prepared_data)


def test_ids_are_checked_in_rows_and_all_of_them_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The count reads a sample only, which misses the wrong id."""
    monkeypatch.setattr("shoal.data.text_bytes.EXACT_TOKENS", 1000)
    monkeypatch.setattr("shoal.data.text_bytes.SAMPLES", 4)
    monkeypatch.setattr("shoal.data.text_bytes.SAMPLE_TOKENS", 100)
    tokens = np.tile(np.arange(200, dtype=np.uint16), 1000)
    tokens[::200] = 256
    tokens[12_345] = 300
    tokens.tofile(tmp_path / "t.bin")
    prepared = prepare(token_data(tmp_path, tmp_path / "t.bin"))
    counts = prepared.counts["val"]
    assert counts.estimated
    assert (counts.documents, counts.text_bytes) == pytest.approx((50, 10_000 * 199 / 200), rel=0.1)
    assert "from 400 of its 9,999 tokens" in "".join(prepared.notes)
    rows = prepared.split("train", seq_len=SEQ_LEN)
    rows.read([12_345 // SEQ_LEN - 1])
    with pytest.raises(DataError, match=r"token 12,345 .*is 300"):
        rows.read([12_345 // SEQ_LEN])
    with pytest.raises(DataError, match=r"token 12,345 .*is 300"):
        check_tokens(prepared)
    tokens[12_345] = 3
    tokens.tofile(tmp_path / "t.bin")
    said = check_tokens(prepare(token_data(tmp_path, tmp_path / "t.bin", rebuild=True)))
    assert said == "checked: all 200,000 ids are in the vocabulary of 257; 1,001 documents"


def test_checking_shards_compares_their_checksums(own: Own, tmp_path: Path) -> None:
    counts = own.prepared.counts.values()
    tokens, documents = sum(c.tokens for c in counts), sum(c.documents for c in counts)
    assert (
        check_tokens(own.prepared)
        == f"checked: all {tokens:,} tokens of 2 shards match their checksums; {documents} documents"
    )
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in own.prepared.folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    shard = copy / own.prepared.counts["val"].shards[0].name
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"val-00000\.safetensors was altered"):
        check_tokens(open_prepared(copy))


@pytest.mark.parametrize("writer", [writers.nanogpt, writers.llm_c, writers.megatron_wide])
def test_documents_have_numbers(own: Own, tmp_path: Path, writer: Writer) -> None:
    prepared = prepare(token_data(tmp_path, writer(tmp_path / "t", own.train, own.end), tokenizer=own.tokenizer))
    for split in ("train", "val"):
        stream, index = prepared.streams[split], find_documents(prepared, split)
        starts = [*stream.starts(0, stream.num_tokens).tolist(), stream.num_tokens]
        assert [index.document_span(number) for number in range(index.num_documents)] == list(pairwise(starts))
        assert [index.documents_in(token, token + 1)[0] for token in range(stream.num_tokens)] == [
            number for number, (a, b) in enumerate(pairwise(starts)) for _ in range(b - a)
        ]
        for wrong in (-1, index.num_documents):
            with pytest.raises(IndexError):
                index.document_span(wrong)
        with pytest.raises(IndexError):
            index.documents_in(0, stream.num_tokens + 1)
    files = sorted(prepared.folder.glob("documents-*"))
    times = [path.stat().st_mtime_ns for path in files]
    find_documents(prepared, "train")
    assert len(files) == 2
    assert times == [path.stat().st_mtime_ns for path in files], "made once"


def test_tokens_before_the_first_border_are_a_document(tmp_path: Path) -> None:
    path = writers.llm_c_file(tmp_path / "t.bin", [1, 2, 256, 3, 4, 256, *[5] * 50], 20240520, 1)
    index = find_documents(prepare(token_data(tmp_path, path)), "train")
    assert [index.document_span(number) for number in range(index.num_documents)] == [(0, 2), (2, 5)]


def test_ten_billion_tokens_open_at_once(tmp_path: Path) -> None:
    """A sparse file: reading it whole would take minutes. Its memory is bounded, too."""
    count = 10_000_000_000
    with (tmp_path / "big.bin").open("wb") as file:
        file.truncate(2 * count)
        for at in (4_000_000_000, 9_500_000_100):
            file.seek(2 * at)
            file.write(struct.pack("<H", 256))
    data = token_data(tmp_path, tmp_path / "big.bin")
    prepare(data)
    before = resource.getrusage(resource.RUSAGE_SELF)
    prepared = prepare(data)
    rows = prepared.split("train", seq_len=SEQ_LEN, document_mask=True)
    row = rows.read([(4_000_000_000 // SEQ_LEN), len(rows) - 1])
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert row.tokens[0, 0] == 256
    assert row.positions[0, :3].tolist() == [0, 0, 1]
    assert prepared.counts["train"].tokens == 9_500_000_101
    assert after.ru_maxrss - before.ru_maxrss < 50 << 10


def test_a_run_trains_on_each_format(own: Own, tmp_path: Path) -> None:
    """The same documents give the same losses in every format that has them in the same order of tokens."""
    losses = {}
    threads = torch.get_num_threads()
    for writer in (writers.nanogpt, writers.megatron, writers.raw, writers.llm_c):
        folder = tmp_path / writer.__name__
        folder.mkdir()
        train_file, held = writer(folder / "t", own.train, own.end), writer(folder / "held", own.val, own.end)
        config = Config(
            model=Model(dim=32, num_layers=1, num_heads=2, max_seq_len=SEQ_LEN),
            data=token_data(folder, train_file, val_paths=(str(held),), tokenizer=own.tokenizer, document_mask=True),
            optim=Optim(lr=1e-2, warmup_steps=1),
            train=Train(steps=2, global_batch=4, micro_batch=4, dtype="float32", sample_prompt=""),
            metrics=Metrics(peak_tflops=1.0),
            launch=Launch(runs=str(folder), name="run"),
        )
        train(config, NeverStop())
        lines = whole_lines(RunFolder.of(config).path / "metrics.jsonl")
        losses[writer.__name__] = [line[key] for line in lines for key in ("loss", "val_bits_per_byte") if key in line]
    torch.set_num_threads(threads)
    assert losses["nanogpt"] == losses["megatron"] == losses["raw"]
    assert len(losses["llm_c"]) == 3
