"""Files that are damaged, cut short, in another format or never opened: each is one message, or skipped and counted."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard

from shoal.config.data_options import Data
from shoal.data.corpus.documents import LOST_PART, Document, Skipped
from shoal.data.corpus.sources import open_corpus
from shoal.data.prepare import prepare
from shoal.data.split import choose_split
from shoal.errors import DataError
from tests.data.conftest import MakeData

Items = list[Document | Skipped]
TABLE = pa.table({"text": [f"text {n} " * 9 for n in range(40)], "number": list(range(40))})


def read(path: Path, **options: Any) -> Items:
    return list(open_corpus(Data(**{"corpus": "files", "paths": (str(path),), **options})).read())


def texts(items: Items) -> list[str]:
    return [item.text for item in items if isinstance(item, Document)]


def skipped(items: Items) -> list[Skipped]:
    return [item for item in items if isinstance(item, Skipped)]


def as_parquet(table: pa.Table = TABLE, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(table, sink, row_group_size=10, **options)
    return bytes(sink.getvalue())


def as_arrow(table: pa.Table = TABLE, writer: Callable[..., Any] = pa.ipc.new_stream) -> bytes:
    sink = pa.BufferOutputStream()
    with writer(sink, table.schema) as out:
        out.write_table(table, max_chunksize=10)
    return bytes(sink.getvalue())


def as_zip(name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr(name, pickle.dumps([1]))
    return out.getvalue()


LATIN = ("Ein Bär aß Käse über den Wäldern. " * 20).encode("latin-1")
TEXT = json.dumps([{"text": f"text {n}"} for n in range(50)]).encode()
TAR = b"a.txt".ljust(257, b"\0") + b"ustar\x00" + bytes(500)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        # never opened
        ("a.pkl", b"", "a pickle, which may run code when opened"),
        ("a.pt", b"", "a pickle, which may run code when opened"),
        ("a.txt", pickle.dumps(["a"] * 99), "a pickle, which may run code when opened"),
        ("a.parquet", pickle.dumps(["a"] * 99), "a pickle, which may run code when opened"),
        ("a.jsonl", as_zip("archive/data.pkl"), "a pickle, which may run code when opened"),
        ("a.zip", b"", "an archive; unpack it"),
        ("a.tar.gz", b"", "an archive; unpack it"),
        ("a.jsonl", as_zip("a.jsonl"), "a zip file, .*; unpack it"),
        ("a.txt", TAR, "a tar file, .*; unpack it"),
        ("a.txt.gz", gzip.compress(TAR), "a tar file, .*; unpack it"),
        # another format than the suffix says
        ("a.txt", as_parquet(), "a Parquet file, .*set data.corpus to parquet"),
        ("a.jsonl", as_arrow(), "an? Arrow file, .*set data.corpus to arrow"),
        ("a.csv", as_arrow(writer=pa.ipc.new_file), "an? Arrow file, .*set data.corpus to arrow"),
        ("a.jsonl", gzip.compress(TEXT), r"a gzip file, .*the suffix \.gz"),
        ("a.json", zstandard.compress(TEXT), r"a zstd file, .*the suffix \.zst"),
        ("a.csv", lzma.compress(TEXT), r"an? xz file, .*the suffix \.xz"),
        ("a.jsonl", TEXT, "begins with a JSON array.*set data.corpus to json"),
        ("a.parquet", TEXT, "is not a parquet file, but a text file; set data.corpus"),
        ("a.parquet", as_arrow(), "is not a parquet file, but a Arrow file|is not a parquet file, but an Arrow file"),
        ("a.arrow", as_parquet(), "is not an? arrow file, but a Parquet file"),
        ("a.arrow", bytes(100), "is not an? arrow file, or was damaged"),
        ("a.parquet", b"", "a.parquet is empty"),
        # another encoding
        ("a.txt", LATIN, "ISO-8859-1 .*iconv -f ISO-8859-1"),
        ("a.csv", b"text\n" + LATIN, "ISO-8859-1 .*iconv -f ISO-8859-1"),
        ("a.json.gz", gzip.compress(b'[{"text": "' + LATIN + b'"}]'), "ISO-8859-1 .*iconv -f ISO-8859-1"),
        ("a.txt", ("“So!” he said – " * 30).encode("cp1252"), "iconv -f WINDOWS-1252"),
        ("a.txt", ("Медведь ел сыр. " * 30).encode("koi8-r"), "not in UTF-8; convert it"),
        ("a.json", TEXT.decode().encode("utf-16"), "in UTF-16, .*iconv -f UTF-16"),
        ("a.csv", ("text\n" + "line\n" * 50).encode("utf-16-le"), "in UTF-16LE, .*iconv -f UTF-16LE"),
        # cut short or wrong
        ("a.json", TEXT[:300], "ends inside the record that begins at byte 285, at byte 300,"),
        ("a.json.gz", gzip.compress(TEXT[:300]), "ends inside the record that begins at byte 285, at byte 300,"),
        ("a.json", b'[{"text": "a"},\n', "ends in its array, at byte 16,"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "not JSON at byte 15 .a comma or ]"),
        ("a.json", b'[{"text": "a"}] {"text": "b"}', "not JSON at byte 16 .something follows"),
        ("a.json", b'[{"text": "a"}, oops]', "not JSON at byte 16 .Expecting value"),
        ("a.json", b"plain text", "not JSON at byte 0 .Expecting value"),
        ("a.parquet", as_parquet()[:-900], "cannot be opened .*cut short"),
        ("a.arrow", as_arrow(writer=pa.ipc.new_file)[:-900], "cannot be opened .*cut short"),
        # columns
        ("a.parquet", as_parquet(TABLE.rename_columns(["story", "n"])), "no column text; its columns are story, n; set"),
        ("a.arrow", as_arrow(TABLE.rename_columns(["story", "n"])), "no column text; its columns are story, n; set"),
        ("a.csv", b"story,n\nonce,1\n", "first line must name the columns, has no column text; .* story, n; set data.text_key"),
        ("a.csv", b"\n\n,text,text\n1,2,3\n", "has the column text twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_bad_file_is_one_message(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=says) as error:
        read(path)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("forced", "name", "content", "says"),
    [
        ("jsonl", "a.csv", b"text\nonce\n", "2 skipped, not text: .*a.csv:1: not JSON; its suffix says csv: set data.corpus to csv"),
        ("json", "a.csv", b"text\nonce\n", "not JSON at byte 0 .*; its suffix says csv: set data.corpus to csv$"),
        ("csv", "a.jsonl", b'{"text": "once"}\n', "no column text; .*; its suffix says jsonl: set data.corpus to jsonl$"),
        ("csv", "a.csv", b"instruction,output\na,b\n", "set data.text_key .*as these look like alpaca, data.format to alpaca$"),
        ("jsonl", "a.jsonl", b'{"messages": [{"role": "user"}]}\n', "it looks like messages: set data.format to messages$"),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_or_format_names_the_option(
    forced: Any, name: str, content: bytes, says: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    corpus = open_corpus(Data(corpus=forced, paths=(str(tmp_path / name),)))
    with pytest.raises(DataError, match=says):
        choose_split(corpus, 0.1, 1000, lambda _: None)


def test_a_table_without_the_column_is_found_before_any_other_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(as_parquet())
    (tmp_path / "b.parquet").write_bytes(as_parquet(TABLE.drop_columns(["text"])))
    with pytest.raises(DataError, match=r"b\.parquet has no column text"):
        next(iter(open_corpus(Data(corpus="files", paths=(str(tmp_path),))).read()))


@pytest.mark.parametrize("module", ["pyarrow", "pyarrow.parquet", "zstandard"])
def test_a_missing_library_names_the_extra(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = {"pyarrow": "a.arrow", "pyarrow.parquet": "a.parquet"}.get(module, "a.txt.zst")
    (tmp_path / name).write_bytes(as_parquet() if name == "a.parquet" else as_arrow())
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"{name} needs {module.partition('.')[0]}: pip install 'shoal\[data\]'"):
        read(tmp_path / name)


# --- skipped and counted -----------------------------------------------------------------------------------


def test_damaged_records_of_an_array_are_skipped(tmp_path: Path) -> None:
    parts = [
        b'{"text": "one"}', b'{"text": bad, "in": ["}"]}', b'{"text": "\xff\xfe"}', b'{"text": "\\ud800"}', b'["text"]', b"3",
        b'{"text": 1}', b'{"text": "a", "text": "b"}', b'{"text": ""}', b'{"text": null}', b'{"other": ""}', b'{"text": "tab\there"}',
    ]  # fmt: skip
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + b" ,\n".join(parts) + b"]")
    items = read(path)
    assert texts(items) == ["one", "tab\there"]
    assert [s.damaged for s in skipped(items)] == [True] * 7 + [False] * 3
    assert [s.reason.split(" (")[0] for s in skipped(items)] == [
        "not JSON", "not UTF-8", "half a surrogate pair, not a character", "no string under 'text'", "no string under 'text'",
        "no string under 'text'", "'text' twice, so one text would be lost", "empty text", "no string under 'text'",
        "no string under 'text'",
    ]  # fmt: skip
    assert skipped(items)[0].name == f"{path}, record 2 (to byte {1 + 15 + 3 + 26})"


def test_damaged_rows_of_csv_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,n\none,1\n\nna\xefve,2\n"two\r\nlines",3\nthree\n"",4\n"th""e end",5\n"never closed,6\n')
    items = read(path)
    assert texts(items) == ["one", "two\r\nlines", 'th"e end']
    assert [(s.name, s.reason) for s in skipped(items)] == [
        (f"{path}, row 2", "not UTF-8"),
        (f"{path}, row 4", "1 fields, but the header has 2"),
        (f"{path}, row 5", "empty text"),
        (f"{path}, row 7", "1 fields, but the header has 2"),
    ]


def test_damaged_parts_of_a_table_are_skipped(tmp_path: Path) -> None:
    content = bytearray(as_parquet(compression="gzip", use_dictionary=False, write_page_checksum=False))
    group = pa.parquet.ParquetFile(io.BytesIO(content)).metadata.row_group(1).column(0)
    end = group.data_page_offset + group.total_compressed_size
    content[end - 30 : end] = b"x" * 30
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    items = read(path)
    assert texts(items) == [t for n, t in enumerate(TABLE["text"].to_pylist()) if n // 10 != 1]
    [problem] = skipped(items)
    assert problem.damaged == 10
    assert problem.name == f"{path}, rows 11 to 20"
    assert "damaged parquet" in problem.reason
    assert list(open_corpus(Data(corpus="files", paths=(str(path),))).read(problem.after)) == items[11:]


@pytest.mark.parametrize("writer", [pa.ipc.new_file, pa.ipc.new_stream])
def test_offsets_that_point_elsewhere_are_no_crash(writer: Callable[..., Any], tmp_path: Path) -> None:
    content = bytearray(as_arrow(writer=writer))
    lengths = [len(t) for t in TABLE["text"].to_pylist()[10:20]]
    offsets = b"".join((sum(lengths[:n])).to_bytes(4, "little") for n in range(11))
    begin = content.index(offsets, content.index(b"text 10"[:4]))
    content[begin + 8 : begin + 12] = (1 << 30).to_bytes(4, "little")
    path = tmp_path / "a.arrow"
    path.write_bytes(content)
    items = read(path)
    assert len(skipped(items)) == 1
    assert "damaged Arrow data" in skipped(items)[0].reason
    assert texts(items)[:10] == TABLE["text"].to_pylist()[:10]


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_row_that_is_not_utf8_is_named(form: str, tmp_path: Path) -> None:
    raw = [b"one", b"na\xefve", b"", None, b"two"]
    column = pa.array(raw, pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(raw), column.buffers())
    table = pa.table({"text": text})
    path = tmp_path / f"a.{form}"
    path.write_bytes(as_parquet(table) if form == "parquet" else as_arrow(table))
    items = read(path)
    assert texts(items) == ["one", "two"]
    assert [(s.name, s.reason, s.damaged) for s in skipped(items)] == [
        (f"{path}, row 2", "not UTF-8", True),
        (f"{path}, row 3", "empty text", False),
        (f"{path}, row 4", "no string under 'text' (data.text_key)", False),
    ]


@pytest.mark.parametrize("pack", ["gz", "xz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "altered"])
def test_damaged_compression_gives_what_precedes_it(pack: str, damage: str, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{number} {hash(str(number))}"}) for number in range(20_000)]
    content = "\n".join(lines).encode()
    zst = zstandard.ZstdCompressor(write_checksum=True)
    compress: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "xz": lzma.compress, "zst": zst.compress}
    packed = bytearray(compress[pack](content))
    half = len(packed) // 2
    if damage == "cut":
        del packed[half:]
    else:
        packed[half : half + 99] = bytes(99)
    path = tmp_path / f"a.jsonl.{pack}"
    path.write_bytes(packed)
    items = read(path)
    good = [json.loads(line)["text"] for line in lines]
    assert texts(items)[:1000] == good[: len(texts(items))][:1000]
    assert 0 < len(texts(items)) < len(good)
    assert skipped(items)[-1].damaged == LOST_PART
    assert skipped(items)[-1].reason.startswith("cut off" if damage == "cut" else "damaged")
    corpus = open_corpus(Data(corpus="files", paths=(str(path),)))
    assert list(corpus.read(items[500].after)) == items[501:]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt"])
def test_a_line_too_long_is_skipped_in_bounded_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.data.corpus.streams.MAX_LINE_BYTES", 1000)
    monkeypatch.setattr("shoal.data.corpus.csv_rows.MAX_LINE_BYTES", 1000)
    rows = [f"row {n}" if n % 3 else "word " * n * 100 for n in range(1, 10)]
    if name == "a.jsonl":
        lines = [json.dumps({"text": row}) for row in rows]
    else:
        lines = ["text", *rows] if name == "a.csv" else rows
    (tmp_path / name).write_text("\n".join(lines))
    items = read(tmp_path / name, wikitext=name == "a.txt")
    assert [(s.reason, s.damaged) for s in skipped(items)] == [("longer than 64 MiB", False)] * 3
    got = texts(items)[0].split("\n") if name == "a.txt" else texts(items)
    assert got == [row for row in rows if row.startswith("row")]


# --- the budget of damaged records -------------------------------------------------------------------------


def test_more_damaged_records_than_allowed_end_preparation(make_data: MakeData, tmp_path: Path) -> None:
    """Skipped records that are not damaged do not count, and a restart does not count a record twice."""
    lines = [json.dumps({"text": f"good {n}"}) if n % 4 else ("{" if n % 8 else '{"text": ""}') for n in range(80)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    data = make_data(corpus="jsonl", paths=(str(path),), bad_records=9)
    for _ in range(2):
        with pytest.raises(DataError, match=r"more than 9 records are damaged \(data.bad_records\)") as error:
            prepare(data)
        named = [n for n in range(1, 81) if f"{path}:{n}: not JSON" in str(error.value)]
        assert named == [5, 13, 21, 29, 37]
    prepared = prepare(make_data(corpus="jsonl", paths=(str(path),), bad_records=10))
    assert (prepared.manifest.skips.count, prepared.manifest.skips.damaged) == (20, 10)


@pytest.mark.parametrize("pack", ["gz", "xz", "zst"])
def test_a_file_that_was_cut_off_ends_preparation(pack: str, make_data: MakeData, tmp_path: Path) -> None:
    """Half of a corpus is not one record: only a raised limit reads on without it."""
    lines = [json.dumps({"text": f"{number} {hash(str(number))}"}) for number in range(20_000)]
    compress: dict[str, Callable[[bytes], bytes]] = {
        "gz": gzip.compress, "xz": lzma.compress, "zst": zstandard.compress,
    }  # fmt: skip
    packed = compress[pack]("\n".join(lines).encode())
    path = tmp_path / f"a.jsonl.{pack}"
    path.write_bytes(packed[: len(packed) // 2])
    says = rf"{path.name}, after [\d,]+ records: cut off, so the rest of the file is missing .*raise data\.bad_records"
    with pytest.raises(DataError, match=says):
        prepare(make_data(corpus="files", paths=(str(path),)))
    prepared = prepare(make_data(corpus="files", paths=(str(path),), bad_records=LOST_PART))
    assert prepared.manifest.skips.count == 1
    assert "cut off, so the rest of the file is missing" in " ".join(prepared.notes)


def test_a_corpus_of_other_records_says_which_field_has_text(make_data: MakeData, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"story": "once", "text": None}] * 50))
    with pytest.raises(DataError, match=r"no documents.*under 'story'; set data.text_key"):
        prepare(make_data(corpus="json", paths=(str(path),), bad_records=3))
