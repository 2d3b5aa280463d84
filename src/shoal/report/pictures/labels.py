"""What tells runs apart in a legend: their names, and the options in which their configs differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from shoal.config.keys import changed_options
from shoal.report.pictures.seen import Seen

SHOWN: Final = 4  # options of a run in the legend
UNIMPORTANT: Final = ("launch.", "metrics.", "checkpoint.")  # shown after the others


def labels(runs: Sequence[Seen]) -> list[str]:
    """Return a label for each run: "name: optim.lr 0.01, ..."."""
    keys = sorted(
        {each.key for run in runs for each in changed_options(runs[0].config, run.config)}
        - {"launch.name", "launch.runs"},
        key=lambda key: (key.startswith(UNIMPORTANT), key),
    )
    return [_label(run, keys) for run in runs]


def _label(run: Seen, keys: Sequence[str]) -> str:
    shown = [f"{key} {_value(run, key)}" for key in keys[:SHOWN]]
    if len(keys) > SHOWN:
        shown.append(f"and {len(keys) - SHOWN} more options")
    return f"{run.name}: {', '.join(shown)}" if shown else run.name


def _value(run: Seen, key: str) -> str:
    section, _, name = key.partition(".")
    value = getattr(getattr(run.config, section), name)
    return f"{value:g}" if isinstance(value, float) else str(value)
