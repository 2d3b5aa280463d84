"""What tells runs apart in a legend: their names, and the options in which their configs differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from shoal.report.pictures.seen import Seen
from shoal.report.runs.facts import differences

SHOWN: Final = 4  # options of a run in the legend
LONGEST: Final = 40  # characters of a value
UNIMPORTANT: Final = ("launch.", "metrics.", "checkpoint.", "track.", "alerts.")  # shown after the others


def labels(runs: Sequence[Seen]) -> list[str]:
    """Return a label for each run: "name: optim.lr 0.01, ..."."""
    found = differences([run.config for run in runs])
    keys = sorted(found, key=lambda key: key.startswith(UNIMPORTANT))
    return [
        _label(run.name, [f"{key} {_brief(found[key][number])}" for key in keys]) for number, run in enumerate(runs)
    ]


def _label(name: str, options: Sequence[str]) -> str:
    shown = list(options[:SHOWN])
    if len(options) > SHOWN:
        shown.append(f"and {len(options) - SHOWN} more options")
    return f"{name}: {', '.join(shown)}" if shown else name


def _brief(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
