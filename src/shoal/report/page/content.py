"""
Everything that the page shows of a run except its curves and ranks, as plain dicts for JSON. No torch.

    runs_view(runs)      the list of runs, with the options that differ
    run_view(runs["a"])  one run: what ran with what, where the time went, events, spikes, samples
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from shoal.config.layout import AXES, Layout, find_layout
from shoal.config.options import Parallel
from shoal.report.curves.curves import Curves
from shoal.report.page.spike_documents import spike_documents
from shoal.report.profile.view import profile_views
from shoal.report.runs.cost import cost, prices_of
from shoal.report.runs.facts import RunFacts, differences
from shoal.run.events import read_json_lines
from shoal.run.folder import RunFolder
from shoal.run.goodput import MEANINGS, account
from shoal.run.now import Doing, read_now

TROUBLE: Final = {
    "went back", "save failed", "damaged", "quarantined", "loader restarted", "overflowed", "skipped", "crashed", "hung",
    "no fast place", "held-out row skipped", "lost", "restarted", "workers failed",
}  # fmt: skip
TEXT_LIMIT: Final = 20_000  # characters of a sample or of the model's modules
EVENT_LIMIT: Final = 500  # events in the list; marks are drawn of all of them
PLACES: Final = ("step", "tokens", "time", "val_time")  # columns of the log that place the points of curves
SHOWN: Final = (
    "state", "step", "total_steps", "loss", "best_val_loss", "best_val_step", "tokens", "tokens_per_second", "mfu",
    "started", "ended", "seconds", "restarts",
)  # fmt: skip
SPIKE_SCORE: Final = 6.0
SPIKES: Final = 20


def named_folders(folders: list[Path]) -> dict[str, RunFolder]:
    """Return the runs by a short name that no two share: the folder's name, with its parents where it is needed."""
    found: dict[str, RunFolder] = {}
    for folder in folders:
        parts = folder.resolve().parts
        names = ("/".join(parts[-count:]) for count in range(1, len(parts)))
        found[next((name for name in names if name not in found), str(folder))] = RunFolder(folder)
    return found


def runs_view(runs: Mapping[str, RunFolder], curves: Mapping[str, Curves]) -> dict[str, Any]:
    """Return the list of runs, and the options that differ between them."""
    facts = {name: RunFacts.read(folder) for name, folder in runs.items()}
    return {
        "runs": [summary(name, each, curves[name]) for name, each in facts.items()],
        "differences": differing({name: each.options for name, each in facts.items()}),
    }


def run_view(folder: RunFolder, curves: Curves, *, reads_data: bool = False) -> dict[str, Any]:
    """Return what the page shows of one run. reads_data: open the run's data too, for the documents of spikes."""
    events = read_json_lines(folder.events_file)
    facts = RunFacts.read(folder)
    layout = layout_of(facts)
    spent = account(folder.time_file) if folder.time_file.is_file() else None
    return {
        "started_event": facts.event,
        "config": [[key, _plain(value)] for key, value in facts.options.items()],
        "layout": {"axes": list(map(list, dataclasses.asdict(layout).items())) if layout else []},
        "cost": _cost(folder),
        "profiles": profile_views(folder.path),
        "now": _asdict(read_now(folder)) if facts.state == "running" else None,
        "seconds_left": _seconds_left(facts, curves),
        "model": _text(folder.path / "model.txt"),
        "events": [_event(each) for each in events[-EVENT_LIMIT:]],
        "spikes": _spikes(folder, curves, reads_data),
        "samples": [{"name": p.name, "text": _text(p)} for p in sorted(folder.samples.glob("*.txt"))],
        "account": spent.as_json() if spent else None,
        "meanings": dict(MEANINGS),
    }


def _event(event: Mapping[str, Any]) -> dict[str, Any]:
    """Return an event for the list: what happened, when, and its other facts as text."""
    facts = {key: value for key, value in event.items() if key not in ("time", "event", "step")}
    name = str(event.get("event", "?"))
    text = "" if name == "started" else ", ".join(f"{key}: {_plain(value)}" for key, value in facts.items())
    return {
        "time": event.get("time"),
        "event": name,
        "step": event.get("step"),
        "text": text,
        "isBad": _is_bad(name),
    }


def _is_bad(name: str) -> bool:
    return name in TROUBLE or any(word in name for word in ("fail", "crash", "hang", "lost", "damage"))


