"""
Untrusted input: names and links that escape a folder, wrong sizes, decompression bombs, code.

shoal opens no archives. It downloads single files, reads safetensors and JSON, and unpacks compressed text piece by piece.
tests/hub has more: names and sizes from a hub, and wrong headers.
"""

from __future__ import annotations

import ast
import contextlib
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from shoal.checkpoint.saved import damage, listed
from shoal.config.data_options import Data
from shoal.config.options import Model
from shoal.data.corpus.sources import open_corpus
from shoal.data.prepare import prepare
from shoal.data.stored.manifest import load_manifest
from shoal.errors import DataError, ModelError, ShoalError
from shoal.hub.beside import copy_files
from shoal.hub.fetch import fetch_model
from shoal.hub.folder import ModelFolder
from shoal.infer.load import load_folder
from shoal.models.hf_open import open_causal_lm
from shoal.resolve.resolve import resolve
from shoal.run.jsonl import whole_lines
from tests.hub import small
from tests.hub.conftest import NAME, Scene, scene

__all__ = ["scene"]
SOURCE = Path(__file__).parents[2] / "src" / "shoal"
DEEP = b'{"a":' * 200_000 + b"1" + b"}" * 200_000


# --- decompression bombs ---------------------------------------------------------------------------------


def corpus_of(path: Path) -> Data:
    return Data(corpus="jsonl", paths=(str(path),))


