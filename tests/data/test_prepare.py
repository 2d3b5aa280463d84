"""Prepared tokens, compared with the corpus: nothing lost, nothing invented, every change noticed."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import resource
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import tokenizers

from shoal.config.data_options import Data
from shoal.data.decode import held_out_text
from shoal.data.prepare import Prepared, open_prepared, prepare
from shoal.data.split import fraction_of
from shoal.data.stored.manifest import SPLITS
from shoal.data.token_folder import token_options
from shoal.data.tokens.tokenize import byte_tokenizer
from shoal.errors import ConfigError, DataError
from shoal.resolve.resolve import resolve
from tests.data.conftest import MakeData


def texts_of(prepared: Prepared) -> dict[str, list[str]]:
    """Return each split's documents, decoded one by one, in order."""
    texts: dict[str, list[str]] = {}
    for name in SPLITS:
        stream = prepared.streams[name]
        starts = [*stream.starts(0, stream.num_tokens).tolist(), stream.num_tokens]
        documents = [stream.read(a, b).tolist() for a, b in itertools.pairwise(starts)]
        assert all(ids[-1] == prepared.tokenizer.eot_id for ids in documents)
        assert not [1 for ids in documents if prepared.tokenizer.eot_id in ids[:-1]]
        texts[name] = [prepared.tokenizer.decode(ids[:-1]) for ids in documents]
    return texts


def files_of(prepared: Prepared) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(prepared.folder.iterdir()) if p.name != ".lock"}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_every_document_is_in_one_split_and_comes_back(make_data: MakeData, corpus: Path, tokenizer: str) -> None:
    prepared = prepare(make_data(tokenizer=tokenizer, tokenizer_vocab_size=300))
    texts = texts_of(prepared)
    originals = [path.read_text("utf-8") for path in sorted(corpus.iterdir())]
    for name, held in [("train", False), ("val", True)]:
        assert texts[name] == [t for t in originals if (fraction_of(t.encode())[0] < 0.2) is held]
        counts = prepared.counts[name]  # type: ignore[index]
        assert counts.documents == len(texts[name]) > 0
        assert counts.text_bytes == sum(len(t.encode()) for t in texts[name])
        assert counts.tokens == sum(len(prepared.tokenizer.encode(t)) + 1 for t in texts[name])
    assert len(prepared.counts["train"].shards) > 1
    assert held_out_text(prepared) == "".join(texts["val"]).encode()


def test_the_tokenizer_has_seen_training_documents_only(tmp_path: Path, make_data: MakeData) -> None:
    """A word frequent in held-out documents alone does not become a token."""
    folder = tmp_path / "words"
    folder.mkdir()
    for number in range(200):
        text = f"{number} common common common"
        held = fraction_of((text + " secret" * 9).encode())[0] < 0.2
        (folder / f"{number}.txt").write_text(text + (" secret" if held else " public") * 9)
    tokenizer = prepare(make_data(paths=(str(folder),), tokenizer="bpe", tokenizer_vocab_size=300)).tokenizer
    assert len(tokenizer.encode(" common")) == 1
    assert len(tokenizer.encode(" secret")) > 1


def test_twice_is_once(make_data: MakeData) -> None:
    first = prepare(make_data())
    stamps = {p.name: p.stat().st_mtime_ns for p in first.folder.iterdir()}
    second = prepare(make_data())
    assert {p.name: p.stat().st_mtime_ns for p in second.folder.iterdir()} == stamps
    assert second.data_id == first.data_id


def test_the_split_of_a_document_does_not_depend_on_the_others(make_data: MakeData, corpus: Path) -> None:
    before = texts_of(prepare(make_data()))
    shutil.copy(corpus / "file05.py", corpus / "a_copy.py")
    (corpus / "file07.py").rename(corpus / "zz_renamed.py")
    (corpus / "new.txt").write_text("an added document")
    after = texts_of(prepare(make_data(rebuild=True)))
    for name in SPLITS:
        assert set(before[name]) <= set(after[name]) <= {*before[name], "an added document"}
    assert not set(after["train"]) & set(after["val"])


@pytest.mark.parametrize("val_fraction", [1e-9, 1 - 1e-9])
def test_neither_split_of_a_small_corpus_is_empty(make_data: MakeData, val_fraction: float) -> None:
    texts = texts_of(prepare(make_data(val_fraction=val_fraction)))
    smaller = "val" if val_fraction < 0.5 else "train"
    assert len(texts[smaller]) == 1
    assert len(texts["train"]) + len(texts["val"]) == 40


