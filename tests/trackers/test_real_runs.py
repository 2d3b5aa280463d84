"""A real run with all four trackers, killed and resumed twice; then each tracker is asked what it holds."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import pytest
from wandb.proto import wandb_internal_pb2 as protocol

from shoal.run.folder import RunFolder
from shoal.trackers.feeding import Feed
from tests.cli.commands import Place
from tests.trackers.servers import ask, mlflow_server, tensorboard_server
from tests.trackers.test_tensorboard import curve, read_back, single

pytestmark = [pytest.mark.ci, pytest.mark.timeout(900)]
KEYS = {
    "WANDB_API_KEY": "f00d" * 10,
    "COMET_API_KEY": "SecretCometKey0123456789x",
    "MLFLOW_TRACKING_PASSWORD": "secretPassword7",
}
STEPS = 40


@dataclass
class Tracked:
    """A place with the run `gpt`, its output, and the address of MLflow's server."""

    place: Place
    output: str
    mlflow: str

    @property
    def run(self) -> Path:
        return self.place.folder / "runs" / "gpt"

    def curve(self, key: str) -> list[tuple[int, float]]:
        return [(line["step"], line[key]) for line in self.place.metrics("gpt") if line.get(key) is not None]

    def sync(self, tracker: str, *more: str) -> str:
        return self.place.good("sync", "gpt", tracker, *more, **KEYS, MLFLOW_TRACKING_URI=self.mlflow)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracked]:
    """W&B and Comet have keys, and are offline by their own variable and by lack of a key."""
    place = Place(tmp_path_factory.mktemp("place"))
    served = tmp_path_factory.mktemp("served")
    with mlflow_server(served) as mlflow:
        environment = KEYS | {"MLFLOW_TRACKING_URI": mlflow, "WANDB_MODE": "offline", "COMET_API_KEY": ""}
        how = (
            "recipe.yaml",
            "--processes",
            "1",
            "--track",
            "tensorboard,mlflow,wandb,comet",
            "--track.close_seconds",
            "150",
        )
        place.kill_in_step(13, "gpt", *how, **environment)
        place.kill_in_step(28, "gpt", *how, **environment)
        output = place.good("train", *how, "--name", "gpt", **environment)
        yield Tracked(place, output, mlflow)


def test_each_tracker_says_where_the_run_is(tracked: Tracked) -> None:
    assert "TensorBoard: tensorboard --logdir runs/gpt/tensorboard" in tracked.output
    assert f"MLflow: {tracked.mlflow}/#/experiments/" in tracked.output
    assert "Weights & Biases: offline (WANDB_MODE=offline): wandb sync runs/gpt/trackers/wandb/wandb/" in tracked.output
    assert "Comet: offline (COMET_API_KEY is not set): comet upload " in tracked.output
    assert [step for step, _ in tracked.curve("loss")] == list(range(1, STEPS + 1))
    opened = [line["tracker"] for line in tracked.place.event_lines("gpt") if line["event"] == "tracker opened"]
    assert sorted(opened[-4:]) == ["comet", "mlflow", "tensorboard", "wandb"]
    assert "tracker down" not in tracked.place.events("gpt")


def test_tensorboard_shows_one_curve(tracked: Tracked) -> None:
    found = read_back(tracked.run / "tensorboard")
    for name, key in {
        "train/loss": "loss",
        "speed/tokens_per_second": "tokens_per_second",
        "val/loss": "val_loss",
    }.items():
        assert curve(found, name) == single(tracked.curve(key))


def test_tensorboards_server_answers_with_the_values(tracked: Tracked) -> None:
    with tensorboard_server(tracked.place.folder / "runs") as address:
        runs = ask(address, "/data/runs")
        while not {"gpt/tensorboard", "gpt/tensorboard/notes"} <= set(runs):  # it reads in the background
            runs = ask(address, "/data/runs")
        of_loss = f"/data/plugin/scalars/scalars?run={quote('gpt/tensorboard')}&tag={quote('train/loss')}"
        wanted, points = single(tracked.curve("loss")), ask(address, of_loss)
        while len(points) < len(wanted):
            points = ask(address, of_loss)
        assert [(step, value) for _, step, value in points] == wanted
        text = ask(address, f"/data/plugin/text/text?run={quote('gpt/tensorboard/notes')}&tag={quote('samples/end')}")
        sample = (tracked.place.folder / "runs/gpt/samples/end.txt").read_text(encoding="utf-8")
        assert sample.split()[0] in text[0]["text"]


def mlflow_runs(tracked: Tracked, experiment: str = "shoal") -> list[dict[str, Any]]:
    path = f"/api/2.0/mlflow/experiments/get-by-name?experiment_name={experiment}"
    number = ask(tracked.mlflow, path)["experiment"]["experiment_id"]
    found: list[dict[str, Any]] = ask(tracked.mlflow, "/api/2.0/mlflow/runs/search", experiment_ids=[number])["runs"]
    return found


def mlflow_curve(tracked: Tracked, run: str, name: str) -> list[tuple[int, float]]:
    path = f"/api/2.0/mlflow/metrics/get-history?run_id={run}&metric_key={quote(name, safe='')}"
    return sorted((point["step"], point["value"]) for point in ask(tracked.mlflow, path)["metrics"])


