"""The state of a run as its files tell it, read again and again while it trains. No torch."""

from __future__ import annotations

import dataclasses
import math
import os
import socket
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from shoal.errors import ShoalError
from shoal.run.console import duration
from shoal.run.folder import RunFolder
from shoal.run.now import TRAINING, read_now
from shoal.run.records import Evaluation, RanksRecord, StepRecord
from shoal.run.tail import Tail

Condition = Literal["running", "finished", "stopped", "crashed", "not started"]

FIRST_BYTES: Final = 512 * 1024  # of the end of a file, read at the first look: about 2,000 steps
KEPT: Final = 2_000  # records kept in memory
RECENT: Final = 50  # steps whose pace predicts the time left
EVENTS: Final = 200  # events kept
ELSEWHERE_SECONDS: Final = 90.0  # a process on another host lives if it wrote this recently: network disks tell late
# Phases of a run whose steps have begun; all others come before its first step.
AFTER_START: Final = (
    TRAINING, "evaluation", "saving", "rolling back", "writing a sample", "comparing with gzip and xz", "end",
)  # fmt: skip
LATE_SECONDS: Final = 5.0  # `now.json` is older than the lock by more than this if an earlier process wrote it
QUIET_STEPS: Final = 10  # steps' time without a step, after which a view says so
QUIET_SECONDS: Final = 60.0  # and at least this long
SAMPLE_CHARACTERS: Final = 4_000


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What a run does now; `total` is 0 if the amount of work is unknown."""

    name: str
    done: float = 0
    total: float = 0

    @property
    def is_before_steps(self) -> bool:
        """Return whether no step has begun."""
        return self.name not in AFTER_START


@dataclass(frozen=True, kw_only=True)
class State:
    """A run at one moment. Times are in seconds; what the run has not recorded is None or empty."""

    name: str
    folder: str
    condition: Condition
    why: str = ""  # why it crashed, or what is odd about it
    phase: Phase | None = None  # while it runs
    news_seconds: float | None = None  # since its files last changed
    step: int = 0
    total_steps: int | None = None
    left_seconds: float | None = None
    started: float | None = None  # seconds since 1970: its first start
    seconds: float | None = None  # from the first start to now, or to the last record of a run that has ended
    restarts: int = 0
    processes: int | None = None
    device: str = ""
    parameters: int | None = None
    loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    spike_score: float | None = None
    tokens: int = 0
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    mfu: float | None = None
    val_loss: float | None = None
    val_bits_per_byte: float | None = None
    val_step: int | None = None
    best_val_loss: float | None = None
    best_val_step: int | None = None
    memory_bytes: Sequence[int] = ()  # by rank; only rank 0's if the run records no other
    peak_memory_bytes: Sequence[int] = ()
    device_memory_bytes: int | None = None  # of one GPU
    busy_seconds: Mapping[str, Sequence[float]] = field(default_factory=dict)  # by phase, by rank
    split_seconds: Mapping[str, float] = field(default_factory=dict)
    goodput: float | None = None
    spent_seconds: Mapping[str, float] = field(default_factory=dict)
    events: Sequence[Mapping[str, Any]] = ()  # the last ones
    alerts: Sequence[Mapping[str, Any]] = ()  # those that have not recovered
    sample: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the state for `--json`; a NaN or Inf, which JSON lacks, is None."""
        plain: dict[str, Any] = _finite(dataclasses.asdict(self))
        return plain


