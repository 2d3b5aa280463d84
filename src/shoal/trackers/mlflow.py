"""MLflow: a tracking server by its REST API, or a folder in the run's folder; with the package `mlflow-skinny`."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from shoal.config.track_options import Track
from shoal.system.secrets import without_secrets
from shoal.trackers.points import About, Batch
from shoal.trackers.tracker import Opened, Tracker

METRICS_AT_ONCE: Final = 1000  # the server's limits of one request
PARAMS_AT_ONCE: Final = 100
LONGEST_PARAM: Final = 500
LONGEST_TAG: Final = 5000
Each = TypeVar("Each")


class MLflow(Tracker):
    """An MLflow run of the experiment `track.project`. Its URI and credentials are MLFLOW_TRACKING_URI, ... of the environment."""

    def __init__(self, track: Track, folder: Path) -> None:
        super().__init__(track, folder)
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        self._offline = track.offline or not uri
        self._uri = (folder / "mlruns").absolute().as_uri() if self._offline else uri
        self._client = MlflowClient(tracking_uri=self._uri)
        self._finished = False

    @property
    def destination(self) -> str:
        return "offline" if self._offline else f"{without_secrets(self._uri)} {self.track.project}"

    def open(self, about: About, state: Mapping[str, Any]) -> Opened:
        experiment = self._experiment()
        params = {_name(name): _text(value, LONGEST_PARAM) for name, value in about.options.items()}
        if state:
            self._run = str(state["id"])
            # A process that a killed run left behind may have sent all that the next run wrote, up to its end.
            self._finished = self._client.get_run(self._run).info.status == "FINISHED"
            self._client.update_run(self._run, status="RUNNING")
            params = self._note_changes(params)
        else:
            self._run = self._client.create_run(experiment, run_name=about.name).info.run_id
        for some in _parts(list(params.items()), PARAMS_AT_ONCE):
            self._client.log_batch(self._run, params=[Param(name, value) for name, value in some])
        tags = {f"shoal.{_name(name)}": _text(value, LONGEST_TAG) for name, value in about.facts.items()}
        for some in _parts(list(tags.items()), PARAMS_AT_ONCE):
            self._client.log_batch(self._run, tags=[RunTag(name, value) for name, value in some])
        if about.model:
            self._store(lambda: self._client.log_text(self._run, about.model, "model.txt"))
        return Opened(self._where(experiment), {"id": self._run})

    def _experiment(self) -> str:
        found = self._client.get_experiment_by_name(self.track.project)
        return str(found.experiment_id if found else self._client.create_experiment(self.track.project))

    def _where(self, experiment: str) -> str:
        if not self._offline:
            return f"{without_secrets(self._uri).rstrip('/')}/#/experiments/{experiment}/runs/{self._run}"
        why = "track.offline" if self.track.offline else "MLFLOW_TRACKING_URI is not set"
        look = f"MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri {self.folder / 'mlruns'}"
        return f"offline ({why}): {look}"

    def _note_changes(self, params: Mapping[str, str]) -> dict[str, str]:
        """Return the parameters that the run lacks. MLflow does not change one: a new value becomes a tag."""
        has = self._client.get_run(self._run).data.params
        for name, value in params.items():
            if name in has and has[name] != value:
                self._client.set_tag(self._run, f"shoal.changed.{name}", value)
        return {name: value for name, value in params.items() if name not in has}

    def write(self, batch: Batch) -> None:
        metrics = [
            Metric(_name(name), value, int(1000 * (each.time or time.time())), each.step)
            for each in batch.scalars
            for name, value in each.values.items()
        ]
        for some in _parts(metrics, METRICS_AT_ONCE):
            self._client.log_batch(self._run, metrics=some)
        for note in batch.notes:
            if note.name in ("events/started", "events/finished"):
                self._finished = note.name == "events/finished"
            if note.name.startswith("samples/"):
                self._store(lambda note=note: self._client.log_text(self._run, note.text, f"{note.name}.txt"))
        if any(note.name.startswith("events/") for note in batch.notes):
            self._store(lambda: self._client.log_artifact(self._run, str(self.folder.parents[1] / "events.jsonl")))

    def _store(self, upload: Any) -> None:
        """Upload a file. A server may take numbers but no files; that is reported once, and the numbers are still sent."""
        try:
            upload()
        except Exception as error:  # of any store: S3, a database, a proxy
            self.complaint = f"it takes no files (samples, events, the model's text): {type(error).__name__}"

    def close(self) -> None:
        self._client.set_terminated(self._run, status="FINISHED" if self._finished else "KILLED")


def _parts(items: Sequence[Each], size: int) -> Iterator[Sequence[Each]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


def _name(name: str) -> str:
    """Return a name with the characters that MLflow allows."""
    return re.sub(r"[^\w\-. /:]", "_", name, flags=re.ASCII)[:250]


def _text(value: Any, longest: int) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