@pytest.mark.parametrize(("longest_held_out", "share"), [(True, "9[0-9]%"), (False, "")])
def test_a_held_out_share_far_from_the_fraction_is_a_note(
    longest_held_out: bool, share: str, make_data: MakeData, tmp_path: Path
) -> None:
    """Of three files, the one that is held out whole may be nearly all of the text."""
    small = ["one\n" * 99, "two\n" * 99]
    ends = (f"end {n}\n" for n in itertools.count())
    longest = next(
        text
        for text in ("three\n" * 2000 + end for end in ends)
        if (min([text, *small], key=lambda text: fraction_of(text.encode())[0]) == text) == longest_held_out
    )
    (tmp_path / "in").mkdir()
    for number, text in enumerate([*small, longest]):
        (tmp_path / "in" / f"{number}.txt").write_text(text)
    notes = prepare(make_data(paths=(str(tmp_path / "in"),), val_fraction=0.02)).notes
    assert len(notes) == longest_held_out
    for note in notes:
        assert re.match(
            rf"{share} of the text is held out \(1 of 3 documents\), although data.val_fraction is 0.02", note
        )


def test_one_document_or_none_is_refused(make_data: MakeData, tmp_path: Path) -> None:
    folder = tmp_path / "few"
    folder.mkdir()
    (folder / "empty.txt").write_text("")
    with pytest.raises(DataError, match="no documents"):
        prepare(make_data(paths=(str(folder),)))
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("the same")
    with pytest.raises(DataError, match=r"one document only.*add documents"):
        prepare(make_data(paths=(str(folder),)))


def test_no_documents_says_what_there_is_instead(make_data: MakeData, tmp_path: Path) -> None:
    folder = tmp_path / "stories"
    folder.mkdir()
    records = [{"id": str(n), "story": "Once upon a time. " * n, "length": n} for n in range(20)]
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + "{")
    (folder / "notes.docx").touch()
    data = make_data(corpus="jsonl", paths=(str(folder),))
    with pytest.raises(DataError, match="no documents") as error:
        prepare(data)
    assert not list(Path(data.folder).glob("*")), "a failed preparation leaves no empty folder"
    said = str(error.value)
    assert "no string under 'text' (data.text_key) (20), not JSON (1)" in said
    assert "a.jsonl:1: " in said
    assert ".docx (1)" in said
    assert "under 'story', 'id'; set data.text_key" in said
    prepared = prepare(make_data(corpus="jsonl", paths=(str(folder),), text_key="story"))
    assert sum(counts.documents for counts in prepared.counts.values()) == 19


def test_a_tokenizer_in_three_folders_is_tokenized_with_once(make_data: MakeData, tmp_path: Path) -> None:
    phases: dict[str, list[str]] = {}
    folders = set()
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(byte_tokenizer().to_json())
        phases[name] = []
        prepared = prepare(make_data(tokenizer=str(tmp_path / name)), lambda phase, *_: phases[name].append(phase))  # noqa: B023
        folders.add(prepared.folder)
    assert len(folders) == 1
    assert ["tokens" in found for found in phases.values()] == [True, False, False]
    other = tokenizers.Tokenizer.from_str(byte_tokenizer().to_json())
    other.add_special_tokens(["<|im_end|>"])
    (tmp_path / "two" / "tokenizer.json").write_text(other.to_str())
    assert prepare(make_data(tokenizer=str(tmp_path / "two"))).folder not in folders


def test_a_split_too_short_for_a_row_says_what_to_lower(make_data: MakeData) -> None:
    prepared = prepare(make_data())
    tokens = prepared.counts["val"].tokens
    assert len(prepared.split("val", seq_len=tokens - 1)) == 1
    with pytest.raises(DataError, match=r"lower data.seq_len"):
        prepared.split("val", seq_len=tokens)


class Change(NamedTuple):
    file: str
    content: bytes | None
    says: str


