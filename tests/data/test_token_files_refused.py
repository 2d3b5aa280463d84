"""Token files that cannot be what they should be: one clear message each."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.data.prepare import prepare
from shoal.errors import DataError
from shoal.resolve.resolve import resolve
from tests.data import token_writers as writers
from tests.data.test_token_files import token_data
from tests.resolve.test_resolve import problems, write

DOCUMENTS = [list(range(32, 100))] * 50


def refused(folder: Path, *paths: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as found:
        prepare(token_data(folder, *paths, **options))
    assert not list(folder.glob("data/*/*.json")), "nothing is recorded"
    return str(found.value)


def raw_file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        (b"", {}, "t.bin has no tokens"),
        (bytes(1001), {}, "has 1,001 bytes, not a multiple of the 2 of uint16, the type for a vocabulary of 257"),
        (bytes(1002), {"token_type": "int32"}, "not a multiple of the 4 of int32: it was cut short, or data.token_type is wrong"),
        (struct.pack("<40I", *range(40)), {}, "t.bin looks like 4-byte ids, not uint16, the type for a vocabulary of 257; set data.token_type"),
        (struct.pack("<i", 20240520), {}, "has 4 bytes, less than the 1,024 of llm.c's header"),
        (bytes(900), {"token_format": "llm.c"}, "has 900 bytes, less than the 1,024"),
        (bytes(2048), {"token_format": "llm.c"}, "not a token file of llm.c: it begins with 0, not 20240520 or 20240801"),
        (struct.pack("<256i", 20240520, 3, 4, *[0] * 253) + bytes(8), {}, "has version 3 of llm.c's format; shoal reads versions 1 or 7"),
        (struct.pack("<256i", 20240520, 1, 5, *[0] * 253) + bytes(8), {}, "its header counts 5 tokens of uint16, 1,034 bytes in all, but the file has 1,032"),
        (struct.pack("<256i", 20240801, 7, -1, *[0] * 253), {}, "its header counts -1 tokens of uint32"),
        (struct.pack("<256i", 20240520, 1, 0, *[0] * 253), {}, "t.bin has no tokens"),
        (struct.pack("<256i", 20240522, 1, 5, *[0] * 253), {}, "t.bin is an evaluation file of llm.c"),
        (struct.pack("<256i", 20240326, 3, 5, *[0] * 253), {"token_format": "llm.c"}, "t.bin is a model of llm.c; correct data.token_format"),
        (struct.pack("<256i", 20240520, 1, 1, *[0] * 253) + bytes(2), {"token_type": "int32"}, "holds uint16 ids by its header, not int32"),
        (bytes(2048), {"token_format": "megatron"}, "t.bin has no t.idx beside it"),
    ],
)  # fmt: skip
def test_a_bad_bin_file(tmp_path: Path, content: bytes, options: dict[str, str], says: str) -> None:
    assert says in refused(tmp_path, raw_file(tmp_path / "t.bin", content), **options)


def changed(at: int, form: str, value: float) -> Callable[[bytes], bytes]:
    """Return a function that writes a value into an index."""
    return lambda index: index[:at] + struct.pack(form, value) + index[at + struct.calcsize(form) :]


FIRST_POINTER, FIRST_DOCUMENT = 34 + 4 * 50, 34 + 12 * 50


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda index: b"MMIDIDX\x00", "t.idx is not an index of Megatron-LM"),
        (lambda index: b"X" + index[1:], "t.idx is not an index of Megatron-LM"),
        (
            lambda index: index[:-8],
            "t.idx has 1,034 bytes, but its header needs 1,042 (50 sequences, 51 document indices)",
        ),
        (changed(9, "<Q", 2), "has version 2; shoal reads version 1"),
        (changed(17, "<B", 6), "says that t.bin holds float64 numbers, which are not token ids"),
        (changed(17, "<B", 9), "has the dtype code 9"),
        (changed(17, "<B", 4), "t.idx does not fit t.bin: its sequences are bytes 0 to"),
        (changed(18, "<Q", 2**63), "but its header needs"),
        (changed(FIRST_POINTER, "<q", 2), "its sequences are bytes 2 to 6,900 of 6,900"),
        (changed(FIRST_POINTER + 8, "<q", 2**62), "sequence 1 does not follow the one before it"),
        (changed(FIRST_POINTER + 8, "<q", -2), "sequence 1 does not follow the one before it"),
        (changed(34 + 4, "<i", -1), "sequence 1 does not follow the one before it"),
        (changed(FIRST_DOCUMENT, "<q", 1), "its documents are sequences 1 to 50 of 50"),
        (changed(FIRST_DOCUMENT + 16, "<q", 1000), "its documents are not in order"),
        (changed(FIRST_DOCUMENT + 16, "<q", -1), "its documents are not in order"),
    ],
)
def test_an_index_that_does_not_fit(tmp_path: Path, damage: Callable[[bytes], bytes], says: str) -> None:
    path = writers.megatron(tmp_path / "t", DOCUMENTS, 256)
    path.write_bytes(damage(path.read_bytes()))
    assert says in refused(tmp_path, path, val_fraction=0.5)


def test_a_bin_file_that_does_not_fit_its_index(tmp_path: Path) -> None:
    path = writers.megatron(tmp_path / "t", DOCUMENTS, 256).with_suffix(".bin")
    whole = path.read_bytes()
    for content, says in (
        (whole[:-2], "bytes 0 to 6,900 of 6,898"),
        (whole[:-1], "6,899 bytes are not a multiple"),
        (b"", "bytes 0 to 6,900 of 0"),
    ):
        path.write_bytes(content)
        assert f"t.idx does not fit t.bin: {says}" in refused(tmp_path, path).replace("its sequences are ", "")
    path.unlink()
    assert "t.bin" in refused(tmp_path, path.with_suffix(".idx"))


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((4, 4), np.int32), "is an array of int32, shape (4, 4); token files have one dimension of integers"),
        (np.zeros(4, np.float32), "is an array of float32, shape (4,)"),
        (np.array([{}, 1], object), "t.npy is a pickle, which can run any code"),
    ],
)
def test_a_numpy_file_of_something_else(tmp_path: Path, array: np.ndarray[Any, Any], says: str) -> None:
    np.save(tmp_path / "t.npy", array, allow_pickle=True)
    assert says in refused(tmp_path, tmp_path / "t.npy")


def test_a_damaged_numpy_file(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.zeros(100, np.uint16))
    whole = (tmp_path / "t.npy").read_bytes()
    cut = raw_file(tmp_path / "cut.npy", whole[:-10])
    assert "its header counts 100 tokens of uint16, 328 bytes in all, but the file has 318" in refused(tmp_path, cut)
    for content in (whole[:7], whole[:40], whole[:6] + b"\x09\x00" + whole[8:], whole.replace(b"'descr'", b"[[[[[[[")):
        assert "has a damaged NumPy header" in refused(tmp_path, raw_file(tmp_path / "bad.npy", content))
    assert "has a NumPy header; set data.token_format to raw" in refused(
        tmp_path, tmp_path / "t.npy", token_format="nanogpt"
    )


@pytest.mark.parametrize("name", ["meta.pkl", "tokens.pt"])
def test_a_pickle(tmp_path: Path, name: str) -> None:
    assert f"{name} is a pickle" in refused(tmp_path, raw_file(tmp_path / name, b"\x80\x04N."))


def test_files_that_do_not_go_together(tmp_path: Path) -> None:
    nanogpt = writers.nanogpt(tmp_path / "a", DOCUMENTS, 256)
    wide = writers.llm_c_wide(tmp_path / "b", DOCUMENTS, 256)
    assert "a.bin is uint16 and" in (said := refused(tmp_path, nanogpt, wide))
    assert "b.bin is uint32: token files of one corpus must have one type and one format" in said
    narrow = writers.llm_c(tmp_path / "c", DOCUMENTS, 256)
    assert "a.bin is nanogpt and" in refused(tmp_path, nanogpt, narrow)
    assert "has all the files of data.paths" in refused(tmp_path, nanogpt, val_paths=(str(nanogpt),))


def test_paths_without_token_files(tmp_path: Path) -> None:
    raw_file(tmp_path / "a.txt", b"text")
    assert "no token files (.bin, .idx, .npy, .ds) in" in (said := refused(tmp_path, tmp_path))
    assert ".txt (1)" in said
    assert "a.txt: names of token files end in .bin" in refused(tmp_path, tmp_path / "a.txt")
    assert "no file matches" in refused(tmp_path, tmp_path / "*.bin")


@pytest.mark.parametrize("name", ["val.bin", "fineweb_val_000000.bin", "x-validation.npy"])
def test_held_out_files_are_not_trained_on_by_accident(tmp_path: Path, name: str) -> None:
    (tmp_path / "f").mkdir()
    held = writers.nanogpt(tmp_path / "f" / "x", DOCUMENTS, 256).rename(tmp_path / "f" / name)
    train = writers.nanogpt(tmp_path / "f" / "interval", DOCUMENTS, 256)
    assert f"{name} is named like held-out tokens, but would be trained on; set data.val_paths" in refused(
        tmp_path, tmp_path / "f"
    )
    for paths in ([tmp_path / "f"], [train]):
        prepared = prepare(token_data(tmp_path, *paths, val_paths=(str(held),)))
        assert prepared.counts["train"].documents == prepared.counts["val"].documents == 50
    assert prepare(token_data(tmp_path, held)).counts["train"].documents > 40, "named as a file, it is trained on"


def test_a_type_too_narrow_for_the_end_token(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.zeros(100, np.uint8))
    assert "holds uint8 ids, too narrow for the end token of data.tokenizer bytes, 256" in refused(
        tmp_path, tmp_path / "t.npy"
    )


def test_a_tokenizer_without_an_end_token(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text('{"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null, "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}')  # fmt: skip
    one = writers.nanogpt(tmp_path / "one", DOCUMENTS, 256)
    assert "has no end-of-text token" in refused(tmp_path, one, tokenizer=str(path))
    assert "needs the tokenizer that made its tokens" in refused(tmp_path, one, tokenizer="bpe")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"corpus": "tokens", "tokenizer": "bytes"}, "a tokens corpus needs files or folders; set data.paths"),
        ({"corpus": "tokens", "tokenizer": "bytes", "paths": ["gone.bin"]}, "data.paths does not exist: gone.bin"),
        ({"corpus": "tokens", "tokenizer": "bytes", "paths": ["."], "val_paths": ["gone.bin"]}, "data.val_paths does not exist: gone.bin"),
        ({"corpus": "tokens", "paths": ["."]}, "a tokens corpus needs the tokenizer that made its tokens; set data.tokenizer"),
        ({"corpus": "tokens", "tokenizer": "bytes", "paths": ["."], "token_format": "llm.c", "token_type": "int32"}, "data.token_type has no effect"),
        ({"corpus": "tokens", "tokenizer": "bytes", "paths": ["."], "shard_tokens": 2048}, "data.shard_tokens has no effect"),
        ({"corpus": "tokens", "tokenizer": "bytes", "paths": ["."], "val_paths": ["."], "val_fraction": 0.1}, "data.val_fraction has no effect"),
        ({"corpus": "stdlib", "token_format": "raw"}, "data.token_format is of token files"),
        ({"corpus": "stdlib", "token_type": "int32"}, "data.token_type is of token files"),
    ],
)  # fmt: skip
def test_options_that_contradict_token_files(tmp_path: Path, data: dict[str, Any], says: str) -> None:
    found = problems(tmp_path, {"train": {"steps": 1}, "data": data})
    assert len(found) == 1, found
    assert says in found[0]


def test_options_that_token_files_take(tmp_path: Path) -> None:
    (tmp_path / "a.bin").touch()
    paths = {"paths": [f"{tmp_path}/*.bin"], "val_paths": ["."]}
    data = {"corpus": "tokens", "tokenizer": "bytes", "token_type": "int32", **paths}
    resolved = resolve(write(tmp_path, {"train": {"steps": 1}, "data": data})).config.data
    assert (resolved.token_type, resolved.val_paths) == ("int32", (".",))
