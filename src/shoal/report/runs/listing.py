"""`shoal runs`: a table of runs, one line each: state, steps, losses, speed, and which options differ."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from rich.table import Table

from shoal.report.runs.facts import RunFacts, differences
from shoal.run.console import duration

COLORS: Final = {"running": "green", "finished": "", "stopped": "yellow", "crashed": "red", "not started": "dim"}
ALL_VALUES: Final = 3  # up to this many differing options, every run shows its values
SHOWN: Final = 5  # options shown of each run


def sort(runs: Sequence[RunFacts], by: str) -> list[RunFacts]:
    """Return the runs by "name", by "loss" (best held-out loss, then those without, by training loss), or by "time", newest first."""
    keys: Mapping[str, Callable[[RunFacts], Any]] = {
        "name": lambda run: run.name,
        "loss": lambda run: (run.best_val_loss is None, _high(run.best_val_loss), _high(run.loss)),
        "time": lambda run: -(run.started or 0),
    }
    return sorted(runs, key=keys[by])


def table(runs: Sequence[RunFacts], now: float | None = None) -> Table:
    """Return the table. now: seconds since 1970."""
    shown = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for title in ("run", "state", "step", "held-out", "loss", "tok/s", "last sign", "differs in"):
        right = title in ("step", "held-out", "loss", "tok/s", "last sign")
        wraps = title in ("run", "differs in")
        shown.add_column(
            title,
            justify="right" if right else "left",
            no_wrap=not wraps,
            overflow="fold",
            min_width=10 if wraps else None,
        )
    for run, differs in zip(runs, differs_in(runs), strict=True):
        shown.add_row(*_cells(run, time.time() if now is None else now), differs, style=COLORS.get(run.state, ""))
    return shown


def as_json(runs: Sequence[RunFacts]) -> dict[str, Any]:
    """Return the table for `--json`, with all options that differ."""
    return {"runs": [run.as_json() for run in runs], "differences": differences([run.options for run in runs])}


def differs_in(runs: Sequence[RunFacts]) -> list[str]:
    """
    Return the options of each run that differ from the others', such as "lr 0.002, seed 1".

    If more than `ALL_VALUES` options differ, a run shows only the values that most runs do not have.
    """
    found = differences([run.options for run in runs])
    names = _short(list(found))
    texts: list[list[str]] = [[] for _ in runs]
    for key, values in found.items():
        as_text = [json.dumps(value, default=str).strip('"') for value in values]
        [(usual, count)] = Counter(as_text).most_common(1)
        hides = len(found) > ALL_VALUES and count > 1
        for mine, text in zip(texts, as_text, strict=True):
            if not (hides and text == usual):
                mine.append(f"{names[key]} {text}")
    return [_cut(each) for each in texts]


def _cut(texts: Sequence[str]) -> str:
    more = f", and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return ", ".join(texts[:SHOWN]) + more


def _short(keys: Sequence[str]) -> dict[str, str]:
    """Return the last word of each dotted key, or the whole key where two keys share it."""
    count = Counter(key.rpartition(".")[2] for key in keys)
    return {key: last if count[last := key.rpartition(".")[2]] == 1 else key for key in keys}


def _cells(run: RunFacts, now: float) -> list[str]:
    total = f"/{run.total_steps}" if run.total_steps is not None else ""
    sign = now if run.state == "running" else run.ended
    return [
        run.name, run.state, f"{run.step}{total}", _loss(run.best_val_loss), _loss(run.loss),
        "" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}",
        "now" if run.state == "running" else "" if sign is None else _ago(now - sign),
    ]  # fmt: skip


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _high(value: float | None) -> float:
    return float("inf") if value is None else value


def _ago(seconds: float) -> str:
    """Return "3d", or the two largest units below a day, such as 2h05m."""
    return f"{seconds / 86400:.0f}d" if seconds >= 2 * 86400 else duration(max(0.0, seconds))
