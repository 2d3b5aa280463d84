"""A profile as values for the page: the table of operators, timelines, overlap, modules and memory, of bounded size. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from shoal.metrics.profile.records import Overlap, Profile, RankMemory, RankProfile, Timeline, read_memory
from shoal.report.profile.table import dearest
from shoal.run.profiles import profiles_of

SHOWN_OPERATORS: Final = 30
SHOWN_RANKS: Final = 8  # with a timeline, modules and memory
SHOWN_RANGES: Final = 4000  # of all timelines together
SHOWN_COLLECTIVES: Final = 1000


def profile_views(run: Path) -> list[dict[str, Any]]:
    """Return the views of all profiles of a run."""
    return [profile_view(folder) for folder in profiles_of(run)]


def profile_view(folder: Path) -> dict[str, Any]:
    """
    Return what the page shows of the profile in `folder`; all values are for JSON, times in seconds, sizes in bytes.

    Raises `RunError` if there is no profile.

    | key | content |
    | --- | --- |
    | run, first, last, total_steps, world_size, layout, device | what was profiled |
    | step_seconds, usual_step_seconds, overhead | means of a step with and without the profiler, and their ratio |
    | operators | the dearest: name, seconds, calls and share of a step, module, module_share |
    | overlap | rank (null for all), communication_seconds, compute_seconds, hidden_seconds, percent; a step |
    | ranks | of at most 8 ranks: timeline, phases, modules and memory |
    | hidden_ranks | number of ranks that are not in `ranks` |
    """
    profile = Profile.read(folder)
    memory = {each.rank: each for each in read_memory(folder)}
    shown = choose_ranks(profile.ranks)
    times = [each for rank in profile.ranks for each in rank.step_seconds]
    usual = [each for rank in profile.ranks if (each := rank.usual_step_seconds)]
    mean, before = _mean(times), _mean(usual)
    return {
        "run": profile.run,
        "folder": folder.name,
        "first": profile.first,
        "last": profile.last,
        "total_steps": profile.total_steps,
        "world_size": profile.world_size,
        "layout": {axis: size for axis, size in profile.layout.items() if size > 1},
        "device": profile.ranks[0].device if profile.ranks else "",
        "stopped_early": any(rank.stopped_early for rank in profile.ranks),
        "step_seconds": mean,
        "usual_step_seconds": before,
        "overhead": mean / before if mean and before else None,
        "operators": [dataclasses.asdict(each) for each in dearest(profile.ranks, SHOWN_OPERATORS)],
        "overlap": [_overlap(None, profile.overlap, sum(len(r.steps) for r in profile.ranks))]
        + [_overlap(rank.rank, rank.overlap, len(rank.steps)) for rank in shown],
        "ranks": [_rank(rank, memory.get(rank.rank), len(shown)) for rank in shown],
        "hidden_ranks": len(profile.ranks) - len(shown),
        "traces": [{"file": rank.trace, "bytes": rank.trace_bytes, "events": rank.events} for rank in shown],
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def choose_ranks(ranks: Sequence[RankProfile], most: int = SHOWN_RANKS) -> list[RankProfile]:
    """Return all ranks or, of more than `most`, those that communicate least and most: the slow ones and those that wait."""
    if len(ranks) <= most:
        return list(ranks)
    by_wait = sorted(ranks, key=lambda rank: rank.overlap.communication_seconds)
    return sorted(by_wait[: most // 2] + by_wait[-(most - most // 2) :], key=lambda rank: rank.rank)


def _overlap(rank: int | None, found: Overlap, steps: int) -> dict[str, Any]:
    values = {name: value / max(1, steps) for name, value in dataclasses.asdict(found).items()}
    return {"rank": rank, **values, "percent": found.percent}


def _rank(rank: RankProfile, memory: RankMemory | None, shown: int) -> dict[str, Any]:
    steps = max(1, len(rank.steps))
    return {
        "rank": rank.rank,
        "step_seconds": _mean(rank.step_seconds),
        "phases": {name: value / steps for name, value in rank.phase_seconds.items()},
        "outside_seconds": rank.outside_seconds / steps,
        "modules": [
            [each.name, each.calls / steps, each.forward_seconds / steps, each.backward_seconds / steps]
            for each in rank.modules
        ],
        "timeline": dataclasses.asdict(_reduced(rank.timeline, shown)),
        "memory": None if memory is None else _memory(memory),
    }


def _memory(memory: RankMemory) -> dict[str, Any]:
    return {
        "peak_bytes": memory.peak_bytes,
        "peak_seconds": memory.peak_seconds,
        "other_bytes": memory.other_bytes,
        "modules": [
            [m.name, m.parameter_bytes, m.gradient_bytes, m.optimizer_bytes, m.activation_bytes] for m in memory.modules
        ],
        "lines": list(memory.cuda.get("bytes_by_line", {}).items())[:SHOWN_OPERATORS],
    }


def _reduced(timeline: Timeline, ranks: int) -> Timeline:
    """Return the largest ranges and collectives, in the same order; a range that stays keeps those around it."""
    ranges = largest(timeline.ranges, SHOWN_RANGES // ranks, place=2)
    collectives = largest(timeline.collectives, SHOWN_COLLECTIVES // ranks, place=1)
    dropped = len(timeline.ranges) - len(ranges) + len(timeline.collectives) - len(collectives)
    return dataclasses.replace(timeline, ranges=ranges, collectives=collectives, dropped=timeline.dropped + dropped)


def largest(entries: Sequence[Sequence[float]], most: int, place: int) -> list[Sequence[float]]:
    """Return the `most` entries with the largest durations, which stand at `place`, in their order."""
    order = sorted(range(len(entries)), key=lambda number: -entries[number][place])
    return [entries[number] for number in sorted(order[:most])]
