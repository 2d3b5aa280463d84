"""Gathers what a view draws: the state of a run, and the curves of all its steps, which a thread reads. No torch."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final

from shoal.report.live.spark import Series
from shoal.report.live.state import Follower, State
from shoal.report.live.view import SCORE, SPARKS, Sight
from shoal.run.folder import RunFolder
from shoal.run.goodput import Account, Accounting
from shoal.run.records import StepRecord
from shoal.run.tail import Tail

if TYPE_CHECKING:
    from shoal.report.curves.curves import Curves

COLUMNS: Final = 1_000  # buckets of a curve of all steps: more than a terminal has dots
RECENT_STEPS: Final = 300  # records in the curve of recent steps
READ_SECONDS: Final = 1.0  # between two readings of the thread


class History:
    """All of a run so far: where its time went, and its curves. `update` reads what is new, which takes long at first."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._curves: Curves | None = None
        self._clock = Tail(folder.time_file)
        self._accounting = Accounting()
        self.account: Account | None = None
        self.series: Mapping[str, Series] = {}

    def update(self) -> None:
        """Read what is new."""
        if self._curves is None:
            from shoal.report.curves.curves import Curves  # in the thread: numpy takes longer to import than all else

            self._curves = Curves.open(self._folder.path)
            self.series = _whole(self._curves)
        elif self._curves.refresh():
            self.series = _whole(self._curves)
        lines = self._clock.read()
        if self._clock.rewritten:
            self._accounting = Accounting()
        for line in lines:
            self._accounting.add(line)
        if lines:
            self.account = self._accounting.account()


class Gatherer:
    """Follows one run. `look` returns at once, with what a thread has read of long files until then."""

    def __init__(self, folder: RunFolder, *, ascii_only: bool = False) -> None:
        self.folder = folder
        self._follower = Follower(folder)
        self._history = History(folder)
        self._ascii_only = ascii_only
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def look(self, *, whole: bool = False) -> Sight:
        """Read what is new; return what a view draws. whole: wait until all is read, instead of reading in a thread."""
        if whole:
            self._history.update()
        elif self._thread is None:
            self._thread = threading.Thread(target=self._read_on, name="history", daemon=True)
            self._thread.start()
        now = time.time()
        state = _with_account(self._follower.look(now), self._history.account)
        return Sight(state=state, series=self._series(), spikes=self._spikes(), now=now, ascii_only=self._ascii_only)

    def close(self) -> None:
        """End the thread. May be called twice."""
        self._closed.set()

    def _read_on(self) -> None:
        while True:
            self._history.update()
            if self._closed.wait(READ_SECONDS):
                return

    def _series(self) -> dict[str, Series]:
        """Return the curves that have values."""
        steps = list(self._follower.steps)
        found = dict(self._history.series)
        if not found:  # not read yet
            found = {name: Series.of(_points(steps, name)) for name in ("loss", *SPARKS)}
            found["val_loss"] = Series.of([(each.step, each.val_loss) for each in self._follower.evaluations])
        recent = Series.of(_points(steps[-RECENT_STEPS:], "loss"))
        if recent.steps and found["loss"].steps and found["loss"].steps[0] < recent.steps[0]:
            found["recent"] = recent
        return {name: each for name, each in found.items() if len(each.steps)}

    def _spikes(self) -> list[tuple[int, float]]:
        """Return the steps with a high spike score, and their scores."""
        scores = self._history.series.get("spike_score")
        if scores is None:
            scores = Series.of(_points(self._follower.steps, "spike_score"))
        return [(step, score) for step, score in zip(scores.steps, scores.high, strict=True) if score >= SCORE]


def _whole(curves: Curves) -> dict[str, Series]:
    """Return the curves of all steps."""
    found = {}
    for name in ("loss", "val_loss", "spike_score", *SPARKS):
        window = curves.window(name, columns=COLUMNS)
        good = window.count > window.gaps
        steps = window.step[good].tolist()
        if window.count[:1].sum() > 1:  # a bucket's step is its middle one, but a curve begins and ends with a step
            steps[0] = int(curves.window(name, 0, steps[0], columns=int(window.count[0])).step[0])
        if len(steps) > 1:
            steps[-1] = max(steps[-1], min(curves.last_step, 2 * steps[-1] - steps[-2]))
        found[name] = Series(steps, window.low[good].tolist(), window.high[good].tolist())
    return found


def _points(steps: Iterable[StepRecord], name: str) -> list[tuple[int, float | None]]:
    return [(record.step, getattr(record, name)) for record in steps]


def _with_account(state: State, account: Account | None) -> State:
    if account is None:
        return state
    spent = {category: each / 1e6 for category, each in account.spent.items() if each}
    return dataclasses.replace(state, goodput=account.goodput, spent_seconds=spent)
