"""Corpora, compared with the files that the tests write."""

from __future__ import annotations

import ast
import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

import pytest

from shoal.config.data_options import Data
from shoal.data.corpus.documents import Cursor, Document, Skipped
from shoal.data.corpus.sources import open_corpus
from shoal.data.corpus.text import text_reader
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


def test_newlines_stay_as_they_are_and_a_byte_order_mark_goes(tmp_path: Path) -> None:
    raw = b"one\r\ntwo\rthree\n\xef\xbb\xbf"  # a byte order mark inside a text is a character
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + raw)
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "empty.txt").write_bytes(b"")
    documents, skipped = read(Data(corpus="text", paths=(str(tmp_path),)))
    assert [d.text.encode() for d in documents] == [raw]
    assert not skipped
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\xef\xbb\xbf{"text": "two"}\n')
    documents, skipped = read(Data(corpus="jsonl", paths=(str(tmp_path),)))
    assert [d.text for d in documents] == ["one"]
    assert [(s.name[-2:], s.reason) for s in skipped] == [(":2", "not JSON")]


def test_what_is_not_utf8_is_named_and_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "c.txt").write_bytes(b"a stray zero byte among many other ones\0")
    documents, skipped = read(Data(corpus="text", paths=(str(tmp_path),)))
    assert [d.text for d in documents] == ["fine"]
    assert [s.name.removeprefix(str(tmp_path)) for s in skipped] == ["/b.txt, byte 2", "/c.txt, byte 39"]
    assert [s.reason.split(",")[0] for s in skipped] == ["not UTF-8", "zero bytes"]


RECORDS = "".join(json.dumps({"text": f"größer, 漢字 {n}"}, ensure_ascii=False) + "\r\n" for n in range(50))


@pytest.mark.parametrize("corpus", ["text", "jsonl"])
@pytest.mark.parametrize(
    ("content", "called"),
    [
        (RECORDS.encode("utf-16"), "UTF-16"),  # PowerShell's > writes it
        (RECORDS.encode("utf-16-be"), "UTF-16BE"),
        (RECORDS.encode("utf-16-le"), "UTF-16LE"),
        (RECORDS.encode("utf-32"), "UTF-32"),
        (bytes(5000), "zero bytes"),
        (gzip.compress(RECORDS.encode()), "gzip"),
        (b"%PDF-1.7\n", "PDF"),
    ],
)
def test_a_file_that_is_no_utf8_text_at_all_is_refused(
    tmp_path: Path, corpus: Literal["text", "jsonl"], content: bytes, called: str
) -> None:
    """Reject the file even if all others are valid."""
    suffix = ".txt" if corpus == "text" else ".jsonl"
    (tmp_path / f"a{suffix}").write_text(RECORDS, encoding="utf-8")
    (tmp_path / f"b{suffix}").write_bytes(content)
    with pytest.raises(DataError, match=rf"b\{suffix}.* {called}") as error:
        read(Data(corpus=corpus, paths=(str(tmp_path),)))
    assert "data.paths" in str(error.value)
    (tmp_path / f"b{suffix}").write_bytes(content.decode("utf-16").encode() if called == "UTF-16" else b"")
    documents, skipped = read(Data(corpus=corpus, paths=(str(tmp_path),)))
    assert (bool(documents), skipped) == (True, [])


