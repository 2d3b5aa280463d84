"""Each format, compared with an independent reader, and resumed at each cursor."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import json
import lzma
import random
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard

from shoal.config.data_options import Data
from shoal.data.corpus.documents import Corpus, Cursor, Document, Skipped
from shoal.data.corpus.sources import FileCorpus, check_marks, open_corpus
from shoal.data.corpus.text import separated_reader
from shoal.data.corpus.wikitext import MARKUP, SEPARATED, detokenize
from shoal.errors import DataError

ROWS = 60


def rows() -> list[dict[str, Any]]:
    """Return records with texts of several scripts and lengths, with quotes, delimiters, line ends and zeros in them."""
    draw = random.Random(1)
    words = ["größer", "漢字", "tide", '"so"', "a,b", "x\r\ny", "c;d", "\t", "🐟", "{[", "]}", "\\", "\0", "|"]
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 60))) + f" {n}" for n in range(ROWS)]
    return [{"id": n, "meta": {"texts": [text[:3]]}, "body": text} for n, text in enumerate(texts)]


def to_csv(delimiter: str) -> Callable[[list[dict[str, Any]]], bytes]:
    def write(records: list[dict[str, Any]]) -> bytes:
        out = io.StringIO(newline="")
        writer = csv.writer(out, delimiter=delimiter)
        writer.writerows([["", "id", "body"], *([n, r["id"], r["body"]] for n, r in enumerate(records))])
        return out.getvalue().encode()

    return write


def to_arrow(open_writer: Callable[..., Any]) -> Callable[[list[dict[str, Any]]], bytes]:
    def write(records: list[dict[str, Any]]) -> bytes:
        table, sink = pa.Table.from_pylist(records), pa.BufferOutputStream()
        with open_writer(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
        return bytes(sink.getvalue())

    return write


def to_parquet(records: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.Table.from_pylist(records), sink, row_group_size=17, compression="zstd")
    return bytes(sink.getvalue())


FORMATS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "lines.jsonl": lambda records: "\n".join(map(json.dumps, records)).encode(),
    "lines.ndjson": lambda records: ("\n\n".join(map(json.dumps, records)) + "\n").encode(),
    "array.json": lambda records: json.dumps(records, ensure_ascii=False).encode(),
    "spaced.json": lambda records: b"\xef\xbb\xbf \n" + json.dumps(records, indent=2).encode() + b"\n\n",
    "lines.json": lambda records: "\n".join(map(json.dumps, records)).encode(),
    "values.json": lambda records: "\n".join(json.dumps(r, indent=1, ensure_ascii=False) for r in records).encode(),
    "commas.csv": to_csv(","),
    "semicolons.csv": to_csv(";"),
    "tabs.tsv": to_csv("\t"),
    "table.parquet": to_parquet,
    "file.arrow": to_arrow(pa.ipc.new_file),
    "stream.arrow": to_arrow(pa.ipc.new_stream),
}
PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": lambda content: gzip.compress(content[:500]) + gzip.compress(content[500:]),  # several members or frames
    ".xz": lambda content: lzma.compress(content[:500]) + lzma.compress(content[500:]),
    ".zst": lambda content: zstandard.compress(content[:500]) + zstandard.compress(content[500:]),
}
FILES = [
    name + end for name in FORMATS for end in PACK if not end or name in ("array.json", "commas.csv", "lines.jsonl")
]


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make records span several reads."""
    monkeypatch.setattr("shoal.data.corpus.json_values.WINDOW_BYTES", 100)
    monkeypatch.setattr("shoal.data.corpus.tables.MAX_BATCH_ROWS", 5)
    monkeypatch.setattr("shoal.data.corpus.streams.ZSTD_INPUT_BYTES", 100)


def write(folder: Path, name: str) -> Path:
    stem, _, end = name.rpartition(".")
    packed = f".{end}" if f".{end}" in PACK else ""
    path = folder / name
    path.write_bytes(PACK[packed](FORMATS[stem if packed else name](rows())))
    return path


def read(corpus: Corpus, start: Cursor | None = None) -> list[Document | Skipped]:
    return list(corpus.read(start or Cursor()))


def check_cursors(corpus: Corpus) -> list[Document | Skipped]:
    """Return all items, after a check that reading from each cursor gives the same remainder, and that progress rises."""
    items = read(corpus)
    sizes = [entry.bytes for entry in corpus.listing()]
    afters = [item.after for item in items]
    assert afters == sorted(set(afters))
    assert all(0 <= after.offset <= sizes[after.file] for after in afters)
    for number, after in enumerate(afters):
        assert read(corpus, after) == items[number + 1 :]
    return items


