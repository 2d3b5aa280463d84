"""A run's data after its corpus has changed or is gone: its tokens still answer."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shoal.commands.data import data as look
from shoal.config.data_options import BlendSource, Data
from shoal.config.options import Config, Train
from shoal.data.dataset import open_past, prepare_dataset
from shoal.errors import DataError
from shoal.run.console import Console
from shoal.run.folder import RunFolder
from tests.data.conftest import MakeData, begin_ledger

CHANGED = "the corpus has changed since its tokens were prepared: 1 changed ({}); using its prepared tokens"


def change(corpus: Path) -> None:
    (corpus / "file00.py").write_text("another = True\n")


def test_a_changed_corpus_is_a_note_and_nothing_is_rebuilt(make_data: MakeData, corpus: Path) -> None:
    data = make_data()
    before = prepare_dataset(data)
    change(corpus)
    with pytest.raises(DataError, match="prepares it again"):
        prepare_dataset(data)
    for asked in (data, make_data(rebuild=True)):
        dataset = open_past(asked, Console(speaks=False), before.data_id)
        assert dataset.data_id == before.data_id
        assert dataset.notes == [CHANGED.format(corpus / "file00.py")]


def test_tokens_are_found_by_their_id_if_their_options_now_have_another_hash(
    make_data: MakeData, tmp_path: Path
) -> None:
    """As after an upgrade of Python, whose version is in the name of the standard library's tokens."""
    data = make_data()
    before = prepare_dataset(data)
    made = next((tmp_path / "prepared").glob("text-*"))
    made.rename(made.with_name("text-bytes-01234567"))
    assert open_past(data, Console(speaks=False), before.data_id).data_id == before.data_id
    assert not made.exists()


def test_a_changed_source_of_a_blend_is_named(make_data: MakeData, corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(corpus, other)
    sources = {name: BlendSource(corpus="text", paths=(str(at),)) for name, at in (("a", corpus), ("b", other))}
    data = make_data(sources=sources, corpus="stdlib", paths=())
    before = prepare_dataset(data)
    change(other)
    dataset = open_past(data, Console(speaks=False), before.data_id)
    assert dataset.notes == ["b: " + CHANGED.format(other / "file00.py")]
    assert dataset.data_id == before.data_id


@pytest.mark.parametrize("sources", [1, 2])
def test_a_rebuild_keeps_the_tokens_that_runs_were_trained_on(
    make_data: MakeData, corpus: Path, tmp_path: Path, sources: int
) -> None:
    data = make_data()
    if sources == 2:
        both = {
            name: BlendSource(corpus="text", paths=(str(corpus),), max_epochs=epochs)
            for name, epochs in (("a", 1), ("b", 2))
        }
        data = make_data(sources=both, corpus="stdlib", paths=())
    before = prepare_dataset(data)
    rows, ids = before.rows("train").read(range(10)), [before.data_id]
    for text in ("another = True\n", "yet = 3\n"):
        (corpus / "file00.py").write_text(text)
        rebuilt = prepare_dataset(dataclasses.replace(data, rebuild=True))
        assert any("the tokens before are kept in" in note for note in rebuilt.notes)
        assert prepare_dataset(data).data_id == rebuilt.data_id
        ids.append(rebuilt.data_id)
    assert len(set(ids)) == 3
    for data_id in ids:
        assert open_past(data, Console(speaks=False), data_id).data_id == data_id
    again = open_past(data, Console(speaks=False), before.data_id).rows("train").read(range(10))
    np.testing.assert_array_equal(again.tokens, rows.tokens)


@pytest.mark.parametrize("alter", [change, shutil.rmtree])
def test_where_and_at_answer_from_the_tokens_of_the_run(
    make_data: MakeData, corpus: Path, tmp_path: Path, alter: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    run = begun_run(make_data(), tmp_path / "run")
    first = answers(capsys, run)
    assert not any(notes for _, notes in first)
    alter(corpus)
    for (said, _), (again, notes) in zip(first, answers(capsys, run), strict=True):
        told = [line for line in (again + notes).splitlines() if line.startswith("note: the corpus")]
        assert len(told) == 1
        assert told[0].endswith("; using its prepared tokens")
        assert again.removeprefix(told[0] + "\n") == said


def answers(capsys: pytest.CaptureFixture[str], run: str) -> list[tuple[str, str]]:
    """Return what is printed on standard output, and on standard error, by each question."""
    return [
        answer(capsys, ["at", run], step=2),
        answer(capsys, ["where", run], document="3"),
        answer(capsys, [run]),
    ]


def answer(capsys: pytest.CaptureFixture[str], words: list[str], **options: object) -> tuple[str, str]:
    given = {"step": None, "document": None, "json": False, "rows": 1} | options
    assert look(argparse.Namespace(words=words, **given), [], []) == 0
    found = capsys.readouterr()
    return found.out, found.err


def begun_run(data: Data, folder: Path) -> str:
    """Make the files of a run that has begun its first step; return its folder."""
    config = Config(data=data, train=Train(steps=20))
    run = RunFolder(folder)
    folder.mkdir()
    run.save_config(config)
    begin_ledger(run, config)
    return str(folder)
