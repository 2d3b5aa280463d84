"""
Everything that the page shows of a run except its curves and ranks, as plain dicts for JSON. No torch.

    runs_view(runs)      the list of runs, with the options that differ
    run_view(runs["a"])  one run: what ran with what, where the time went, events, spikes, samples
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import numpy as np

from shoal.config.keys import options_of, plain_value
from shoal.config.layout import AXES, find_layout
from shoal.errors import ShoalError
from shoal.report.curves.curves import Curves
from shoal.run.events import read_json_lines
from shoal.run.folder import RunFolder
from shoal.run.goodput import MEANINGS, account

TROUBLE: Final = {
    "went back", "save failed", "damaged", "quarantined", "loader restarted", "overflowed", "skipped", "crashed", "hung",
    "no fast place", "held-out row skipped", "lost", "restarted", "workers failed",
}  # fmt: skip
TEXT_LIMIT: Final = 20_000  # characters of a sample or of the model's modules
EVENT_LIMIT: Final = 500  # events in the list; marks are drawn of all of them
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
    return {
        "runs": [_summary(name, folder, curves[name]) for name, folder in runs.items()],
        "differences": _differences({name: _options(folder) for name, folder in runs.items()}),
    }


def run_view(folder: RunFolder, curves: Curves) -> dict[str, Any]:
    """Return what the page shows of one run."""
    events = read_json_lines(folder.events_file)
    spent = account(folder.time_file) if folder.time_file.is_file() else None
    return {
        "started_event": next((e for e in reversed(events) if e.get("event") == "started"), None),
        "config": list(_options(folder).items()),
        "layout": _layout(folder, events),
        "model": _text(folder.path / "model.txt"),
        "events": [_event(each) for each in events[-EVENT_LIMIT:]],
        "spikes": _spikes(folder, curves),
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
    return value if isinstance(value, str) else json.dumps(value)


def _summary(name: str, folder: RunFolder, curves: Curves) -> dict[str, Any]:
    """Return a run's line in the list: also what its charts need."""
    events = read_json_lines(folder.events_file)
    started = next((e for e in reversed(events) if e.get("event") == "started"), {})
    return {
        "id": name,
        "name": name,
        "version": f"{curves.version}-{_size(folder.events_file)}-{_size(folder.ranks_file)}",
        "curves": curves.names(),
        "marks": [_mark(each) for each in events if each.get("step") is not None and _is_mark(each)],
        "flops_per_token": started.get("flops_per_token"),
    } | _state(folder, curves, events)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _is_mark(event: Mapping[str, Any]) -> bool:
    """Return whether an event is marked on the curves: starts after the first, and trouble; not saves, which are many."""
    name = str(event.get("event"))
    return _is_bad(name) or (name == "started" and event["step"] > 0) or name == "stopped"


def _mark(event: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": event["step"], "event": event["event"], "isBad": _is_bad(str(event["event"]))}


def _last(curves: Curves, name: str) -> float | None:
    """Return the last value of a curve; None if it has none."""
    last = curves.window(name, 0, None, 2).mean
    return float(last[-1]) if len(last) and np.isfinite(last[-1]) else None


def _options(folder: RunFolder) -> dict[str, str]:
    """Return the options of a run's config by dotted key, as text; none if its config cannot be read."""
    try:
        found = options_of(folder.load_config())
    except (ShoalError, OSError):
        return {}
    return {key: json.dumps(plain_value(value), default=str) for key, (_, value) in found.items()}


def _differences(options: Mapping[str, Mapping[str, str]]) -> list[dict[str, Any]]:
    """Return the options with different values, with the value of each run."""
    keys = dict.fromkeys(key for each in options.values() for key in each)
    ignored = ("launch.name", "launch.runs")
    values = {key: {name: each[key] for name, each in options.items() if key in each} for key in keys}
    return [
        {"option": key, "values": found}
        for key, found in values.items()
        if key not in ignored and (len(set(found.values())) > 1 or len(found) < len(options))
    ]


def _layout(folder: RunFolder, events: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the axes and their sizes, outermost first: those of the last start, else those of the config."""
    started = next((e for e in reversed(events) if e.get("event") == "started"), {})
    sizes = started.get("layout") or _sizes(folder, started.get("processes"))
    return {"axes": [[name, int(sizes[name])] for name in AXES if name in sizes]}


def _sizes(folder: RunFolder, processes: int | None) -> dict[str, int]:
    try:
        layout = find_layout(folder.load_config().parallel, processes)
    except (ShoalError, OSError):
        return {}
    return {} if isinstance(layout, str) else {each.name: getattr(layout, each.name) for each in fields(layout)}


def _text(path: Path) -> str:
    """Return the beginning of a text file; "" if there is none."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(TEXT_LIMIT + 1)
    except OSError:
        return ""
    return text if len(text) <= TEXT_LIMIT else f"{text[:TEXT_LIMIT]}\n... (cut here)"


def _spikes(folder: RunFolder, curves: Curves) -> list[dict[str, Any]]:
    """Return the steps with the largest spike scores, in order of steps, each with the command that names its documents."""
    scores = curves.window("spike_score", 0, None, 1 << 30)
    losses = curves.window("loss", 0, None, 1 << 30)
    high = np.flatnonzero(scores.high >= SPIKE_SCORE)
    chosen = np.sort(high[np.argsort(-scores.high[high], kind="stable")[:SPIKES]])
    loss_of = dict(zip(losses.step.tolist(), losses.mean.tolist(), strict=True)) if len(chosen) else {}
    return [
        {
            "step": int(scores.step[i]),
            "score": float(scores.high[i]),
            "loss": loss_of.get(int(scores.step[i])),
            "command": f"shoal data at {folder.path.name} --step {int(scores.step[i])}",
        }
        for i in chosen
    ]


def _state(folder: RunFolder, curves: Curves, events: list[dict[str, Any]]) -> dict[str, Any]:
    names = [str(each.get("event")) for each in events]
    lasting = [name for name in names if name in ("started", "finished", "stopped", "crashed")]
    held = curves.window("val_loss", 0, None, 1 << 30)
    best = int(np.nanargmin(held.mean)) if np.isfinite(held.mean).any() else None
    times = [each["time"] for each in events if "time" in each]
    return {
        "state": {"started": "running"}.get(lasting[-1], lasting[-1]) if lasting else "not started",
        "step": curves.last_step,
        "total_steps": next((e.get("total_steps") for e in reversed(events) if e.get("total_steps")), None),
        "loss": _last(curves, "loss"),
        "best_val_loss": None if best is None else float(held.mean[best]),
        "best_val_step": None if best is None else int(held.step[best]),
        "tokens": int(curves.window("loss", 0, None, 2).tokens[-1]) if curves.last_step else None,
        "tokens_per_second": _last(curves, "tokens_per_second"),
        "mfu": _last(curves, "mfu"),
        "restarts": max(0, names.count("started") - 1),
        "started": times[0] if times else None,
        "ended": times[-1] if times else None,
    }
