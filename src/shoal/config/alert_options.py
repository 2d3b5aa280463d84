"""The options of alerts: the rules that a run is watched by, and where their messages go."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.config.option import opt


@dataclass(frozen=True, kw_only=True)
class Alerts:
    """Rules that post one message to a webhook when they are broken, and again only after they have recovered."""

    webhook_env: str = opt(
        "SHOAL_WEBHOOK",
        "name of the environment variable with the webhook's address; the address itself is never stored",
    )
    loss_above: float | None = opt(
        None, "training loss above this, or NaN or Inf; null disables the rule", unit="nats per token"
    )
    spike_above: float | None = opt(
        None, "spike score of a step (robust z-score of its loss) above this; null disables the rule", gt=0
    )
    no_step_for: float | None = opt(
        None,
        "no step for this long, also before the first step and while the workers hang or restart; evaluations, saves and "
        "compilation count too; null disables the rule",
        unit="seconds",
        gt=0,
    )
    goodput_below: float | None = opt(
        None, "share of the run's time in steps that count below this; null disables the rule", gt=0, lt=1
    )
    goodput_grace: float = opt(600.0, "age of the run from which alerts.goodput_below applies", unit="seconds", ge=0)
    disk_free_below: float | None = opt(
        None, "free space on the disk of the run's folder below this; null disables the rule", unit="GiB", gt=0
    )
    disk_full_within: float | None = opt(
        None,
        "the disk of the run's folder is full within this time if it fills as in the last hour; null disables the rule",
        unit="hours",
        gt=0,
    )
    crashed: bool = opt(False, "a worker crashed or hung, whether the run restarts or not")
    ended: bool = opt(False, "the run ended: finished, stopped or failed")

    @property
    def any_rule(self) -> bool:
        """Return whether there is a rule."""
        numbers = (
            self.loss_above, self.spike_above, self.no_step_for, self.goodput_below, self.disk_free_below,
            self.disk_full_within,
        )  # fmt: skip
        return self.crashed or self.ended or any(each is not None for each in numbers)