@pytest.mark.parametrize(
    "change",
    [
        Change("file03.py", b"other", r"1 changed \(.*file03.py\)"),
        Change("file99.py", b"new", r"1 added \(.*file99.py\)"),
        Change("file04.py", None, r"1 removed \(.*file04.py\)"),
    ],
)
def test_a_changed_corpus_is_noticed_and_named(make_data: MakeData, corpus: Path, change: Change) -> None:
    before = prepare(make_data())
    path = corpus / change.file
    path.write_bytes(change.content) if change.content is not None else path.unlink()
    with pytest.raises(DataError, match=change.says + ".*--data.rebuild true"):
        prepare(make_data())
    rebuilt = prepare(make_data(rebuild=True))
    assert rebuilt.data_id != before.data_id
    assert prepare(make_data()).data_id == rebuilt.data_id


def test_same_size_other_content_is_noticed_and_a_new_date_alone_is_not(make_data: MakeData, corpus: Path) -> None:
    before = prepare(make_data())
    path = corpus / "file03.py"
    os.utime(path, ns=(1, 1))
    assert prepare(make_data()).data_id == before.data_id
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(2, 2))
    with pytest.raises(DataError, match="1 changed"):
        prepare(make_data())


def test_a_corpus_that_is_gone_is_a_note(make_data: MakeData, corpus: Path) -> None:
    before = prepare(make_data())
    shutil.rmtree(corpus)
    after = prepare(make_data())
    assert after.data_id == before.data_id
    assert "gone" in after.notes[0]
    # without the corpus, a config is valid only if its tokens are prepared
    for kept, problems in [(after.folder.parent, 0), (corpus.parent / "nothing", 1)]:
        given = {"corpus": "text", "paths": str(corpus), "folder": str(kept)}
        options = [(f"data.{key}", value, "here") for key, value in given.items()]
        with pytest.raises(ConfigError, match="does not exist") if problems else contextlib.nullcontext():
            resolve(None, [*options, ("train.steps", "1", "here")])
    with pytest.raises(DataError, match="no such file"):
        prepare(make_data(rebuild=True))
    assert prepare(make_data()).data_id == before.data_id, "a rejected rebuild destroys nothing"


