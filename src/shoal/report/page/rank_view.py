"""The ranks of a run for the page: a heat map of ranks and steps, the slow ranks, and timelines of phases. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shoal.config.layout import Layout
from shoal.run.folder import RunFolder
from shoal.run.records import RanksRecord, read_ranks

Floats = npt.NDArray[np.float64]
ROWS: Final = 128  # of the heat map; more ranks share rows
COLUMNS: Final = 200  # of the heat map; more steps share columns
TIMELINE_ROWS: Final = 32
SLOW: Final = 8  # slow ranks to name
PHASE_LIMIT: Final = 64  # more than there are phases


@dataclass(frozen=True)
class BusyTimes:
    """
    Busy seconds of the measured steps.

    steps: [steps]. phases: their names. seconds: [steps, phases, ranks]; NaN if a step had fewer ranks.
    """

    steps: npt.NDArray[np.int64]
    phases: Sequence[str]
    seconds: Floats

    @property
    def ratios(self) -> Floats:
        """Return each rank's busy time relative to the median rank's of the step: [steps, ranks]."""
        totals = _summed(self.seconds)
        usual = _median(totals, 1)
        return np.asarray(totals / np.where(usual > 0, usual, np.nan))

    @property
    def slow_phases(self) -> npt.NDArray[np.int64]:
        """Return the phase in which each rank is furthest beyond the phase's median: [steps, ranks]."""
        beyond = self.seconds - _median(self.seconds, 2)
        return np.argmax(np.where(np.isnan(beyond), -np.inf, beyond), axis=1)


def read_busy_times(folder: RunFolder) -> BusyTimes | None:
    """Return the busy times in `ranks.jsonl`; None if no step was measured."""
    records = read_ranks(folder.ranks_file)
    return _arrays(records) if records else None


def _arrays(records: Sequence[RanksRecord]) -> BusyTimes:
    phases = list(dict.fromkeys(name for record in records for name in record.busy_seconds))
    ranks = max(len(values) for record in records for values in record.busy_seconds.values())
    seconds = np.full((len(records), len(phases), ranks), np.nan)
    for i, record in enumerate(records):
        for name, values in record.busy_seconds.items():
            seconds[i, phases.index(name), : len(values)] = values
    return BusyTimes(np.array([record.step for record in records]), phases, seconds)


def _median(values: Floats, axis: int) -> Floats:
    """Return the median of what is no NaN, with the axis kept. numpy's nanmedian is many times slower where there is none."""
    median = np.nanmedian if np.isnan(values).any() else np.median
    return np.asarray(median(values, axis=axis, keepdims=True))


def _summed(seconds: Floats) -> Floats:
    """Sum over phases; NaN for a rank that no phase was measured on."""
    return np.where(np.isnan(seconds).all(axis=1), np.nan, np.nansum(seconds, axis=1))


def ranks_view(folder: RunFolder, layout: Layout | None = None) -> dict[str, Any] | None:
    """Return what the page shows of the ranks; None if no step was measured. layout: names the places of slow ranks."""
    busy = read_busy_times(folder)
    if busy is None:
        return None
    ratios, slow_phases = busy.ratios, busy.slow_phases
    by_rank, by_step = _groups(ratios.shape[1], ROWS), _groups(len(busy.steps), COLUMNS)
    cells, phases = _heat(ratios, slow_phases, by_step, by_rank)
    return {
        "ranks": ratios.shape[1],
        "phases": busy.phases,
        "steps": [int(busy.steps[stop - 1]) for _, stop in by_step],
        "rows": [[first, stop - 1] for first, stop in by_rank],
        "cells": [[None if np.isnan(v) else round(float(v), 3) for v in row] for row in cells],
        "slow_phase": phases.tolist(),
        "slowest": _slowest(busy, ratios, slow_phases, layout),
        "timelines": _timelines(busy, ratios),
    }


def _groups(count: int, limit: int) -> list[tuple[int, int]]:
    """Divide `count` things into at most `limit` ranges [first, stop)."""
    size = -(-count // limit)
    return [(first, min(first + size, count)) for first in range(0, count, size)]


def _heat(
    ratios: Floats, slow_phases: npt.NDArray[np.int64], by_step: list[tuple[int, int]], by_rank: list[tuple[int, int]]
) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Return for each cell the largest ratio, and the phase that made it: [rows, columns] each."""
    # One whole number for both, so that the largest ratio brings its phase along
    both = np.where(
        np.isnan(ratios), -1, np.rint(np.nan_to_num(ratios) * 1000).astype(np.int64) * PHASE_LIMIT + slow_phases
    )
    both = np.maximum.reduceat(both, [begin for begin, _ in by_step], axis=0)
    both = np.maximum.reduceat(both, [first for first, _ in by_rank], axis=1).T
    return np.where(both < 0, np.nan, both // PHASE_LIMIT / 1000), both % PHASE_LIMIT


def _slowest(
    busy: BusyTimes, ratios: Floats, slow_phases: npt.NDArray[np.int64], layout: Layout | None
) -> list[dict[str, Any]]:
    """Return the ranks with the largest median ratio, each with the phase that most often makes it slow."""
    usual = _median(ratios, 0)[0]
    order = np.argsort(-np.nan_to_num(usual, nan=0.0), kind="stable")[:SLOW]
    return [
        {
            "rank": int(rank),
            "ratio": round(float(np.nan_to_num(usual[rank])), 3),
            "phase": busy.phases[int(np.bincount(slow_phases[:, rank]).argmax())],
            "place": _place(int(rank), layout),
        }
        for rank in order
    ]


def _place(rank: int, layout: Layout | None) -> str:
    """Return a rank's coordinates along the axes that are used: "dp_shard 1, tp 0"."""
    if layout is None or rank >= layout.world_size:
        return ""
    return ", ".join(f"{axis} {at}" for axis, at in layout.coordinates(rank).items() if getattr(layout, axis) > 1)


def _timelines(busy: BusyTimes, ratios: Floats) -> list[dict[str, Any]]:
    """Return the phases on each rank: of the last measured step, of the slowest one, and their mean over all."""
    longest = np.nanmax(_summed(busy.seconds), axis=1)
    slowest = int(np.argmax(longest[1:])) + 1 if len(longest) > 1 else 0  # the first one includes compilation
    shown = [
        (f"the last measured step ({busy.steps[-1]})", busy.seconds[-1], ratios[-1]),
        (f"the slowest measured step ({busy.steps[slowest]})", busy.seconds[slowest], ratios[slowest]),
        ("the mean of all measured steps", np.nanmean(busy.seconds, axis=0), np.nanmean(ratios, axis=0)),
    ]
    return [{"name": name, "ranks": _bars(seconds, ratio)} for name, seconds, ratio in shown]


def _bars(seconds: Floats, ratios: Floats) -> list[dict[str, Any]]:
    """Return a bar for each rank; of many ranks, the slowest ones and the rank nearest to the median."""
    ranks = [int(rank) for rank in np.flatnonzero(~np.isnan(ratios))]
    names = {rank: f"rank {rank}" for rank in ranks}
    if len(ranks) > TIMELINE_ROWS:
        by_ratio = sorted(ranks, key=lambda rank: -ratios[rank])
        middle = by_ratio[len(by_ratio) // 2]
        names[middle] += " (median)"
        ranks = [*by_ratio[: TIMELINE_ROWS - 1], middle]
    return [{"name": names[r], "seconds": [round(float(v), 6) for v in np.nan_to_num(seconds[:, r])]} for r in ranks]