@pytest.mark.parametrize("text", ["漢字🐟é" * 3000, "a line\n" * 5000, "para\nlines\n\n" * 3000, "x" * 9000])
def test_a_long_file_is_cut_in_pieces_that_add_up_to_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "long.txt"
    path.write_text(text, encoding="utf-8")
    read = text_reader(1000)
    pieces = list(read(path, "long.txt", Cursor()))
    assert all(isinstance(p, Document) and 0 < len(p.text.encode()) <= 1000 for p in pieces)
    assert "".join(p.text for p in pieces if isinstance(p, Document)) == text
    for index in (0, len(pieces) // 2, len(pieces) - 1):  # resuming after any piece reads the same remainder
        assert list(read(path, "long.txt", pieces[index].after)) == pieces[index + 1 :]


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
        b'{"body": "one", "body": "two"}',
        b'{"body": "a"}\r{"body": "b"}',
        b'{"in": {"body": "of another"}, "body": "once"}',
        json.dumps({"body": "漢字"}, ensure_ascii=False).encode(),
    ]
    content = b"\n".join(lines)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    data = Data(corpus="jsonl", paths=(str(path),), text_key="body")
    documents, skipped = read(data)
    assert [d.text for d in documents] == ["first\nline", "once", "漢字"]
    reasons = {int(s.name.rsplit(":", 1)[1]): s.reason for s in skipped}
    words = {2: "JSON", 4: "'body'", 5: "surrogate", 6: "UTF-8", 7: "'body'", 8: "twice", 9: "CR"}
    assert reasons.keys() == words.keys()
    assert all(word in reasons[line] for line, word in words.items())
    assert skipped[1].fields == {"text": len("other key")}
    rest, _ = read(data, documents[0].after)
    assert [d.text for d in rest] == ["once", "漢字"]


@pytest.mark.parametrize("escaped", [True, False])
def test_a_key_of_any_alphabet_is_found_twice(tmp_path: Path, *, escaped: bool) -> None:
    key = json.dumps("текст", ensure_ascii=escaped)
    (tmp_path / "a.jsonl").write_text(f'{{{key}: "one", "текст": "two"}}\n{{{key}: "once"}}\n', encoding="utf-8")
    documents, [skipped] = read(Data(corpus="jsonl", paths=(str(tmp_path),), text_key="текст"))
    assert [d.text for d in documents] == ["once"]
    assert "twice" in skipped.reason


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_json_array_is_named(tmp_path: Path, suffix: str) -> None:
    content = json.dumps([{"text": "a"}, {"text": "b"}], indent=1).encode()
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    with pytest.raises(DataError, match=rf"a{suffix} begins with a JSON array.*set data.corpus to json"):
        read(Data(corpus="jsonl", paths=(str(path),)))


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
    [
        ((), "set data.paths"),
        (("nowhere/at-all",), "nowhere/at-all"),
        (("EMPTY",), "correct data.paths"),
        (("EMPTY/boks/a.txt",), r"did you mean \S*/books/a.txt\?"),
        (("EMPTY/books/b.txt",), r"did you mean \S*/books/a.txt\?"),
        (("EMPTY/*.txt",), "no file matches"),
        (("~nobody-here/books",), "~nobody-here/books"),
        (("EMPTY/pipe",), "pipe"),
        (("EMPTY/link",), "link to gone"),
        (("EMPTY/loop",), "EMPTY/loop|/loop"),
        (("a" * 300,), "aaa"),
        (("a\0b",), "data.paths"),
    ],
)
def test_a_corpus_that_is_not_there_says_what_to_set(tmp_path: Path, paths: tuple[str, ...], says: str) -> None:
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("a")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("gone")
    (tmp_path / "loop").symlink_to("loop")
    paths = tuple(str(tmp_path / "empty") if p == "EMPTY" else p.replace("EMPTY", str(tmp_path)) for p in paths)
    with pytest.raises(DataError, match=says) as error:
        open_corpus(Data(corpus="text", paths=paths))
    assert "data.paths" in str(error.value)


# --- no file under a path is skipped silently ---------------------------------------------------------------


