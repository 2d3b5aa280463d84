"""The first look at data: what it shows, and that it writes nothing."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console as RichConsole

from shoal.config.data_options import BlendSource, Data
from shoal.config.options import Config, Train
from shoal.data import packing_report
from shoal.data.dataset import Dataset, prepare_dataset
from shoal.data.document_index import find_documents
from shoal.data.nearby_documents import nearby, numbered
from shoal.data.packing_report import sample_documents
from shoal.report.data_look import Look, histogram, open_look, packing_table, show_rows, source_table
from tests.data.conftest import MakeData


def opened(data: Data) -> tuple[Config, Dataset, Look]:
    config, dataset = Config(data=data, train=Train(steps=20)), prepare_dataset(data)
    return config, dataset, open_look(config, dataset)


def printed(what: Any, width: int) -> str:
    console = RichConsole(width=width, record=True, file=io.StringIO())
    console.print(what)
    return console.export_text()


def texts(dataset: Dataset, look: Look, count: int = 3) -> list[str]:
    return [text.plain for text in show_rows(dataset, look, count, False)]


def files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.name != ".lock"}


def test_looking_at_best_fit_rows_writes_no_index(make_data: MakeData, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data(packing="best_fit", seq_len=64)
    _, dataset, look = opened(data)
    folder = dataset.parts[""].folder
    assert not list(folder.glob("*.index"))
    rows = look.rows[""]
    assert rows is not None
    assert look.order.num_rows == len(rows) == look.packings[""][1].rows
    shown = texts(dataset, look)
    # of a large corpus, the rows are not packed for a look
    monkeypatch.setattr(packing_report, "WINDOWS", 2)
    monkeypatch.setattr(packing_report, "WINDOW_TOKENS", 256)
    config, dataset, look = opened(data)
    assert look.rows[""] is None
    assert not list(folder.glob("*.index"))
    assert texts(dataset, look) == [
        "no rows are shown: those of this corpus are not packed yet; shoal prepare packs them"
    ]
    assert re.search(r"train .* ~\d+ ", printed(source_table(config, dataset, look), 80))
    title, table = packing_table(config, look)
    assert "~ marks estimates" in title
    assert len(re.findall(r"~\d+\.\d%", printed(table, 80))) == 4
    dataset.part_rows("", "train")  # as training does
    look = open_look(config, dataset)
    assert look.order.num_rows == len(rows)
    assert texts(dataset, look) == shown


def token_files(tmp_path: Path) -> Data:
    """Write a file in nanoGPT's form: documents of 5 to 104 tokens, each ended by the end token, 256."""
    draw = np.random.default_rng(0)
    documents = [[*draw.integers(97, 123, int(n)).tolist(), 256] for n in draw.integers(4, 104, 200)]
    np.concatenate(documents).astype(np.uint16).tofile(tmp_path / "train.bin")
    return Data(
        corpus="tokens", paths=(str(tmp_path / "train.bin"),), tokenizer="bytes", seq_len=48, folder=str(tmp_path / "data"),
        token_format="nanogpt", val_fraction=0.1,
    )  # fmt: skip


def test_looking_at_token_files_makes_no_index_of_documents(tmp_path: Path) -> None:
    data = token_files(tmp_path)
    before = files(prepare_dataset(data).parts[""].folder)
    _, dataset, look = opened(data)
    part = dataset.parts[""]
    shown = texts(dataset, look)
    assert files(part.folder) == before
    assert "[document from token " in shown[1]
    documents = find_documents(part, "train")  # makes the index
    named = texts(dataset, open_look(Config(data=data, train=Train(steps=20)), dataset))
    number = {documents.document_span(n)[0]: n for n in range(documents.num_documents)}
    for here, there in zip(shown, named, strict=True):
        assert re.sub(r"from token ([\d,]+)", lambda m: f"{number[int(m[1].replace(',', ''))]:,}", here) == there


def test_documents_near_some_tokens_are_those_of_the_index(tmp_path: Path) -> None:
    part = prepare_dataset(token_files(tmp_path)).parts[""]
    stream, by_number = part.streams["train"], numbered(find_documents(part, "train"))
    for start, stop in [(0, 1), (0, 400), (333, 334), (500, 900), (stream.num_tokens - 5, stream.num_tokens)]:
        expected = [(first, first, min(last, stop)) for _, first, last in by_number(start, stop)]
        assert list(nearby(stream)(start, stop)) == expected


def test_the_histogram_counts_the_documents(make_data: MakeData) -> None:
    part = prepare_dataset(make_data()).parts[""]
    documents = find_documents(part, "train")
    spans = [documents.document_span(n) for n in range(documents.num_documents)]
    title, *lines = histogram(sample_documents(part, "train"), 100)
    longer = sum(last - first > 100 for first, last in spans) / len(spans)
    assert title == f"tokens per document, of {len(spans)}; {longer:.1%} are longer than a row of 100"
    found = {int(line.split(" to ")[0].replace(",", "")): line.split()[-1] for line in lines}
    for low, share in found.items():
        assert share == f"{sum(low <= last - first < 2 * low for first, last in spans) / len(spans):.1%}"


@pytest.mark.parametrize("width", [80, 120])
def test_tables_of_a_blend_keep_whole_names(make_data: MakeData, corpus: Path, width: int) -> None:
    sources = {
        name: BlendSource(corpus="text", paths=(str(corpus),))
        for name in ("code_from_forges", "a_rather_long_name_of_web_pages")
    }
    config, dataset, look = opened(make_data(sources=sources, corpus="stdlib", paths=()))
    for table in (source_table(config, dataset, look), packing_table(config, look)[1]):
        said = printed(table, width)
        assert "…" not in said
        assert max(map(len, said.splitlines())) <= width
        if width == 120:
            assert all(name in said for name in sources)