def _plain(value: Any) -> str:
    """Return a value as text, a float with the digits that a person wrote."""
    if isinstance(value, float):
        return f"{value:.12g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def summary(name: str, facts: RunFacts, curves: Curves) -> dict[str, Any]:
    """Return a run's line in the list: its facts, and what its charts need."""
    events = read_json_lines(facts.folder.events_file)
    return {
        "id": name,
        "name": name,
        "version": f"{curves.version}-{_size(facts.folder.events_file)}-{_size(facts.folder.ranks_file)}-{facts.state}",
        "curves": [each for each in curves.names() if each not in PLACES],
        "marks": [_mark(each) for each in events if each.get("step") is not None and _is_mark(each)],
        "flops_per_token": next((e["flops_per_token"] for e in reversed(events) if e.get("flops_per_token")), None),
        **{key: getattr(facts, key) for key in SHOWN},
    }


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _is_mark(event: Mapping[str, Any]) -> bool:
    """Return whether an event is marked on the curves: starts after the first, and trouble; not saves, which are many."""
    name = str(event.get("event"))
    return _is_bad(name) or (name == "started" and event["step"] > 0) or name == "stopped"


def _mark(event: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": event["step"], "event": event["event"], "isBad": _is_bad(str(event["event"]))}


def differing(options: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the options with different values, with the value of each run as text."""
    found = differences(list(options.values()))
    return [
        {"option": key, "values": dict(zip(options, map(_plain, values), strict=True))} for key, values in found.items()
    ]


def layout_of(facts: RunFacts) -> Layout | None:
    """Return the layout of a run's last start; an older run's follows from its config and its processes."""
    sizes = facts.event.get("layout") or _asked_sizes(facts)
    try:
        if facts.event.get("layout"):
            return Layout(**{name: int(sizes[name]) for name in AXES if name in sizes})
        found = find_layout(Parallel(**sizes), facts.event.get("processes"))
    except (TypeError, ValueError):
        return None
    return found if isinstance(found, Layout) else None


def _asked_sizes(facts: RunFacts) -> dict[str, Any]:
    return {name: facts.options[f"parallel.{name}"] for name in AXES if f"parallel.{name}" in facts.options}


def _asdict(doing: Doing | None) -> dict[str, Any] | None:
    return None if doing is None else dataclasses.asdict(doing)


def _cost(folder: RunFolder) -> dict[str, Any] | None:
    found = cost(folder, prices_of(folder.path.parent))
    return None if found is None else found.as_json()


def _seconds_left(facts: RunFacts, curves: Curves) -> float | None:
    """Return the time that the remaining steps take at the median speed of the last hundred; None if the run is not running."""
    if facts.state != "running" or facts.total_steps is None:
        return None
    recent = curves.window("step_seconds", facts.step - 100, None, 101).mean
    return float(np.nanmedian(recent)) * (facts.total_steps - facts.step) if np.isfinite(recent).any() else None


def _text(path: Path) -> str:
    """Return the beginning of a text file; "" if there is none."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(TEXT_LIMIT + 1)
    except OSError:
        return ""
    return text if len(text) <= TEXT_LIMIT else f"{text[:TEXT_LIMIT]}\n... (cut here)"


def _spikes(folder: RunFolder, curves: Curves, reads_data: bool) -> list[dict[str, Any]]:
    """Return the steps with the largest spike scores, in order of steps, each with its documents and the command that names all."""
    scores = curves.window("spike_score", 0, None, 1 << 30)
    losses = curves.window("loss", 0, None, 1 << 30)
    high = np.flatnonzero(scores.high >= SPIKE_SCORE)
    chosen = np.sort(high[np.argsort(-scores.high[high], kind="stable")[:SPIKES]])
    loss_of = dict(zip(losses.step.tolist(), losses.mean.tolist(), strict=True)) if len(chosen) else {}
    spikes = [(int(scores.step[i]), float(scores.high[i])) for i in chosen]
    documents = spike_documents(folder, spikes, reads_data=reads_data) if spikes else {}
    return [
        {
            "step": step,
            "score": score,
            "loss": loss_of.get(step),
            "documents": documents.get((step, score), []),
            "command": f"shoal data at {folder.path.name} --step {step}",
        }
        for step, score in spikes
    ]
