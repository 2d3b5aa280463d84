"""Corpora against files written here."""

from __future__ import annotations

import ast
import gzip
import json
from pathlib import Path

import pytest

from shoal.config import Data
from shoal.data.documents import Cursor, Document, Skipped
from shoal.data.sources import open_corpus, read_text_file
from shoal.errors import DataError


def read(data: Data, start: Cursor | None = None) -> tuple[list[Document], list[Skipped]]:
    items = list(open_corpus(data).read(start or Cursor()))
    return [i for i in items if isinstance(i, Document)], [i for i in items if isinstance(i, Skipped)]


def test_text_takes_a_folder_by_suffix_and_a_named_file_whatever_its_suffix(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b.txt", "a.md", "sub/c.py", "sub/d.rst", "e.bin", ".git/f.txt", ".hidden.txt"):
        (tmp_path / name).write_text(name)
    named = str(tmp_path / "e.bin")
    documents, _ = read(Data(corpus="text", paths=(str(tmp_path), named)))
    assert [d.text for d in documents] == ["a.md", "b.txt", "sub/c.py", "sub/d.rst", "e.bin"]


def test_newlines_and_byte_order_marks_stay_as_they_are(tmp_path: Path) -> None:
    raw = b"\xef\xbb\xbfone\r\ntwo\rthree\n\x00"
    (tmp_path / "a.txt").write_bytes(raw)
    (tmp_path / "empty.txt").write_bytes(b"")
    documents, skipped = read(Data(corpus="text", paths=(str(tmp_path),)))
    assert [d.text.encode() for d in documents] == [raw]
    assert not skipped


def test_what_is_not_utf8_is_named_and_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes("naïve".encode("latin-1"))
    documents, skipped = read(Data(corpus="text", paths=(str(tmp_path),)))
    assert [d.text for d in documents] == ["fine"]
    assert skipped[0].name.endswith("b.txt")
    assert "not UTF-8" in skipped[0].reason


@pytest.mark.parametrize("text", ["漢字🐟é" * 3000, "a line\n" * 5000, "para\nlines\n\n" * 3000, "x" * 9000])
def test_a_long_file_is_cut_in_pieces_that_add_up_to_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "long.txt"
    path.write_text(text, encoding="utf-8")
    pieces = list(read_text_file(path, "long.txt", Cursor(), 1000))
    assert all(isinstance(p, Document) and 0 < len(p.text.encode()) <= 1000 for p in pieces)
    assert "".join(p.text for p in pieces if isinstance(p, Document)) == text
    for index in (0, len(pieces) // 2, len(pieces) - 1):  # from any piece on, the rest is the same
        assert list(read_text_file(path, "long.txt", pieces[index].after, 1000)) == pieces[index + 1 :]


def test_one_file_becomes_many_documents_that_end_with_a_line(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("A sentence of a book.\n" * 20_000)
    documents, _ = read(Data(corpus="text", paths=(str(path),)))
    assert len(documents) > 50
    assert all(d.text.endswith("\n") for d in documents)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_jsonl_lines_are_documents_and_bad_ones_are_named(tmp_path: Path, suffix: str) -> None:
    lines = [
        json.dumps({"body": "first\nline"}).encode(),
        b'{"body": "broken',
        b"",
        json.dumps({"text": "other key"}).encode(),
        b'{"body": "\\ud800"}',
        b'{"body": "\xff"}',
        b"[1]",
        json.dumps({"body": "漢字"}, ensure_ascii=False).encode(),
    ]
    content = b"\n".join(lines)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    data = Data(corpus="jsonl", paths=(str(path),), text_key="body")
    documents, skipped = read(data)
    assert [d.text for d in documents] == ["first\nline", "漢字"]
    assert [int(s.name.rsplit(":", 1)[1]) for s in skipped] == [2, 4, 5, 6, 7]
    rest, _ = read(data, documents[0].after)
    assert [d.text for d in rest] == ["漢字"]


def test_a_gzip_that_was_cut_short_gives_what_is_whole(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{number} {hash(str(number))}"}) for number in range(2000)]
    packed = gzip.compress("\n".join(lines).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    documents, skipped = read(Data(corpus="jsonl", paths=(str(tmp_path),)))
    assert [d.text for d in documents] == [json.loads(line)["text"] for line in lines[: len(documents)]]
    assert 0 < len(documents) < 2000
    assert len(skipped) == 1
    assert "damaged gzip" in skipped[0].reason


def test_stdlib_is_python_without_tests_and_tables() -> None:
    corpus = open_corpus(Data())
    names = [entry.name for entry in corpus.listing()]
    assert names == sorted(names)
    assert "argparse.py" in names
    assert "json/decoder.py" in names
    assert not [n for n in names if {"test", "tests", "encodings", "site-packages"} & set(n.split("/"))]
    assert not {"html/entities.py"} & set(names)
    first = next(d for d in corpus.read() if d.name == "argparse.py")
    assert isinstance(first, Document)
    ast.parse(first.text)


def test_dummy_is_a_function_of_the_number() -> None:
    all_documents, _ = read(Data(corpus="dummy", dummy_documents=30))
    again, _ = read(Data(corpus="dummy", dummy_documents=40), Cursor(0, 10, 10))
    assert len({d.text for d in all_documents}) == 30
    assert again[:20] == all_documents[10:]


@pytest.mark.parametrize(
    ("paths", "says"),
    [((), "set data.paths"), (("nowhere/at-all",), "nowhere/at-all"), (("EMPTY",), "correct data.paths")],
)
def test_a_corpus_that_is_not_there_says_what_to_set(tmp_path: Path, paths: tuple[str, ...], says: str) -> None:
    paths = tuple(str(tmp_path) if p == "EMPTY" else p for p in paths)
    with pytest.raises(DataError, match=says):
        open_corpus(Data(corpus="text", paths=paths))