def texts_of(items: list[Document | Skipped]) -> list[str]:
    return [item.text for item in items if isinstance(item, Document)]


@pytest.mark.parametrize("name", FILES)
def test_a_format_gives_its_records_from_any_cursor_on(name: str, tmp_path: Path, small_windows: None) -> None:
    path = write(tmp_path, name)
    for corpus in ("files", path.name.split(".")[1].replace("tsv", "csv").replace("ndjson", "jsonl")):
        items = check_cursors(open_corpus(Data(corpus=corpus, paths=(str(path),), text_key="body")))  # type: ignore[arg-type]
        assert texts_of(items) == [row["body"] for row in rows()]
        assert len(items) == ROWS


def test_a_folder_of_all_formats_is_read_in_order_and_by_kind(tmp_path: Path) -> None:
    for name in (*FILES, "notes.md.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"a note")) if name.startswith("notes") else write(tmp_path, name)
    (tmp_path / "dataset_info.json").write_text('{"body": "not a document"}')
    corpus = open_corpus(Data(corpus="files", paths=(str(tmp_path),), text_key="body"))
    items = read(corpus)
    names = [entry.name for entry in corpus.listing()]
    assert names == sorted(names)
    assert len(names) == len(FILES) + 1
    assert sorted(texts_of(items)) == sorted([row["body"] for row in rows()] * len(FILES) + ["a note"])
    assert corpus.skipped_files() == {"dataset_info.json": 1}
    assert read(corpus, items[100].after) == items[101:]
    only = open_corpus(Data(corpus="parquet", paths=(str(tmp_path),), text_key="body"))
    assert [entry.name for entry in only.listing()] == [str(tmp_path / "table.parquet")]
    assert only.skipped_files()[".json"] == 5


def test_a_kind_is_forced_on_a_named_file(tmp_path: Path) -> None:
    for name, kind in (("table.parquet", "parquet"), ("array.json", "json"), ("stream.arrow", "arrow")):
        path = write(tmp_path, name).rename(tmp_path / f"{kind}.data")
        assert len(texts_of(read(open_corpus(Data(corpus=kind, paths=(str(path),), text_key="body"))))) == ROWS  # type: ignore[arg-type]


def test_only_the_column_needed_is_read(tmp_path: Path) -> None:
    """A column that pyarrow cannot decode does not matter if it is not the text."""
    path = tmp_path / "a.parquet"
    table = pa.table({"other": [f"{n} padding" * 50 for n in range(50)], "text": [str(n) for n in range(50)]})
    pa.parquet.write_table(table, path, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    begin = content.index(b"3 padding")
    content[begin - 4 : begin] = b"\xff\xff\xff\x7f"  # the length of a text
    path.write_bytes(content)
    with pytest.raises((OSError, pa.ArrowException)):
        pa.parquet.read_table(path)
    items = read(open_corpus(Data(corpus="parquet", paths=(str(path),))))
    assert texts_of(items) == [str(n) for n in range(50)]


# --- documents inside text ---------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("pack", PACK)
def test_a_separator_line_divides_a_text(end: str, pack: str, tmp_path: Path) -> None:
    stories = [
        f"Once upon a time {n}.\n\n<|endoftext|> is not alone here.\n" + "word " * (n * 7) + "\n" for n in range(30)
    ]
    stories = [story.replace("\n", end) for story in stories]
    path = tmp_path / f"stories.txt{pack}"
    path.write_bytes(PACK[pack](f" <|endoftext|>{end}".join(stories).encode() + b"<|endoftext|>"))
    items = check_cursors(open_corpus(Data(corpus="text", paths=(str(path),), separator="<|endoftext|>")))
    assert texts_of(items) == stories
    assert len(items) == 30


def test_a_part_longer_than_a_piece_is_cut_and_empty_parts_are_counted(tmp_path: Path) -> None:
    parts = ["é" * 3000, "\n", "a line\n" * 300, "漢字 and\nlines\n\n" * 100, "short"]
    path = tmp_path / "parts.txt"
    path.write_text("\n===\n".join(parts), encoding="utf-8")
    items = check_cursors(FileCorpus([(str(path), path)], separated_reader("===", 1000)))
    assert [(i.reason, i.damaged) for i in items if isinstance(i, Skipped)] == [("empty text", False)]
    assert "".join(texts_of(items)) == "".join(
        part if part == parts[-1] else f"{part}\n" for part in parts if part.strip()
    )
    assert max(len(text.encode()) for text in texts_of(items)) <= 1000
    assert sum(text.startswith("short") for text in texts_of(items)) == 1


def pages_of(text: str) -> list[str]:
    """Return the pages of a WikiText file: the split that lm-evaluation-harness's data set was made with."""
    pages, page = list[str](), list[str]()
    for line in text.split("\n"):
        marks = line.replace("= = =", "===").replace("= =", "==").strip()
        if marks.startswith("= ") and marks.endswith(" ="):
            pages, page = [*pages, "\n".join(page)], []
        page.append(line)
    return [page for page in [*pages, "\n".join(page)] if page.strip()]


WIKITEXT = "".join(
    f" \n = Title {n} = \n \n The text @-@ of = page = {n} , 1 @,@ 000 . \n \n = = Section = = \n \n" + " more \n" * n
    + " = = = Deeper = = = \n \n = = \n = \n"
    for n in range(12)
)  # fmt: skip


@pytest.mark.parametrize("form", ["text", "text.gz", "jsonl", "parquet", "two tables"])
def test_wikitext_becomes_the_pages_of_lm_evaluation_harness(form: str, tmp_path: Path) -> None:
    # as on the hub: a row is a line with its line end, and a blank line is an empty row
    lines = [line if line.strip() else "" for line in WIKITEXT.splitlines(keepends=True)]
    half = len(lines) // 2  # in the middle of a page
    for number, part in enumerate([lines] if form != "two tables" else [lines[:half], lines[half:]]):
        table = pa.table({"text": part})
        match form:
            case "text":
                (tmp_path / "wiki.txt").write_text(WIKITEXT)
            case "text.gz":
                (tmp_path / "wiki.txt.gz").write_bytes(gzip.compress(WIKITEXT.encode()))
            case "jsonl":
                (tmp_path / "wiki.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in part))
            case _:
                pa.parquet.write_table(table, tmp_path / f"{number}.parquet", row_group_size=5)
    items = check_cursors(open_corpus(Data(corpus="files", paths=(str(tmp_path),), wikitext=True)))
    pages = [page.removesuffix("\n") for page in pages_of(WIKITEXT)]
    assert texts_of(items) == [detokenize(page) for page in pages]
    assert [item.counted_bytes for item in items if isinstance(item, Document)] == [
        len(page.encode()) for page in pages
    ]
    assert len(items) == 12


def test_a_page_is_written_as_lm_evaluation_harness_writes_it() -> None:
    page = (
        "\n = Valkyria = \n \n It is 1 @,@ 000 @.@ 5 m ( 3 ft ) long , 20 @-@ year : \" old \" ; ' so ' ! Really ? \n"
        " \n = = Sub = = \n = = = Deeper = = = \n At 5 ° C the boys ' [ x ] { y } cat 's N times . The end \n"
    )
    expected = (  # written by lm-evaluation-harness 0.4.13
        "\n= Valkyria =\n\nIt is 1,000.5 m (3 ft) long, 20-year: \"old\";'so'! Really?\n"
        "\n== Sub ==\n=== Deeper ===\nAt 5°C the boys'[x] {y} cat's 1 times. The end\n"
    )
    assert detokenize(page) == expected
    if (installed := importlib.util.find_spec("lm_eval")) is not None:
        [package] = installed.submodule_search_locations or []
        theirs = runpy.run_path(f"{package}/tasks/wikitext/preprocess_wikitext.py")["wikitext_detokenizer"]
        draw = random.Random(0)
        pieces = [*(pair for pair, _ in (*SEPARATED, *MARKUP)), *"()[]{}\"' a\n", "1 ", "word"]
        for _ in range(2000):
            drawn = "".join(draw.choices(pieces, k=20))
            assert detokenize(drawn) == theirs({"page": drawn})


@pytest.mark.parametrize(("option", "line"), [({"separator": "==="}, "==="), ({"wikitext": True}, " = Title = ")])
def test_a_mark_that_no_line_has_is_rejected(option: dict[str, Any], line: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n= = two = =\nand === three\n")
    source = Data(corpus="text", paths=(str(tmp_path),), **option)
    with pytest.raises(DataError, match=rf"data.{next(iter(option))} has no effect: no line is "):
        check_marks(source)
    (tmp_path / "b.txt").write_text(f"one\n{line}\ntwo\n")
    check_marks(source)


def test_a_text_without_titles_is_not_wikitext(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.data.corpus.wikitext.MAX_PAGE_CHARACTERS", 1000)
    (tmp_path / "a.txt").write_text("a line\n" * 1000)
    with pytest.raises(DataError, match=r"a.txt.*not WikiText; set data.wikitext to false"):
        read(open_corpus(Data(corpus="text", paths=(str(tmp_path),), wikitext=True)))
