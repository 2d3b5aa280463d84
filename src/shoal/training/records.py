"""What a run writes down of itself while it goes on: metrics, events, the ledger of samples, where the time went."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from shoal.data.ledger import Header, Ledger
from shoal.run.console import Console
from shoal.run.events import Events, read_json_lines
from shoal.run.folder import RunFolder
from shoal.run.goodput import Clock, account, in_words
from shoal.run.records import Evaluation, MetricsFile, StepRecord, forget_after


class Records:
    """
    The first process's files in the run's folder; the others keep time alone.

    A disk that refuses costs no run: what waits is written when it can be.
    """

    def __init__(self, folder: RunFolder, console: Console, *, writes: bool) -> None:
        """Raises `RunError` where the folder cannot be written to."""
        self.folder, self.console, self._writes = folder, console, writes
        self._said: set[str] = set()
        self._events: Events | None = None
        self._metrics: MetricsFile | None = None
        self._ledger: Ledger | None = None
        if writes:
            with folder.writable():
                folder.path.mkdir(parents=True, exist_ok=True)
            self._events = Events(folder.events_file)
        self.clock = Clock(folder.time_file if writes else None)

    def begin(self, header: Header, step: int, position: int, *, at_end: bool) -> None:
        """
        Steps go on after `step`, from `position` on: at the start, and where the run went back. at_end: there are none, and
        the evaluation after the last one comes once more.
        """
        if self._writes:
            with contextlib.suppress(OSError):  # then those steps stand there twice
                forget_after(self.folder.metrics_file, step, evaluation=at_end)
            if self._metrics is not None:
                self._metrics.close()
            self._metrics = MetricsFile(self.folder.metrics_file)
            self._ledger = self._ledger or Ledger(self.folder.ledger_file, header)
            self._ledger.begin(step, position)

    def last_machine(self) -> dict[str, Any]:
        """What the last start's bits depended on, as `events.jsonl` has it; empty where there is none."""
        started = [e for e in read_json_lines(self.folder.events_file) if e.get("event") == "started"]
        machine = started[-1].get("machine") if started else None
        return machine if isinstance(machine, dict) else {}

    def event(self, event: str, **facts: Any) -> None:
        """A line of `events.jsonl`."""
        if self._events is not None:
            self._events.say(event, **facts)

    def metrics(self, record: StepRecord | Evaluation) -> None:
        """A line of `metrics.jsonl`."""
        if self._metrics is not None:
            self._metrics.record(record)
            self._complain(self._metrics.problem)

    def samples(
        self, step: int, first: int, stop: int, total: float, *, skipped: bool, windows: Sequence[tuple[int, int]]
    ) -> None:
        """A line of `ledger.jsonl`: a step of positions [first, stop), and the sum of what the processes had of it."""
        if self._ledger is not None:
            self._ledger.record(step, first, stop, total, skipped=skipped, windows=windows)
            self._complain(self._ledger.problem)

    def sync(self) -> None:
        """A power cut leaves no checkpoint that is ahead of the ledger."""
        if self._ledger is not None:
            self._ledger.sync()

    def goodput(self) -> str:
        """Where the time went until now, in a line; "" on all but the first process."""
        self.clock.write()
        return in_words(account(self.folder.time_file)) if self._writes else ""

    def close(self) -> None:
        """May be called twice."""
        self.clock.close()
        for each in (self._events, self._metrics, self._ledger):
            if each is not None:
                each.close()
                self._complain(each.problem)

    def _complain(self, problem: str | None) -> None:
        """Once for each problem, until it is over."""
        if problem is None:
            self._said.clear()
        elif problem not in self._said:
            self._said.add(problem)
            self.console.warn(problem)
