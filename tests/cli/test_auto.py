"""`parallel: auto` and `train.micro_batch: auto` in real runs: chosen once, kept by a resume, with the results of plain sizes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from shoal.resolve.resolve import resolve
from shoal.run.folder import RunFolder
from shoal.run.records import read_metrics
from shoal.training.loop import take_steps
from shoal.training.run import Run
from tests.cli.commands import Place
from tests.parallel.layouts import ALONE, NeverStop

# One head and one block leave two layouts of two processes, and the global batch one micro-batch in each
RECIPE = """
model: {dim: 32, num_layers: 1, num_heads: 1, max_seq_len: 64}
data: {corpus: dummy, dummy_documents: 60, tokenizer: bytes, seq_len: 32, folder: data}
optim: {lr: 1e-2, schedule: constant, warmup_steps: 0}
parallel: auto
train: {steps: 4, global_batch: 2, micro_batch: auto, dtype: float32, device: cpu}
metrics: {report: false, every: 1}
launch: {processes: 2, threads: 1}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("auto"))
    (place.folder / "auto.yaml").write_text(RECIPE, encoding="utf-8")
    return place


def sizes(place: Place, run: str) -> dict[str, int]:
    """Return the axes above 1 and the micro-batch of a run's config.yaml."""
    said = yaml.safe_load((place.folder / "runs" / run / "config.yaml").read_text())
    axes = {name: said["parallel"][name] for name in ("dp_replicate", "dp_shard", "tp", "cp", "pp")}
    return {name: size for name, size in axes.items() if size != 1} | {"micro_batch": said["train"]["micro_batch"]}


def test_the_best_few_are_tried_once_and_the_results_are_those_of_plain_sizes(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = place.good("train", "auto.yaml")
    assert re.search(
        r"^parallel auto and train.micro_batch auto: 2 candidates on 2 processes, [12] tried in", output, re.MULTILINE
    )
    assert re.search(r"^  candidate +planned s +measured s +memory$", output, re.MULTILINE)
    chosen = re.search(r"^chosen: (dp_replicate|dp_shard) 2, micro-batch 1", output, re.MULTILINE)
    assert chosen, output
    assert sizes(place, "auto") == {chosen[1]: 2, "micro_batch": 1}
    assert not re.search(r"^note: ", output, re.MULTILINE)

    again = place.good("train", "auto.yaml", "--train.steps", "6")
    assert f"auto: this run chose {chosen[1]} 2, micro-batch 1 for 2 processes; it is kept" in again
    assert "trying" not in again
    assert sizes(place, "auto") == {chosen[1]: 2, "micro_batch": 1}
    assert "changed" not in place.event_lines("auto")[-1]

    monkeypatch.chdir(place.folder)
    plain = [
        ("parallel.tp", "1", "test"),
        ("train.micro_batch", "2", "test"),
        ("train.steps", "6", "test"),
        ("launch.processes", "1", "test"),
    ]
    config = resolve(Path("auto.yaml"), plain).config
    run = Run.open(config.replace("launch", runs=str(tmp_path), name="plain"), ALONE, NeverStop())
    take_steps(run)
    run.close()
    alone = [step.loss for step in read_metrics(RunFolder(tmp_path / "plain").metrics_file).steps]
    both = [step.loss for step in read_metrics(place.folder / "runs" / "auto" / "metrics.jsonl").steps]
    assert len(alone) == len(both) == 6
    assert both == pytest.approx(alone, abs=1e-5)


def test_other_devices_choose_again_and_say_so(place: Place) -> None:
    """The run of the test above continues on one process, where its layout is not possible."""
    output = place.good("train", "auto.yaml", "--train.steps", "7", "--processes", "1", "--launch.auto_seconds", "0")
    assert "for 2 processes; there are 1 now, so it chooses again" in output
    assert re.search(r"^chosen by the plan alone: one process, micro-batch [12]$", output, re.MULTILINE)
    assert list(sizes(place, "auto")) == ["micro_batch"]


def test_what_cannot_choose_says_what_to_set(place: Place) -> None:
    several = place.refused(
        "train", "auto.yaml", "--name", "two", "--launch.nodes", "2", "--launch.rendezvous", "localhost:29400"
    )
    assert "shoal train chooses on one node, and launch.nodes is 2" in several
    assert "shoal plan RECIPE --devices 8xH100-80GB --nodes 2 --write" in several
    job = place.refused("launch", "slurm", "auto.yaml", "--name", "job", "--launch.nodes", "2")
    assert "launch.nodes is 2" in job
    torchrun = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    started = {**torchrun, "MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}
    assert "shoal train chooses when it starts its own workers" in place.refused(
        "train", "auto.yaml", "--name", "w", **started
    )


def test_other_commands_need_no_sizes(place: Place) -> None:
    said = place.answer("config", "auto.yaml")
    assert re.search(r"^parallel: auto +# auto.yaml:5$", said, re.MULTILINE)
    assert re.search(r"^  micro_batch: auto +# auto.yaml:6$", said, re.MULTILINE)
    assert "(one process; parallel auto chooses the layout)" in said
    job = place.answer("launch", "slurm", "auto.yaml", "--name", "job", "--parallel", "auto")
    assert "--parallel=auto" in job  # the node chooses
    assert "tokens" in place.answer("prepare", "auto.yaml")
    plan = place.answer("plan", "auto.yaml", "--devices", "2xcpu-1GB", "--train.global_batch", "8", "--write")
    assert re.search(r"^wrote dp_\w+ 2, micro-batch \d to auto.yaml$", plan, re.MULTILINE)
    assert "auto" not in (place.folder / "auto.yaml").read_text()