def test_mlflows_server_has_one_run_with_one_curve(tracked: Tracked) -> None:
    """The steps taken again have the same loss, since the run repeats itself; their speed is that of the first time."""
    [run] = mlflow_runs(tracked)
    about, number = run["info"], run["info"]["run_id"]
    assert (about["run_name"], about["status"]) == ("gpt", "FINISHED")
    for name, key in {
        "train/loss": "loss",
        "train/grad_norm": "grad_norm",
        "train/lr": "lr",
        "val/loss": "val_loss",
    }.items():
        assert mlflow_curve(tracked, number, name) == tracked.curve(key)
    assert [step for step, _ in mlflow_curve(tracked, number, "speed/tokens_per_second")] == list(range(1, STEPS + 1))
    params = {each["key"]: each["value"] for each in run["data"]["params"]}
    wanted = {
        "seq_len": "32",
        "batch": "16",
        "lr": "0.01",
        "optimizer": "adamw",
        "schedule": "constant",
        "dtype": "float32",
    }
    assert wanted.items() <= params.items()
    assert params["model.dim"] == "32"
    tags = {each["key"]: each["value"] for each in run["data"]["tags"]}
    assert tags["shoal.world_size"] == "1"
    files = ask(tracked.mlflow, f"/api/2.0/mlflow/artifacts/list?run_id={number}")["files"]
    assert {"events.jsonl", "samples"} <= {each["path"] for each in files}


def wandb_records(path: Path) -> Iterator[bytes]:
    """Yield the records of an archive: a log of LevelDB's form, in blocks of 32 KiB, after 7 bytes of W&B's own."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, parts = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left  # the rest of a block that is too small for a header
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def record_of(data: bytes) -> Any:
    return cast(Any, protocol).Record.FromString(data)  # a module without types


def wandb_rows(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each archive, the oldest archive first."""
    found = {}
    for path in sorted(run.glob("trackers/wandb/wandb/offline-run-*/run-*.wandb")):
        records = [record_of(data) for data in wandb_records(path)]
        rows = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
        found[path.name] = [
            {each.key or "/".join(each.nested_key): json.loads(each.value_json) for each in row} for row in rows
        ]
    return found


def test_wandb_goes_on_in_a_new_archive_and_a_replay_is_whole(tracked: Tracked) -> None:
    segments = wandb_rows(tracked.run)
    points = [(row["step"], row["train/loss"]) for rows in segments.values() for row in rows if "train/loss" in row]
    assert len(segments) > 1
    assert points == tracked.curve("loss")
    said = tracked.sync("wandb", "--offline", "--project", "other")
    [name] = wandb_rows(tracked.run).keys() - segments.keys()
    rows = wandb_rows(tracked.run)[name]
    assert name.removeprefix("run-").removesuffix(".wandb") in said
    for key, wanted in {
        "train/loss": "loss",
        "speed/tokens_per_second": "tokens_per_second",
        "val/loss": "val_loss",
    }.items():
        assert [(row["step"], row[key]) for row in rows if key in row] == tracked.curve(wanted)
    assert any("events/finished" in row for row in rows)


def comet_points(archive: Path, name: str) -> list[tuple[int, float]]:
    with zipfile.ZipFile(archive) as file:
        lines = [json.loads(line) for line in file.read("messages.json").splitlines()]
    metrics = [line["payload"]["metric"] for line in lines if line["type"] == "metric_msg"]
    return [(each["step"], each["metricValue"]) for each in metrics if each["metricName"] == name]


def test_comet_goes_on_in_the_same_experiment_and_a_replay_is_whole(tracked: Tracked) -> None:
    archives = sorted((tracked.run / "trackers" / "comet").glob("*.zip"), key=lambda path: path.stat().st_mtime)
    assert len({path.stem.partition("-")[0] for path in archives}) == 1
    assert [point for path in archives for point in comet_points(path, "train/loss")] == tracked.curve("loss")
    tracked.sync("comet", "--offline")
    [new] = set((tracked.run / "trackers" / "comet").glob("*.zip")) - set(archives)
    assert comet_points(new, "speed/tokens_per_second") == tracked.curve("tokens_per_second")
    assert comet_points(new, "val/loss") == tracked.curve("val_loss")


def test_a_finished_run_stays_finished_for_a_process_that_reads_on_after_its_end(
    tracked: Tracked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process of a killed run, slow to end, reads what the next run writes, up to its end; that run's own comes after it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracked.mlflow)
    feed = Feed(RunFolder(tracked.run), "mlflow")
    feed.open()
    while feed.turn():  # events after the run's end
        pass
    feed.close()
    [run] = mlflow_runs(tracked)
    assert run["info"]["status"] == "FINISHED"


def test_a_replay_into_mlflow_is_a_new_whole_run(tracked: Tracked) -> None:
    said = tracked.sync("mlflow", "--project", "replayed")
    [run] = mlflow_runs(tracked, "replayed")
    assert run["info"]["run_id"] in said
    points = mlflow_curve(tracked, run["info"]["run_id"], "speed/tokens_per_second")
    assert points == tracked.curve("tokens_per_second")
    assert run["info"]["status"] == "FINISHED"


def test_no_key_is_in_any_file_of_the_run_or_in_its_output(tracked: Tracked) -> None:
    files = [path for path in tracked.run.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        data = path.read_bytes()
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as file:
                data = b"".join(file.read(name) for name in file.namelist())
        for key in KEYS.values():
            assert key.encode() not in data, path
    assert not any(key in tracked.output for key in KEYS.values())
