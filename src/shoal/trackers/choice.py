"""The tracker of a name. No torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from shoal.config.track_options import Track
from shoal.trackers.tracker import Tracker

LIBRARY_SETTINGS: Final = {
    "COMET_LOGGING_CONSOLE": "CRITICAL",
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # shoal itself tries again
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


def make_tracker(name: str, track: Track, folder: Path) -> Tracker:
    """Return the tracker of a name; imports its library, with the settings that it reads from the environment."""
    for variable, value in LIBRARY_SETTINGS.items():
        os.environ.setdefault(variable, value)
    match name:
        case "tensorboard":
            from shoal.trackers.tensorboard import TensorBoard

            return TensorBoard(track, folder)
        case "wandb":
            from shoal.trackers.wandb import WeightsAndBiases

            return WeightsAndBiases(track, folder)
        case "comet":
            from shoal.trackers.comet import Comet

            return Comet(track, folder)
        case "mlflow":
            from shoal.trackers.mlflow import MLflow

            return MLflow(track, folder)
    raise ValueError(name)