class Follower:
    """Follows the files of one run. `look` reads what is new and returns the state; it raises nothing for files that are missing."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.steps: deque[StepRecord] = deque(maxlen=KEPT)
        self.evaluations: deque[Evaluation] = deque(maxlen=KEPT)
        self._metrics = Tail(folder.metrics_file, last_bytes=FIRST_BYTES)
        self._ranks = Tail(folder.ranks_file, last_bytes=FIRST_BYTES)
        self._clock = Tail(folder.time_file, last_bytes=4096)
        self._events = Tail(folder.events_file)
        self._known: deque[dict[str, Any]] = deque(maxlen=EVENTS)
        self._raised: dict[str, dict[str, Any]] = {}
        self._started: list[dict[str, Any]] = []
        self._turning: dict[str, Any] = {}  # the last start, stop or crash
        self._last_ranks: RanksRecord | None = None
        self._clock_step: int | None = None
        self._planned: int | None = None
        self._best: Evaluation | None = None

    def look(self, now: float | None = None) -> State:
        """Read what is new, and return the state."""
        now = time.time() if now is None else now
        self._read_metrics()
        self._read_events()
        for line in self._clock.read():
            self._clock_step = line.get("step")
        for line in self._ranks.read():
            if "busy_seconds" in line:
                self._last_ranks = RanksRecord.of_line(line)
        return self._state(now)

    def _read_metrics(self) -> None:
        lines = self._metrics.read()
        if self._metrics.rewritten:
            self.steps.clear()
            self.evaluations.clear()
            self._best = None
        self.steps += [StepRecord.of_line(line) for line in lines if "loss" in line]
        new = [Evaluation.of_line(line) for line in lines if "val_loss" in line]
        self.evaluations += new
        for each in new:
            if self._best is None or each.val_loss < self._best.val_loss:
                self._best = each

    def _read_events(self) -> None:
        lines = self._events.read()
        if self._events.rewritten:
            self._known.clear()
            self._started.clear()
            self._raised.clear()
        for line in lines:
            self._known.append(line)
            event = line.get("event")
            if event == "started":
                self._started.append(line)
            if event in ("started", "stopped", "finished", "crashed", "hang"):
                self._turning = line
            if event == "alert":
                self._note_alert(line)

    def _note_alert(self, line: dict[str, Any]) -> None:
        rule = str(line.get("rule"))
        if line.get("state") == "recovered":
            self._raised.pop(rule, None)
        else:
            self._raised[rule] = self._raised.get(rule, {}) | line

    def _state(self, now: float) -> State:
        started = self._started[-1] if self._started else {}
        record = self.steps[-1] if self.steps else None
        evaluation = self.evaluations[-1] if self.evaluations else None
        condition, why = self._condition(now)
        phase = self._phase(started) if condition == "running" else None
        step = self._clock_step if self._clock_step is not None else record.step if record else 0
        total = self._total_steps(started)
        gpus = started.get("gpus") or []
        return State(
            name=self.folder.path.resolve().name,
            folder=str(self.folder.path),
            condition=condition,
            why=why or (self._quiet(now, phase) if condition == "running" else ""),
            phase=phase,
            news_seconds=news_seconds(self.folder, now),
            step=step,
            total_steps=total,
            left_seconds=self._left(step, total) if condition == "running" else None,
            started=self._started[0].get("time") if self._started else None,
            seconds=self._seconds(now if condition == "running" else None),
            restarts=max(0, len(self._started) - 1),
            processes=started.get("processes"),
            device=str(started.get("device_name") or started.get("device") or ""),
            parameters=started.get("parameters"),
            tokens=max(record.tokens if record else 0, evaluation.tokens if evaluation else 0),
            **_fields(record, ("loss", "lr", "grad_norm", "spike_score", "tokens_per_second", "step_seconds", "mfu")),
            **_fields(evaluation, ("val_loss", "val_bits_per_byte")),
            val_step=evaluation.step if evaluation else None,
            best_val_loss=self._best.val_loss if self._best else None,
            best_val_step=self._best.step if self._best else None,
            **self._memory(record),
            device_memory_bytes=gpus[0].get("memory_bytes") if gpus else None,
            busy_seconds=self._last_ranks.busy_seconds if self._last_ranks else {},
            split_seconds=next((r.split_seconds for r in reversed(self.steps) if r.split_seconds), {}),
            events=list(self._known),
            alerts=list(self._raised.values()),
            sample=_newest_text(self.folder.samples),
        )

    def _condition(self, now: float) -> tuple[Condition, str]:
        """Return whether the run is running or how it ended, and why."""
        holder = self.folder.holder()
        if self.folder.is_locked() or self._lives_elsewhere(holder, now):
            return "running", ""
        last = self._turning.get("event")
        if last in ("finished", "stopped"):
            return ("finished", "") if last == "finished" else ("stopped", "")
        gone = f"process {holder.get('pid')} on {holder.get('host')} is gone" if holder else ""
        if not self._started:
            return "not started", f"{gone}; it ended before its first step" if gone else ""
        if last in ("crashed", "hang"):
            gone = _cause(self._turning)
        return "crashed", gone or "no process holds its lock"

    def _lives_elsewhere(self, holder: Mapping[str, Any], now: float) -> bool:
        """Return whether a process on another host writes this run: not every network disk tells of its lock."""
        if not holder or holder.get("host") == socket.gethostname():
            return False
        age = news_seconds(self.folder, now)
        return age is not None and age < ELSEWHERE_SECONDS and self._turning.get("event") not in ("finished", "stopped")

    def _phase(self, started: Mapping[str, Any]) -> Phase | None:
        doing = read_now(self.folder)
        locked = _changed(self.folder.path / "lock")
        if doing is not None and (locked is None or doing.time > locked - LATE_SECONDS):
            is_progress = doing.total and doing.phase != TRAINING
            return Phase(
                name=doing.phase,
                done=doing.done or 0 if is_progress else 0,
                total=doing.total or 0 if is_progress else 0,
            )
        return Phase(name=TRAINING) if self._clock_step or (started and self.steps) else Phase(name="starting")

    def _quiet(self, now: float, phase: Phase | None) -> str:
        """Return a sentence if the run lives, but has not taken a step for long; "" otherwise."""
        record = self.steps[-1] if self.steps else None
        if record is None or record.time is None or phase is None or phase.is_before_steps:
            return ""
        silent = now - record.time
        lines = max(1, self.steps[-1].step - self.steps[-2].step if len(self.steps) > 1 else 1)
        if silent > max(QUIET_SECONDS, QUIET_STEPS * record.step_seconds * lines):
            return f"no step recorded for {duration(silent)}"
        return ""

    def _total_steps(self, started: Mapping[str, Any]) -> int | None:
        total = started.get("total_steps")
        if isinstance(total, int):
            return total
        if self._planned is None and self.folder.config_file.is_file():
            try:
                self._planned = self.folder.load_config().train.steps or 0
            except (ShoalError, OSError):
                self._planned = 0
        return self._planned or None

    def _left(self, step: int, total: int | None) -> float | None:
        """Return the seconds left, at the pace of recent steps with the evaluations and saves between them."""
        recent = list(self.steps)[-RECENT:]
        if total is None or not recent:
            return None
        first, last = recent[0], recent[-1]
        begun = self._started[-1].get("time", 0) if self._started else 0
        pace = last.step_seconds
        if first.time and last.time and last.step > first.step and first.time > begun:
            pace = max(pace, (last.time - first.time) / (last.step - first.step))
        return max(0, total - step) * pace

    def _seconds(self, now: float | None) -> float | None:
        """Return the time since the first start, until now or until the last line."""
        begun = self._started[0].get("time") if self._started else None
        if begun is None:
            return None
        last = [each.time for each in (*list(self.steps)[-1:], *list(self.evaluations)[-1:]) if each.time is not None]
        ends = [now] if now is not None else [*last, *(e.get("time", begun) for e in list(self._known)[-1:])]
        return max(0.0, float(max(ends)) - float(begun))

    def _memory(self, record: StepRecord | None) -> dict[str, Any]:
        ranks = self._last_ranks
        if ranks is not None:
            return {"memory_bytes": ranks.memory_bytes, "peak_memory_bytes": ranks.peak_memory_bytes}
        return {"peak_memory_bytes": [record.memory_bytes]} if record else {}


def news_seconds(folder: RunFolder, now: float) -> float | None:
    """Return the seconds since a run last wrote one of its files; None if it has none."""
    files = (folder.time_file, folder.metrics_file, folder.events_file, folder.now_file, folder.path / "lock")
    times = [when for when in map(_changed, files) if when is not None]
    return max(0.0, now - max(times)) if times else None


def newest_first(runs: Path) -> list[RunFolder]:
    """Return all runs in a folder: those that changed last come first."""
    found = [RunFolder(path) for path in runs.iterdir() if is_run(path)] if runs.is_dir() else []
    now = time.time()
    return sorted(found, key=lambda folder: news_seconds(folder, now) or 0.0)


def is_run(path: Path) -> bool:
    """Return whether a folder is that of a run, perhaps one that has not begun its first step."""
    return any((path / name).is_file() for name in ("config.yaml", "lock", "now.json"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _fields(record: object, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(record, name, None) for name in names}


def _cause(event: Mapping[str, Any]) -> str:
    """Return why the run crashed, from the last event of its launcher."""
    if event.get("event") == "hang":
        return str(event.get("why", "a worker hung"))
    step = event.get("step")
    return f"worker {event.get('rank')} {event.get('how')}" + (f" at step {step}" if step is not None else "")


def _changed(path: Path) -> float | None:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return None


def _newest_text(folder: Path) -> str:
    """Return the beginning of the newest sample; "" if there is none."""
    try:
        files = [(path.stat().st_mtime, path) for path in folder.iterdir() if path.suffix == ".txt"]
        if not files:
            return ""
        with max(files)[1].open(encoding="utf-8", errors="replace") as file:
            return file.read(SAMPLE_CHARACTERS)
    except OSError:
        return ""
