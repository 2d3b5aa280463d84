"""Writes a run's files while it trains: metrics, events, the ledger of samples, where the time went."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from shoal.data.order.ledger import Header, Ledger, last_data_id
from shoal.run.console import Console
from shoal.run.events import Events, read_json_lines
from shoal.run.folder import RunFolder
from shoal.run.goodput import Clock, account, in_words
from shoal.run.records import Evaluation, MetricsFile, RanksFile, RanksRecord, StepRecord, forget_after


def tokens_of(folder: RunFolder) -> str:
    """Return the id of the tokens that a run continues with; "" if it has no checkpoint: it may start with others."""
    return last_data_id(folder.ledger_file) if folder.has_checkpoint() else ""


class RunFiles:
    """
    The run's files, written by the first rank; other ranks only measure where their time goes.

    A full disk does not stop a run: lines wait until they can be written.
    """

    def __init__(self, folder: RunFolder, console: Console, *, writes: bool) -> None:
        """Create the run's folder. Raises `RunError` if it cannot be written to."""
        self.folder, self.console, self._writes = folder, console, writes
        self._said: set[str] = set()
        self._events: Events | None = None
        self._metrics: MetricsFile | None = None
        self._ranks: RanksFile | None = None
        self._ledger: Ledger | None = None
        if writes:
            with folder.writable():
                folder.path.mkdir(parents=True, exist_ok=True)
            self._events = Events(folder.events_file)
        self.clock = Clock(folder.time_file if writes else None)

    def begin(self, header: Header, step: int, position: int, quarantined: Mapping[int, int], *, at_end: bool) -> None:
        """
        Prepare the files for the steps after `step`, from sample `position` on. Called at the start and after a rollback.

        quarantined: rows that cannot be read, each with its substitute. at_end: whether no steps are left, so that only the last evaluation is repeated.
        """
        if self._writes:
            with contextlib.suppress(OSError):  # then these steps appear twice in the file
                forget_after(self.folder.metrics_file, step, evaluation=at_end)
                forget_after(self.folder.ranks_file, step)
            for each in filter(None, (self._metrics, self._ranks)):
                each.close()
            self._metrics, self._ranks = MetricsFile(self.folder.metrics_file), RanksFile(self.folder.ranks_file)
            self._ledger = self._ledger or Ledger(self.folder.ledger_file)
            self._ledger.begin(header, step, position, quarantined)

    def last_machine(self) -> dict[str, Any]:
        """Return the facts on which the bits of the last start depended, from `events.jsonl`; empty if there was no start."""
        started = [e for e in read_json_lines(self.folder.events_file) if e.get("event") == "started"]
        machine = started[-1].get("machine") if started else None
        return machine if isinstance(machine, dict) else {}

    def event(self, event: str, **facts: Any) -> None:
        """Write a line of `events.jsonl`."""
        if self._events is not None:
            self._events.say(event, **facts)

    def metrics(self, record: StepRecord | Evaluation) -> None:
        """Write a line of `metrics.jsonl`."""
        if self._metrics is not None:
            self._metrics.record(record)
            self._complain(self._metrics.problem)

    def ranks(self, record: RanksRecord) -> None:
        """Write a line of `ranks.jsonl`."""
        if self._ranks is not None:
            self._ranks.record(record)
            self._complain(self._ranks.problem)

    def model(self, text: str) -> None:
        """Write `model.txt`."""
        if self._writes:
            with contextlib.suppress(OSError):
                self.folder.model_file.write_text(text, encoding="utf-8")

    def samples(
        self,
        step: int,
        first: int,
        stop: int,
        total: float,
        *,
        skipped: bool,
        empty: bool,
        windows: Sequence[tuple[int, int]],
    ) -> None:
        """
        Write a line of `ledger.jsonl`: a step on the samples at positions [first, stop).

        total: the sum of its samples' checksums over the world. empty: whether no label was learned. windows: ranges of
        positions that no step may use.
        """
        if self._ledger is not None:
            self._ledger.record(step, first, stop, total, skipped=skipped, empty=empty, windows=windows)
            self._complain(self._ledger.problem)

    def quarantined(self, row: int, substitute: int) -> None:
        """Write a line of `ledger.jsonl`: from the next step written on, `substitute` is read instead of `row`."""
        if self._ledger is not None:
            self._ledger.quarantine(row, substitute)

    def sync(self) -> None:
        """Flush the ledger, so that a power cut leaves no checkpoint ahead of it."""
        if self._ledger is not None:
            self._ledger.sync()

    def goodput(self) -> str:
        """Return where the time went so far, in a line; empty on all but the first rank."""
        self.clock.write()
        return in_words(account(self.folder.time_file)) if self._writes else ""

    def close(self) -> None:
        """Write the lines that wait, and close the files. May be called twice."""
        self.clock.close()
        for each in (self._events, self._metrics, self._ranks, self._ledger):
            if each is not None:
                each.close()
                self._complain(each.problem)

    def _complain(self, problem: str | None) -> None:
        """Warn of a problem once; warn again if it returns after it was over."""
        if problem is None:
            self._said.clear()
        elif problem not in self._said:
            self._said.add(problem)
            self.console.warn(problem)
