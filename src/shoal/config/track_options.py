"""The options of experiment trackers."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.config.option import opt


@dataclass(frozen=True, kw_only=True)
class Track:
    """The experiment trackers that get a copy of the run's records. Their keys are read from the environment."""

    to: tuple[str, ...] = opt(
        (),
        "trackers, each an extra of shoal: tensorboard, wandb, comet, mlflow; --track tensorboard,wandb is short for it",
        alias=("report_to", "log_with", "logger", "loggers", "trackers"),
        akin=("use_wandb", "wandb", "tensorboard", "enable_wandb", "enable_tensorboard", "wandb_log"),
        spellings={"none": [], "": []},
    )
    project: str = opt(
        "shoal",
        "project in W&B and Comet, experiment in MLflow",
        alias=("wandb_project", "project_name", "comet_project", "mlflow_experiment"),
    )
    entity: str | None = opt(
        None,
        "W&B team or user that owns the project; null: the account's default",
        alias=("wandb_entity", "wandb_team"),
    )
    workspace: str | None = opt(
        None, "Comet workspace that owns the project; null: the account's default", alias=("comet_workspace",)
    )
    offline: bool = opt(
        False, "write W&B, Comet and MLflow into the run's folder, without a network", alias=("wandb_offline",)
    )
    close_seconds: float = opt(
        20.0,
        "how long the end of a run waits for its trackers to send the rest; shoal sync sends what is missing",
        unit="seconds",
        gt=0,
    )
