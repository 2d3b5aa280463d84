"""Exports: what they reject, what a failure leaves behind, and the files beside the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers
import yaml
from safetensors.torch import load_file

from shoal.errors import CheckpointError, ModelError, RunError, ShoalError
from shoal.infer import export
from shoal.infer.export import export_run
from shoal.resolve.resolve import resolve
from shoal.training.loop import complete
from shoal.training.run import Run
from tests.cli.commands import Place
from tests.hub import small
from tests.parallel.layouts import ALONE, NeverStop


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Return a folder with two runs of five steps and two checkpoints: `own`, with a chat template, and `bare`, with bytes."""
    place = Place(tmp_path_factory.mktemp("export"))
    small.save("llama", place.folder / "llama")
    (place.folder / "llama" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (place.folder / "llama" / "LICENSE").write_text("do what you like")
    shutil.copytree(place.folder / "llama", place.folder / "tokens", ignore=lambda *_: {"config.json", "LICENSE"})
    for name, tokenizer in {"own": place.folder / "tokens", "bare": "bytes"}.items():
        given = {
            "launch.name": name, "launch.runs": place.folder / "runs", "data.tokenizer": tokenizer, "train.steps": 5,
            "data.folder": place.folder / "data", "checkpoint.every": 3, "train.sample_prompt": '""',
            "launch.processes": 1,
        }  # fmt: skip
        config = resolve(place.folder / "recipe.yaml", [(k, str(v), "the test") for k, v in given.items()]).config
        run = Run.open(config, ALONE, NeverStop())
        complete(run)
        run.close()
    return place


def test_the_tokenizers_own_files_are_in_it(place: Place) -> None:
    out = export_run(place.folder / "runs", "own", step=None, out=place.folder / "out")
    assert (out / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer("abc").input_ids == [97, 98, 99]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    config = json.loads((out / "config.json").read_text())
    assert (config["eos_token_id"], config["torch_dtype"]) == (256, "float32")


def test_a_checkpoint_a_dtype_and_the_card(place: Place) -> None:
    out = place.folder / "step3"
    said = place.good("export", "bare", "--step=3", "--out", str(out), "--dtype=bfloat16", "--license=mine: [all]")
    assert f"exported to {out}" in said
    assert {str(t.dtype) for t in load_file(out / "model.safetensors").values()} == {"torch.bfloat16"}
    card = (out / "README.md").read_text()
    header = card.split("---")[1]
    assert yaml.safe_load(header)["license"] == "mine: [all]"
    assert "| trained for | 3 steps, " in card
    assert "| 3 |" in card
    assert "| 4 |" not in card  # the curve ends at this checkpoint
    assert transformers.AutoTokenizer.from_pretrained(out).eos_token == "<|endoftext|>"


def test_large_models_go_out_in_several_files(place: Place) -> None:
    whole = export_run(place.folder / "runs", "bare", step=None, out=place.folder / "whole")
    parts = export_run(place.folder / "runs", "bare", step=None, out=place.folder / "parts", shard_bytes=20_000)
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    files = sorted({*index["weight_map"].values()})
    assert len(files) > 2
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in load_file(whole / "model.safetensors").values())
    for (name, a), b in zip(small.load(whole).named_parameters(), small.load(parts).parameters(), strict=True):
        assert a.equal(b), name


@pytest.mark.parametrize(
    ("target", "step", "out", "words"),
    [
        ("nobody", None, "x", "is not a run; there are bare, own"),
        ("bare", 4, "x", "no checkpoint of step 4; it has steps 3, 5"),
        ("bare", None, "recipe.yaml", "already exists and is a file"),
        ("bare", None, "runs/bare", "already exists and contains checkpoints, which no export writes"),
        ("bare", None, "/proc/x", "cannot write"),
        ("bare", None, "~nobody-here/x", "cannot write"),
    ],
)
def test_what_cannot_be_is_one_message(place: Place, target: str, step: int | None, out: str, words: str) -> None:
    with pytest.raises(ShoalError) as error:
        export_run(
            place.folder / "runs", target, step=step, out=place.folder / out if out[0] != "~" else Path(out), force=True
        )
    assert words in str(error.value)


def test_a_folder_of_weights_that_is_no_export_stands(place: Place) -> None:
    out = place.folder / "by-hand"
    shutil.copytree(export_run(place.folder / "runs", "bare", step=3, out=place.folder / "one"), out)
    (out / "README.md").write_text("# my model")
    with pytest.raises(ModelError, match="is not an export"):
        export_run(place.folder / "runs", "bare", step=3, out=out, force=True)
    assert (out / "README.md").read_text() == "# my model"


def test_a_full_disk_is_seen_before(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    out = place.folder / "full"
    with pytest.raises(ModelError, match=r"its disk has 1\.0 kB free; set --out to another disk"):
        export_run(place.folder / "runs", "bare", step=None, out=out)
    assert not [*place.folder.glob(".full*")]


def test_what_fails_half_way_leaves_what_was_there(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    out = export_run(place.folder / "runs", "bare", step=3, out=place.folder / "stands")
    before = (out / "model.safetensors").read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_write_tokenizer", fail)
    with pytest.raises(ModelError, match="No space left on device"):
        export_run(place.folder / "runs", "bare", step=5, out=out, force=True)
    assert (out / "model.safetensors").read_bytes() == before
    assert not [*place.folder.glob(".stands*")]
    with pytest.raises(ModelError, match="already exists; set --force"):
        export_run(place.folder / "runs", "bare", step=5, out=out)
    monkeypatch.undo()
    export_run(place.folder / "runs", "bare", step=5, out=out, force=True)
    assert (out / "model.safetensors").read_bytes() != before
    assert not [*place.folder.glob(".stands*")]


def test_through_a_link_to_another_disk(place: Place, tmp_path: Path) -> None:
    """The folder behind the link is replaced, the link stays, and all files have the same permissions."""
    (tmp_path / "large").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large")
    for _ in range(3):
        export_run(place.folder / "runs", "bare", step=None, out=tmp_path / "out", force=True)
    assert (tmp_path / "out").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large", "out"]
    modes = {path.stat().st_mode for path in (tmp_path / "large").iterdir()}
    assert len(modes) == 1


def test_two_at_once_do_not_mix(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = export._write_tokenizer
    refused = []

    def another(*given: object) -> None:
        with pytest.raises(ModelError) as error:
            export_run(place.folder / "runs", "bare", step=3, out=place.folder / "both")
        refused.append(str(error.value))
        plain(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(export, "_write_tokenizer", another)
    out = export_run(place.folder / "runs", "bare", step=5, out=place.folder / "both")
    assert "another export to" in refused[0]
    assert "| trained for | 5 steps" in (out / "README.md").read_text()


def test_an_altered_checkpoint_is_not_exported(place: Place, tmp_path: Path) -> None:
    shutil.copytree(place.folder / "runs" / "bare", tmp_path / "bare", symlinks=True)
    [file, *_] = sorted((tmp_path / "bare" / "checkpoints" / "step-00000005").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="was altered"):
        export_run(tmp_path, "bare", step=None, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(RunError):
        export_run(tmp_path, "nobody", step=None, out=tmp_path / "out")
