"""Comet: online, or as archives in the run's folder, which `comet upload` uploads; with the package `comet_ml`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import comet_ml

from shoal.config.track_options import Track
from shoal.trackers.points import About, Batch
from shoal.trackers.tracker import Opened, Tracker

# Comet collects nothing by itself: the records have what the run tells of its machine and its code.
_ONLY_RECORDS: Final[Mapping[str, Any]] = {
    "log_code": False, "log_graph": False, "auto_param_logging": False, "auto_metric_logging": False, "parse_args": False,
    "auto_output_logging": False, "log_env_details": False, "log_git_metadata": False, "log_git_patch": False,
    "display_summary_level": 0,
}  # fmt: skip


class Comet(Tracker):
    """A Comet experiment. Offline, each start adds an archive; all of them are of one experiment."""

    def __init__(self, track: Track, folder: Path) -> None:
        super().__init__(track, folder)
        has_key = bool(os.environ.get("COMET_API_KEY"))
        self._why = "track.offline" if track.offline else "" if has_key else "COMET_API_KEY is not set"

    @property
    def destination(self) -> str:
        return "offline" if self._why else f"{self.track.workspace or ''}/{self.track.project}"

    def open(self, about: About, state: Mapping[str, Any]) -> Opened:
        where = {"project_name": self.track.project, "workspace": self.track.workspace}
        if self._why:
            made: Any = comet_ml.ExistingOfflineExperiment if state else comet_ml.OfflineExperiment
            where["offline_directory"] = str(self.folder)
        else:
            made = comet_ml.ExistingExperiment if state else comet_ml.Experiment
        if state:
            where["experiment_key"] = state["id"]
        self._experiment = made(**where, **_ONLY_RECORDS)
        if not self._experiment.alive:
            raise RuntimeError(
                "Comet did not start an experiment: check COMET_API_KEY, track.workspace and the network"
            )
        self._experiment.set_name(about.name)
        self._experiment.log_parameters(dict(about.options))
        self._experiment.log_others({f"run/{name}": value for name, value in about.facts.items()})
        if about.model:
            self._experiment.set_model_graph(about.model)
        # the archive that creates the experiment is written at the end
        return Opened(self._where(), {"id": self._experiment.get_key()}, exists=bool(state) or not self._why)

    def _where(self) -> str:
        if not self._why:
            return str(self._experiment.url)
        archives = self.folder / f"{self._experiment.get_key()}*.zip"
        return f"offline ({self._why}): comet upload $(ls -tr {archives}) uploads it after the end"

    def write(self, batch: Batch) -> None:
        for each in batch.scalars:
            self._experiment.log_metrics(dict(each.values), step=each.step)
        for note in batch.notes:
            metadata = {"name": note.name, "time": note.time}
            self._experiment.log_text(f"{note.name}\n{note.text}", step=note.step, metadata=metadata)

    def is_safe(self) -> bool:
        """Return whether Comet has everything. Offline, the archive is written at the end."""
        return not self._why and bool(self._experiment.flush())

    def close(self) -> None:
        self._experiment.end()
