"""The documents beside a spike are those that its step was trained on, and only a report reads them from the data."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from shoal.config.data_options import Data
from shoal.config.options import Config
from shoal.data.dataset import new_order, prepare_dataset
from shoal.report.curves.curves import Curves
from shoal.report.page.content import run_view
from shoal.report.page.html import report_html
from shoal.run.folder import RunFolder
from tests.data.conftest import begin_ledger
from tests.report.made_runs import make_run

SPIKE = 150
STEPS = 200


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Return a run with a spike, on text files of which each says its name over and over."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(40):
        (corpus / f"{number:02}.txt").write_text(f"file{number:02} says <b>its name</b>. " * (3 + number))
    data = Data(
        corpus="text", paths=(str(corpus),), folder=str(tmp_path / "prepared"), tokenizer="bytes", val_fraction=0.2, seq_len=64
    )  # fmt: skip
    config = Config(data=data).replace("train", steps=STEPS, global_batch=4, micro_batch=2)
    run = make_run(tmp_path / "runs" / "a", STEPS, spikes={SPIKE: 9.0}, config=config)
    begin_ledger(run, config)
    return run


def documents(run: RunFolder, *, reads_data: bool = False) -> list[str]:
    (spike,) = run_view(run, Curves.open(run.path), reads_data=reads_data)["spikes"]
    assert spike["step"] == SPIKE
    found: list[str] = spike["documents"]
    return found


def test_they_are_those_that_the_step_read(run: RunFolder) -> None:
    config = run.load_config()
    dataset = prepare_dataset(config.data)
    order = new_order(config.data, dataset.rows("train").sizes, 0, config.train.global_batch)
    rows = dataset.rows("train").read(order.rows_at(range(4 * (SPIKE - 1), 4 * SPIKE)).tolist())
    read = "\n".join(dataset.parts[""].tokenizer.decode(row) for row in rows.tokens.tolist())
    found = documents(run, reads_data=True)
    shown = [re.fullmatch(r"\d+: (file\d\d) says <b>its .*…", text) for text in found]
    assert all(shown)
    assert {match[1] for match in shown if match} >= set(re.findall(r"file\d\d", read))


def test_the_dashboard_shows_what_a_report_has_read(run: RunFolder) -> None:
    assert documents(run) == []
    page = report_html([run.path])
    found = documents(run)
    assert found
    assert found[0].split()[1].encode() in page
    assert b"<b>its name" not in page, "text of documents is data, not HTML"


def test_without_the_data_there_is_the_command(run: RunFolder) -> None:
    shutil.rmtree(run.load_config().data.folder)
    assert documents(run, reads_data=True) == []
    assert not Path(run.load_config().data.folder).exists(), "a report prepares no data"