def test_rebuilding_mends_a_damaged_byte_and_leaves_whole_ones_alone(make_data: MakeData) -> None:
    prepared = prepare(make_data())
    path = prepared.folder / "train-00001.safetensors"
    good, stamp = path.read_bytes(), path.stat().st_mtime_ns
    assert prepare(make_data(rebuild=True)).data_id == prepared.data_id
    assert path.stat().st_mtime_ns == stamp
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 4]))
    assert prepare(make_data(rebuild=True)).data_id == prepared.data_id
    assert path.read_bytes() == good


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("manifest.json", b"{", "manifest.json is damaged"),
        ("manifest.json", b'{"format": 99}', "format 99, not"),
        ("tokenizer.json", b"{}", "tokenizer.json was altered"),
        ("val-00000.safetensors", b"", "val-00000.safetensors has 0 bytes"),
    ],
)
def test_damage_is_named_with_its_cure(make_data: MakeData, name: str, content: bytes, says: str) -> None:
    prepared = prepare(make_data())
    (prepared.folder / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{says}.*--data.rebuild true"):
        prepare(make_data())
    assert prepare(make_data(rebuild=True)).data_id == prepared.data_id


def test_a_manifest_edited_by_hand_is_refused(make_data: MakeData) -> None:
    folder = prepare(make_data()).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"].pop()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="data_id"):
        open_prepared(folder)


def test_what_was_skipped_is_said_once(make_data: MakeData, corpus: Path) -> None:
    for number in range(9):
        (corpus / (f"bad{number}.txt" if number else "a\nb.txt")).write_bytes(
            b"caf\xe9" if number else b"a zero byte at the end\0"
        )
    prepared = prepare(make_data())
    assert prepare(make_data()).notes == prepared.notes
    assert len(prepared.notes) == 1
    assert prepared.notes[0].startswith("9 skipped")
    assert "not UTF-8 (8)" in prepared.notes[0]
    assert "a\\nb.txt, byte 22: zero bytes" in prepared.notes[0]
    (corpus / "a.pdf").touch()
    assert [note.split(":")[0] for note in prepare(make_data()).notes] == ["1 file was skipped", "9 skipped, not text"]


def test_options_that_change_tokens_have_a_folder_of_their_own(make_data: MakeData) -> None:
    base = prepare(make_data())
    assert prepare(make_data(seq_len=64, document_mask=True, prefetch=9)).folder == base.folder
    other = prepare(make_data(val_fraction=0.5))
    assert other.folder != base.folder
    assert other.data_id != base.data_id
    assert prepare(make_data()).data_id == base.data_id


def test_options_that_are_not_set_leave_older_folders_their_names() -> None:
    tokenizer = byte_tokenizer()
    common = {"format", "corpus", "val_fraction", "shard_tokens", "tokenizer", "paths"}
    assert token_options(Data(corpus="text", paths=("a",)), tokenizer).keys() == common
    assert token_options(Data(corpus="jsonl", paths=("a",)), tokenizer).keys() == common | {"text_key"}
    assert token_options(Data(corpus="files", paths=("a",), separator="=", bad_records=1), tokenizer).keys() == {
        *common, "text_key", "separator",
    }  # fmt: skip
    assert token_options(Data(corpus="parquet", wikitext=True), tokenizer)["wikitext"] is True


def test_large_documents_are_encoded_in_parts_without_loss(make_data: MakeData, tmp_path: Path) -> None:
    texts = ["".join(f"{n} línea\n" for n in range(200_000)), "ü" * 1_300_000, "short"]
    path = tmp_path / "big.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    prepared = prepare(make_data(corpus="jsonl", paths=(str(path),)))
    decoded = texts_of(prepared)
    assert sorted(decoded["train"] + decoded["val"]) == sorted(texts)


def test_progress_rises_to_the_corpus_size(make_data: MakeData, corpus: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    prepare(make_data(tokenizer="bpe", tokenizer_vocab_size=300), lambda *call: seen.append(call))
    size = sum(path.stat().st_size for path in corpus.iterdir())
    tokens = [done for phase, done, total in seen if phase == "tokens"]
    assert tokens == sorted(tokens)
    assert tokens[-1] == size
    assert {total for _, _, total in seen} == {size}


def test_no_room_is_said_before_the_work(make_data: MakeData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(DataError, match=r"set data.folder to a larger disk"):
        prepare(make_data())


def test_a_disk_that_fills_up_is_said_and_the_next_start_goes_on(make_data: MakeData) -> None:
    """Simulate a full disk by RLIMIT_FSIZE: the kernel rejects writes beyond it."""
    data = make_data(shard_tokens=4096)
    whole = files_of(prepare(make_data(shard_tokens=4096, folder=data.folder + "-whole")))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))
        with pytest.raises(DataError, match=r"cannot write .*free some space"):
            prepare(data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_of(prepare(data)) == whole


def test_a_folder_that_cannot_be_made_is_said(make_data: MakeData, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"set data.folder to a writable folder"):
        prepare(make_data(folder=str(tmp_path / "file" / "below")))


def test_a_corpus_that_changes_while_it_is_read_is_refused(make_data: MakeData, corpus: Path) -> None:
    def meddle(phase: str, done: int, total: int) -> None:
        if phase == "tokens":
            (corpus / "file00.py").write_text("changed")

    with pytest.raises(DataError, match="changed while it was read"):
        prepare(make_data(), meddle)
    assert "changed" in "".join(texts_of(prepare(make_data()))["train"] + texts_of(prepare(make_data()))["val"])


def test_a_file_that_vanishes_while_it_is_read_is_one_message(make_data: MakeData, corpus: Path) -> None:
    def meddle(phase: str, done: int, total: int) -> None:
        (corpus / "file39.py").unlink(missing_ok=True)

    with pytest.raises(DataError, match=r"file39.py|changed while it was read"):
        prepare(make_data(), meddle)


@pytest.mark.parametrize("folder", ["~nobody-here/data", "a\0b", "a" * 300, "/proc/self/mem/data"])
def test_a_folder_that_nobody_can_look_into_is_one_message(make_data: MakeData, folder: str) -> None:
    with pytest.raises(DataError, match=r"data.folder"):
        prepare(make_data(folder=folder))


def test_a_dummy_corpus_needs_nothing(tmp_path: Path) -> None:
    data = Data(corpus="dummy", dummy_documents=50, tokenizer="bytes", folder=str(tmp_path))
    prepared = prepare(data)
    assert prepared.vocab_size == byte_tokenizer().vocab_size
    assert prepared.counts["train"].documents + prepared.counts["val"].documents == 50
    assert prepare(data).notes == ()
