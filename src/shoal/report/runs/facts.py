"""
The facts of a run, read from its folder in a few milliseconds: state, steps, losses, speed, times, config. No torch.

Only the tail of `metrics.jsonl` is parsed. The best held-out loss needs all its lines, so they are searched as bytes, and
`cache/facts.json` keeps how far that search came; without that cache it starts over.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shoal.config.options import Config
from shoal.errors import ShoalError
from shoal.report.runs.best import best_evaluation
from shoal.report.runs.written_options import written_options
from shoal.run.events import read_json_lines
from shoal.run.folder import RunFolder
from shoal.run.jsonl import object_of
from shoal.run.records import StepRecord

SPEED_RECORDS: Final = 50  # records at the end of a run whose median is its speed
OWN: Final = frozenset({"launch.name", "launch.runs"})  # options that differ between any two runs


@dataclass(frozen=True)
class RunFacts:
    """
    What a run is and did. Unknown values are None.

    state: "running", "finished", "stopped" (it saved and can resume), "crashed" or "not started". loss: the last training
    loss, in nats per token. tokens_per_second, mfu: medians of the last `SPEED_RECORDS` records. started, ended: seconds
    since 1970; ended is None while it runs. seconds: from the first start to the end, or to now. event: the last event
    "started". options: value of each option in `config.yaml`, by dotted key.
    """

    folder: RunFolder
    state: str
    step: int
    total_steps: int | None
    loss: float | None
    best_val_loss: float | None
    best_val_step: int | None
    tokens: int
    tokens_per_second: float | None
    mfu: float | None
    started: float | None
    ended: float | None
    seconds: float | None
    restarts: int
    event: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The run's name: that of its folder."""
        return self.folder.path.resolve().name

    @functools.cached_property
    def config(self) -> Config | None:
        """The whole config; None if it cannot be read. Reading it takes 20 times longer than `options`."""
        try:
            return self.folder.load_config()
        except (ShoalError, OSError):
            return None

    @classmethod
    def read(cls, folder: RunFolder) -> RunFacts:
        """Return the facts of the run in `folder`. Files that are missing or damaged leave their facts None."""
        events = read_json_lines(folder.events_file)
        starts = [e for e in events if e.get("event") == "started"]
        last_records = _last_records(folder.metrics_file)
        last = last_records[-1] if last_records else None
        best = best_evaluation(folder)
        options = written_options(folder.config_file)
        step = max(last.step if last else 0, best.last_step)
        event = starts[-1] if starts else {}
        total = _total_steps(event, options, step, events)
        state = _state(folder, events, step, total)
        started = starts[0].get("time") if starts else None
        ended = None if state in ("running", "not started") else _last_sign(folder, events, last)
        return cls(
            folder=folder, state=state, step=step, total_steps=total, loss=last.loss if last else None,
            best_val_loss=best.val_loss, best_val_step=best.step, tokens=last.tokens if last else 0,
            tokens_per_second=_median([r.tokens_per_second for r in last_records]),
            mfu=_median([r.mfu for r in last_records if r.mfu is not None]),
            started=started, ended=ended, restarts=max(0, len(starts) - 1), event=event, options=options,
            seconds=None if started is None else max(0.0, (ended or time.time()) - started),
        )  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """Return the facts for `--json`, without the options."""
        left_out = ("folder", "event", "options", "config")
        values = {k: getattr(self, k) for k in self.__dataclass_fields__ if k not in left_out}
        return {"name": self.name, "folder": str(self.folder.path), **values}


def all_runs(runs: Path) -> list[RunFolder]:
    """Return the folders of all runs in `runs`, by name; `runs` itself if it is one run."""
    if (runs / "config.yaml").is_file():
        return [RunFolder(runs)]
    return [RunFolder(config.parent) for config in sorted(runs.glob("*/config.yaml"))]


def differences(configs: Sequence[Config | Mapping[str, Any]]) -> dict[str, list[Any]]:
    """
    Return the options that differ between configs: {dotted key: one value per config}, in the order of the options.

    configs: whole configs, or `RunFacts.options`. An option that a config lacks is None. Names of runs are skipped.
    """
    values = [_flat(config) for config in configs]
    keys = dict.fromkeys(key for options in values for key in options)
    found = {key: [options.get(key) for options in values] for key in keys if key not in OWN}
    return {key: each for key, each in found.items() if any(value != each[0] for value in each[1:])}


def _flat(config: Config | Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(config, Config):
        return config
    from shoal.config.keys import options_of, plain_value

    return {key: plain_value(value) for key, (_, value) in options_of(config).items()}


def _last_records(path: Path) -> list[StepRecord]:
    """Return up to `SPEED_RECORDS` last records of steps, oldest first, from as much of the file's end as they take."""
    try:
        with path.open("rb") as file:
            size, length = file.seek(0, 2), 1 << 15
            while True:
                file.seek(max(0, size - length))
                lines = file.read(length).splitlines()[int(size > length) :]  # the first one may be cut
                records = _records(reversed(lines))
                if len(records) >= SPEED_RECORDS or length >= size:
                    return records[::-1]
                length *= 4
    except OSError:
        return []


def _records(lines: Iterable[bytes]) -> list[StepRecord]:
    """Return the first `SPEED_RECORDS` records of steps in `lines`."""
    found: list[StepRecord] = []
    for line in lines:
        if len(found) == SPEED_RECORDS:
            break
        record = object_of(line)  # None for the line that is being written
        if record is not None and "loss" in record:
            found.append(StepRecord.of_line(record))
    return found


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _total_steps(
    event: Mapping[str, Any], options: Mapping[str, Any], step: int, events: Sequence[Mapping[str, Any]]
) -> int | None:
    """Return the length of the run in steps, from its start or its config; None if only its data tells."""
    if event.get("total_steps") is not None:
        return int(event["total_steps"])
    if (steps := options.get("train.steps")) is not None:
        return int(steps)
    if (tokens := options.get("train.tokens")) is not None:
        return math.ceil(int(tokens) / int(options["train.global_batch"] * options["data.seq_len"]))
    return step if events and events[-1].get("event") == "finished" else None


def _state(folder: RunFolder, events: Sequence[Mapping[str, Any]], step: int, total: int | None) -> str:
    if folder.is_locked():
        return "running"
    if total is not None and step >= total:
        return "finished"
    ends = [e["event"] for e in events if e.get("event") in ("started", "stopped", "finished")]
    if not ends and not step:
        return "not started"
    return {"stopped": "stopped", "finished": "finished"}.get(ends[-1] if ends else "", "crashed")


def _last_sign(folder: RunFolder, events: Sequence[Mapping[str, Any]], last: StepRecord | None) -> float | None:
    """Return when the run last wrote something, in seconds since 1970."""
    times = [events[-1].get("time") if events else None, last.time if last else None]
    if last is not None and last.time is None:  # an older run: its records have no time
        times.append(folder.metrics_file.stat().st_mtime)
    return max((t for t in times if t is not None), default=None)
