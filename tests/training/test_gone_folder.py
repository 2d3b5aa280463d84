"""A run started from a model folder resumes without it: the weights are in the checkpoint, copies of other files in the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.commands import Place
from tests.hub import small

RECIPE = """
data: {corpus: dummy, dummy_documents: 60, seq_len: 48}
train: {steps: 6, global_batch: 4, micro_batch: 2, dtype: float32, device: cpu, sample_tokens: 5, eval_every: 0}
optim: {schedule: constant}
checkpoint: {every: 3}
metrics: {peak_tflops: 1, report: false}
launch: {processes: 2, threads: 1}
"""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    small.save("llama", tmp_path / "models" / "org" / "tiny")
    return place


@pytest.mark.ci
@pytest.mark.parametrize("family", ["llama", "hf"])
def test_it_goes_on_without_the_folder_to_the_same_bits(place: Place, family: str) -> None:
    run = ["train", "recipe.yaml", "--model.from", "org/tiny", *(["--model.family", "hf"] if family == "hf" else [])]
    place.good(*run, "--name", "whole")
    begun = place.good(*run, "--name", "mine", "--train.steps", "3")
    assert "weights were loaded from org/tiny, models/org/tiny (model.from)" in begun
    shutil.rmtree(place.folder / "models")
    output = place.good(*run, "--name", "mine")
    assert "org/tiny is gone: resuming with the run's own copy" in output
    assert "resumed from" in output
    assert "weights were loaded from org/tiny" in output
    assert "now they come from the checkpoint" in output
    assert place.losses("mine") == place.losses("whole")
    place.good("generate", "mine", "--prompt", "a", "--tokens", "3")
    place.good("export", "mine", "--out", "out")
    anew = place.refused(*run, "--name", "another")
    assert "org/tiny" in anew


def test_before_the_first_checkpoint_it_needs_the_weights(place: Place) -> None:
    run = ["train", "recipe.yaml", "--model.from", "org/tiny", "--name", "mine"]
    place.good(*run, "--train.steps", "3")
    shutil.rmtree(place.folder / "runs" / "mine" / "checkpoints")
    shutil.rmtree(place.folder / "models")
    assert "it has no checkpoint yet; set model.from to their new location" in place.refused(*run)


@pytest.mark.ci
def test_what_changed_in_the_folder_changes_nothing_or_is_refused(place: Place) -> None:
    run = ["train", "recipe.yaml", "--model.from", "org/tiny"]
    place.good(*run, "--name", "whole")
    place.good(*run, "--name", "mine", "--train.steps", "3")
    folder = place.folder / "models" / "org" / "tiny"
    for file in folder.glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-64:] = bytes(64)  # other weights, of the same shape
        file.write_bytes(content)
    place.good(*run, "--name", "mine")
    assert place.losses("mine") == place.losses("whole")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert "model.norm_eps: 1e-06 -> 0.001" in place.refused(*run, "--name", "mine", "--train.steps", "9")