@pytest.mark.parametrize("pack", ["gz", "xz", "zst"])
@pytest.mark.parametrize("filler", [b"\n", b"x", b'{"text": "a"}\n'], ids=["blank lines", "one line", "documents"])
def test_a_bomb_is_refused_before_it_has_unpacked(
    filler: bytes, pack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.data.corpus.streams.BOMB_BYTES", 1 << 20)
    monkeypatch.setattr("shoal.data.corpus.streams.MAX_LINE_BYTES", 1 << 18)
    path = tmp_path / f"bomb.jsonl.{pack}"
    compress: Callable[[bytes], bytes] = {"gz": gzip, "xz": lzma, "zst": zstandard}[pack].compress
    path.write_bytes(compress(filler * ((1 << 22) // len(filler))))
    with pytest.raises(DataError, match=r"bomb.jsonl\.\w+ unpacks to more than 200 times its size.*data.paths"):
        for _ in open_corpus(corpus_of(path)).read():
            pass


def test_honest_text_that_repeats_itself_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.data.corpus.streams.BOMB_BYTES", 1 << 16)
    path = tmp_path / "honest.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for number in range(20_000):
            file.write(json.dumps({"text": f"once more, for the {number}th time"}) + "\n")
    assert sum(1 for _ in open_corpus(corpus_of(path)).read()) == 20_000


def test_a_hub_that_sends_a_small_file_which_unpacks_to_a_large_one(scene: Scene) -> None:
    """Its response is compressed although the request did not allow that."""
    bomb = gzip.compress(b"{" + b" " * 50_000_000)
    config = scene.repository.files["config.json"]
    scene.repository.stated_bytes["config.json"] = len(config)
    scene.repository.altered["config.json"] = bomb
    scene.repository.encodings["config.json"] = "gzip"
    with pytest.raises(ModelError, match=r"sends more of org/tiny's config.json than its stated \d+ bytes"):
        fetch_model(NAME)
    assert not scene.folder.exists()


@pytest.mark.parametrize("stated", [-1, 1 << 62, "12", None, 1.5])
def test_a_size_that_no_file_has(scene: Scene, stated: object) -> None:
    scene.repository.stated_bytes["config.json"] = stated  # type: ignore[assignment]
    with pytest.raises(ModelError, match=r"states no size|needs [\d,.]+ GB more"):
        fetch_model(NAME)
    assert not scene.folder.exists()


# --- endless nesting --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "read",
    [
        lambda folder: listed(folder),
        lambda folder: list(whole_lines(folder / "config.json")),
        lambda folder: damage(folder / "step-00000001"),
        lambda folder: ModelFolder.open(folder),
        lambda folder: load_manifest(folder),
        lambda folder: resolve(folder / "config.json"),
        lambda folder: resolve(None, [("model.from", str(folder), "here")]),
        lambda folder: prepare(Data(corpus="dummy", tokenizer=str(folder), folder=str(folder / "data"))),
    ],
    ids=["checkpoints", "lines", "a checkpoint", "a model", "prepared data", "a recipe", "model.from", "a tokenizer"],
)
def test_json_that_is_nested_without_end_is_at_most_one_message(read: Callable[[Path], object], tmp_path: Path) -> None:
    checkpoint = tmp_path / "step-00000001"
    checkpoint.mkdir()
    for folder in (tmp_path, checkpoint):
        for name in (
            "config.json",
            "manifest.json",
            "state.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "fetched.json",
        ):
            (folder / name).write_bytes(DEEP)
    with contextlib.suppress(ShoalError):
        read(tmp_path)


# --- names and links that escape a folder -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "../model.safetensors", "a/b.safetensors"])
def test_an_index_whose_shards_are_elsewhere(name: str, tmp_path: Path) -> None:
    folder = small.save("llama", tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"] = dict.fromkeys(found["weight_map"], name)
    index.write_text(json.dumps(found))
    with pytest.raises(ModelError, match=r"which is not a \*.safetensors beside it"):
        ModelFolder.open(folder)


def test_prepared_data_whose_shards_are_elsewhere(tmp_path: Path) -> None:
    folder = prepare(Data(corpus="dummy", dummy_documents=50, tokenizer="bytes", folder=str(tmp_path / "data"))).folder
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    found = json.loads(text)["splits"]["train"]["shards"][0]["name"]
    manifest.write_text(text.replace(f'"{found}"', '"../../elsewhere.safetensors"'))
    with pytest.raises(DataError, match=r"names ../../elsewhere.safetensors, which is outside its folder"):
        load_manifest(folder)


def test_a_checkpoint_whose_files_are_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    (tmp_path / "other").write_bytes(b"there")
    (folder / "manifest.json").write_text(json.dumps({"files": {"../other": {"bytes": 5, "sha256": ""}}}))
    assert damage(folder) == f"{folder / 'other'} is missing"


def test_a_link_out_of_a_models_folder_does_not_come_along(tmp_path: Path) -> None:
    folder, target, key = tmp_path / "model", tmp_path / "out", tmp_path / "id_rsa"
    for made in (folder, target):
        made.mkdir()
    key.write_text("private")
    (folder / "LICENSE").symlink_to("../id_rsa")
    with pytest.raises(ModelError, match=r"LICENSE links out of its folder to .*id_rsa"):
        copy_files(folder, target, ("LICENSE",))
    assert list(target.iterdir()) == []


def test_links_within_a_folder_and_into_the_cache_of_hugging_face_do(tmp_path: Path) -> None:
    snapshot, blobs, target = tmp_path / "snapshots" / "c0ffee", tmp_path / "blobs", tmp_path / "out"
    for made in (snapshot, blobs, target):
        made.mkdir(parents=True)
    (blobs / "1234").write_text("terms")
    (snapshot / "LICENSE").symlink_to("../../blobs/1234")
    (snapshot / "NOTICE").symlink_to("LICENSE")
    assert copy_files(snapshot, target, ("LICENSE", "NOTICE", "USE_POLICY.md")) == ["LICENSE", "NOTICE"]
    assert (target / "NOTICE").read_text() == "terms"
    assert not (target / "LICENSE").is_symlink()


# --- code -------------------------------------------------------------------------------------------------


def test_nothing_turns_on_code_from_elsewhere_and_nothing_opens_archives_or_pickles() -> None:
    """In all source files, `trust_remote_code` is only False, and no module that runs or unpacks foreign code is imported."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant), where
                assert node.value.value is False, where
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {getattr(node, "module", None), *(alias.name for alias in node.names)}
                assert not names & {"pickle", "marshal", "shelve", "dill", "tarfile", "zipfile"}, where
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "torch.load", "shutil.unpack_archive", "yaml.load"), where


@pytest.mark.parametrize("family", ["llama", "hf"])
def test_a_folder_with_code_of_its_own_is_refused_and_the_code_is_not_run(family: str, tmp_path: Path) -> None:
    folder = small.save("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "tiny_of_theirs"
    config["auto_map"] = {"AutoConfig": "theirs.TinyConfig", "AutoModelForCausalLM": "theirs.Tiny"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(ModelError, match=r"tiny_of_theirs"):
        load_folder(str(folder), family="hf" if family == "hf" else None, device="cpu")
    with pytest.raises(ModelError, match=r"its own code, which shoal never runs"):
        open_causal_lm(Model(family="hf", from_=str(folder)))
    assert not (tmp_path / "ran").exists()


def test_a_folder_that_brings_code_for_a_model_that_is_known_is_computed_without_it(tmp_path: Path) -> None:
    folder = small.save("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "theirs.TinyConfig", "AutoModelForCausalLM": "theirs.Tiny"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    load_folder(str(folder), family="hf", device="cpu")
    load_folder(str(folder), device="cpu")
    assert not (tmp_path / "ran").exists()