def test_each_file_is_read_once_or_counted(tmp_path: Path) -> None:
    """Read a file once whichever path leads to it; loops of symbolic links terminate."""
    corpus = tmp_path / "corpus"
    (corpus / "sub" / "deep").mkdir(parents=True)
    (corpus / ".git").mkdir()
    for name in (
        "a.txt", "b.TXT", "c.pdf", "d.pdf", "e.docx", "noted", ".hidden.txt", ".git/f.txt", "sub/g.md", "sub/deep/h.rst",
    ):  # fmt: skip
        (corpus / name).write_text(name)
    (corpus / "empty.txt").touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "i.txt").write_text("i.txt")
    (corpus / "linked").symlink_to(elsewhere)  # a folder elsewhere is read through its link
    (corpus / "sub" / "loop").symlink_to(corpus)
    (corpus / "a link.txt").symlink_to(corpus / "a.txt")
    (corpus / "gone.pdf").symlink_to("nowhere")
    os.mkfifo(corpus / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(corpus / "socket.txt"))
        found = open_corpus(Data(corpus="text", paths=(str(corpus), str(corpus / "sub"), str(corpus / "c.pdf"))))
    names = [entry.name.removeprefix(f"{corpus}/") for entry in found.listing()]
    assert names == ["a link.txt", "b.TXT", "empty.txt", "linked/i.txt", "sub/deep/h.rst", "sub/g.md", "c.pdf"]
    assert dict(found.skipped_files()) == {
        ".pdf": 2, ".docx": 1, "no suffix": 1, "hidden": 2, "empty": 1, "pipe, socket or device": 2,
        "listed twice": 3,  # a.txt by its link, the folder by the loop, and sub by the second path
    }  # fmt: skip


def test_a_pattern_gives_its_files_sorted_and_counts_the_others(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.pdf", "d.log", "[e].txt", "sub/f.txt", "sub/deep/g.txt", ".h.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    def found(*patterns: str) -> tuple[list[str], dict[str, int]]:
        corpus = open_corpus(Data(corpus="text", paths=tuple(f"{tmp_path}/{pattern}" for pattern in patterns)))
        names = [entry.name.removeprefix(f"{tmp_path}/") for entry in corpus.listing()]
        return names, dict(corpus.skipped_files())

    assert found("*.txt") == (["[e].txt", "a.txt", "b.txt"], {})
    assert found("[e].txt") == (["[e].txt"], {})  # the name of a file
    assert found("*") == (["[e].txt", "a.txt", "b.txt", "sub/deep/g.txt", "sub/f.txt"], {".pdf": 1, ".log": 1})
    assert found("*.log") == (["d.log"], {})  # named by its suffix
    assert found("**") == (["[e].txt", "a.txt", "b.txt", "sub/deep/g.txt", "sub/f.txt"], {".pdf": 1, ".log": 1})
    assert found("**/*.txt", "?.txt") == (
        ["[e].txt", "a.txt", "b.txt", "sub/deep/g.txt", "sub/f.txt"], {"listed twice": 2},
    )  # fmt: skip
    with pytest.raises(DataError, match=r"no file matches .*/\*.md; correct data.paths"):
        found("*.md")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "a.parquet").touch()
    with pytest.raises(DataError, match=r"no .txt or .* found .parquet \(1\); set data.corpus to files"):
        found("tables")


OTHER_USER = """
import os, sys
from shoal.config.data_options import Data
from shoal.data.corpus.sources import open_corpus
from shoal.errors import DataError
if os.getuid() == 0:  # root ignores permissions
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    print(len(open_corpus(Data(corpus="text", paths=(sys.argv[1],))).listing()))
except DataError as error:
    print(error)
"""


def test_what_cannot_be_read_is_named_and_nothing_is_trained_on(tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own folder is private to its user
    try:
        for name in ("a", "b"):
            (folder / name).mkdir()
            for number in range(20):
                (folder / name / f"{number}.txt").write_text("text")
        folder.chmod(0o755)
        command = [sys.executable, "-c", OTHER_USER, str(folder)]

        def said() -> str:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

        assert said() == "40"
        (folder / "a" / "3.txt").chmod(0)
        (folder / "b").chmod(0o300)
        assert all(f"{folder}/{name} (Permission denied)" in said() for name in ("a/3.txt", "b"))
        (folder / "a" / "3.txt").chmod(0o644)
        (folder / "b").chmod(0o755)
        (folder / "unmounted").symlink_to("/nowhere/at/all")
        (folder / "gone.txt").symlink_to("nowhere")
        assert all(name in said() for name in ("unmounted (", "gone.txt ("))
    finally:
        shutil.rmtree(folder)
