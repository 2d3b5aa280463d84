"""The ranks of a run for the page: a heat map of ranks and steps, the slow ranks, timelines of phases, memory. No torch."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Final

import numpy as np

from shoal.config.layout import Layout
from shoal.report.curves.ranks import PHASES, RankMap
from shoal.report.page.content import layout_of
from shoal.report.runs.facts import RunFacts
from shoal.run.folder import RunFolder

ROWS: Final = 128  # of the heat map; more ranks share rows
COLUMNS: Final = 200  # of the heat map; more steps share columns
SLOW: Final = 8  # slow ranks to name


def ranks_view(folder: RunFolder, ranks: RankMap) -> dict[str, Any] | None:
    """Return what the page shows of the ranks; None if no step was measured."""
    if not len(ranks.steps):
        return None
    view = ranks.view(columns=COLUMNS, rows=ROWS)
    layout = layout_of(RunFacts.read(folder))
    rows = range(0, view.ranks, view.ranks_per_row)
    return {
        "ranks": view.ranks,
        "phases": list(PHASES),
        "steps": view.step.tolist(),
        "rows": [[first, min(first + view.ranks_per_row, view.ranks) - 1] for first in rows],
        "cells": [[round(float(ratio), 2) for ratio in row] for row in view.ratio],
        "slow_phase": view.phase.tolist(),
        "slow": [asdict(each) | {"place": _place(each.rank, layout)} for each in ranks.slow()[:SLOW]],
        "timelines": [_timeline(name, ranks, step) for name, step in _steps_to_show(ranks).items()],
        "memory": {name: list(each) for name, each in ranks.memory.items()},
    }


def _place(rank: int, layout: Layout | None) -> str:
    """Return a rank's coordinates along the axes that are used: "dp_shard 1, tp 0"."""
    if layout is None or rank >= layout.world_size:
        return ""
    return ", ".join(f"{axis} {at}" for axis, at in layout.coordinates(rank).items() if getattr(layout, axis) > 1)


def _steps_to_show(ranks: RankMap) -> dict[str, int]:
    """Return the last measured step, and the slowest one but for the first, which includes compilation."""
    last = int(ranks.steps[-1])
    found = {f"the last measured step, {last:,}": last}
    if len(ranks.steps) > 2:
        slowest = _slowest_step(ranks)
        found[f"the slowest measured step, {slowest:,}"] = slowest
    return found


def _slowest_step(ranks: RankMap) -> int:
    """Return the step with the longest busy time of a rank: first its column of the map, then the step in that column."""
    first, last = int(ranks.steps[1]), int(ranks.steps[-1])
    for columns in (COLUMNS, len(ranks.steps)):
        view = ranks.view(first, last, columns=columns, rows=1)
        at = int(np.argmax(view.busy_seconds))
        first, last = int(view.step[at - 1]) + 1 if at else first, int(view.step[at])
    return last


def _timeline(name: str, ranks: RankMap, step: int) -> dict[str, Any]:
    """Return the busy seconds of each phase on the shown ranks."""
    found = ranks.timeline(step)
    none = [0.0] * len(found["ranks"])
    by_phase = [found["busy_seconds"].get(phase, none) for phase in PHASES]
    bars = zip(found["ranks"], zip(*by_phase, strict=True), strict=True)
    return {"name": name, "ranks": [{"name": f"rank {rank}", "seconds": list(seconds)} for rank, seconds in bars]}
