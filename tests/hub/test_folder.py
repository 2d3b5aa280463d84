"""Folders of weights: what the safetensors library wrote is read back, and all damage is reported."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from shoal.errors import ModelError
from shoal.hub.folder import INDEX, SINGLE, ModelFolder
from shoal.hub.record import RECORD, FileRecord, Record

TENSORS = {
    "model.embed.weight": torch.arange(48, dtype=torch.bfloat16).reshape(12, 4),
    "model.norm.weight": torch.ones(4),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(3, dtype=torch.int64),
}


def make_folder(folder: Path, shards: int = 1) -> Path:
    """Write a model as other programs do: one file, or shards and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    if shards == 1:
        save_file(TENSORS, folder / SINGLE, metadata={"format": "pt"})
        return folder
    places = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(TENSORS)}
    for file in set(places.values()):
        save_file({n: t for n, t in TENSORS.items() if places[n] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_what_safetensors_wrote_is_found(tmp_path: Path, shards: int) -> None:
    opened = ModelFolder.open(make_folder(tmp_path, shards))
    assert opened.config == {"model_type": "llama"}
    assert {n: e.shape for n, e in opened.tensors.items()} == {n: tuple(t.shape) for n, t in TENSORS.items()}
    assert opened.tensors["model.embed.weight"].dtype == "BF16"
    assert opened.tensors["scalar"].dtype == "I64"
    assert opened.dtype == "BF16"
    assert opened.bytes == sum(t.nbytes for t in TENSORS.values())
    assert len(opened.files) == shards


def test_the_only_safetensors_file_needs_no_special_name(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / SINGLE).rename(tmp_path / "weights.safetensors")
    assert len(ModelFolder.open(tmp_path).tensors) == len(TENSORS)
    save_file(TENSORS, tmp_path / "other.safetensors")
    refused(tmp_path, "has 2 \\*.safetensors and no model.safetensors.index.json")


def refused(folder: Path, pattern: str) -> str:
    with pytest.raises(ModelError) as caught:
        ModelFolder.open(folder)
    assert re.search(pattern, str(caught.value)), str(caught.value)
    return str(caught.value)


def rewrite_header(path: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    fields = json.loads(raw[8 : 8 + length])
    text = json.dumps(change(fields)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def test_damage_is_named(tmp_path: Path) -> None:
    whole = (make_folder(tmp_path) / SINGLE).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for raw, pattern in [
        (whole[:-1], "is cut short: it has .* bytes of weights, but its header says"),
        (whole[: length // 2], "is cut short"),
        (whole[:5], "is cut short: it has 5 bytes"),
        (b"", "is cut short: it has 0 bytes"),
        (whole + b"x", "has 1 bytes more than its header says"),
        (b"\xff" * 100, "is not a safetensors file"),
        (whole[:8] + b"{" * length + whole[8 + length :], "header cannot be read"),
        (whole[:8] + b"[" * length + whole[8 + length :], "header cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "is a Git LFS pointer"),
        ((30).to_bytes(8, "little") + b'{"a": 1, "a": 2}'.ljust(30), "names a twice"),
    ]:
        (tmp_path / SINGLE).write_bytes(raw)
        assert SINGLE in refused(tmp_path, pattern)


def test_what_the_safetensors_library_refuses_is_refused_and_nothing_else(tmp_path: Path) -> None:
    """Alter a random byte of the header; both readers accept it, or both reject it."""
    whole = (make_folder(tmp_path) / SINGLE).read_bytes()
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(0)
    opened = 0
    for _ in range(500):
        altered = bytearray(whole)
        altered[draw.randrange(header_bytes)] = draw.choice(b'09"{}[],: aF\xff')
        (tmp_path / SINGLE).write_bytes(altered)
        try:
            with safe_open(tmp_path / SINGLE, "pt") as file:
                expected = {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
        except SafetensorError:
            refused(tmp_path, SINGLE)
        else:
            assert {n: e.shape for n, e in ModelFolder.open(tmp_path).tensors.items()} == expected
            opened += 1
    assert 0 < opened < 500


@pytest.mark.parametrize(
    ("field", "value", "pattern"),
    [
        ("dtype", "F7", "in F7, an unknown dtype"),
        ("shape", [12, 5], "has 96 bytes for model.embed.weight, which is BF16 with shape"),
        ("shape", [-1, 4], "without a valid location"),
        ("shape", "4", "without a valid location"),
        ("data_offsets", [0], "without a valid location"),
        ("data_offsets", [1, 97], "overlap or leave gaps"),
        ("data_offsets", [0.0, 96.0], "without a valid location"),
    ],
)
def test_a_header_that_lies_is_named(tmp_path: Path, field: str, value: object, pattern: str) -> None:
    path = make_folder(tmp_path) / SINGLE

    def change(fields: dict[str, dict[str, object]]) -> object:
        fields["model.embed.weight"][field] = value
        return fields

    rewrite_header(path, change)
    refused(tmp_path, pattern)


def test_an_index_that_lies_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path, 2)
    index = json.loads((tmp_path / INDEX).read_text())
    first, second = sorted(set(index["weight_map"].values()))

    def say(weight_map: object) -> None:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    say(index["weight_map"] | {"ghost": first})
    refused(tmp_path, f"{first} lacks ghost, which .*index.json says it has")
    say(index["weight_map"] | {"ghost": "model-9.safetensors"})
    refused(tmp_path, "model-9.safetensors is missing")
    for outside in ("../x.safetensors", "/x.safetensors", "a/x.safetensors", "model.bin", 3):
        say({"a": outside})
        refused(tmp_path, "which is not a \\*.safetensors beside it")
    say([])
    refused(tmp_path, "has no weight_map")
    say(index["weight_map"])
    save_file(TENSORS, tmp_path / second)
    refused(tmp_path, f"{second} has .*, as does {first}")
    (tmp_path / first).unlink()
    refused(tmp_path, f"{first} is missing")


def test_a_folder_of_something_else_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "there is no folder")
    refused(tmp_path, "config.json is missing")
    for text, pattern in [
        ("{", "is not a JSON object"),
        ("[1]", "is not a JSON object"),
        ('{"a": 1, "a": 2}', "a twice"),
    ]:
        (tmp_path / "config.json").write_text(text)
        refused(tmp_path, f"config.json.*{pattern}")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "has no \\*.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    refused(tmp_path, "only pickled weights .*can run code.*safe_serialization=True")
    save_file({}, tmp_path / SINGLE)
    refused(tmp_path, "holds no tensors")


def test_a_fetched_folder_says_how_to_get_it_again(tmp_path: Path) -> None:
    make_folder(tmp_path)
    record = Record("org/tiny", "main", "0" * 40, {SINGLE: FileRecord(1, "")})
    (tmp_path / RECORD).write_bytes(record.to_json())
    (tmp_path / SINGLE).unlink()
    assert f"shoal fetch model org/tiny --to {tmp_path} --force" in refused(tmp_path, "has no")
