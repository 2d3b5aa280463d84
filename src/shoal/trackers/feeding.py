"""
Feeds one tracker from a run's files: opens it, sends what is new, and keeps how far it came. No torch.

In the run's folder, `trackers/NAME/` holds what the next start needs, and what the tracker writes offline.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
from collections.abc import Mapping
from typing import Any, Self

from shoal.config.options import Config
from shoal.errors import RunError
from shoal.resolve.resolve import read_back
from shoal.run.folder import RunFolder
from shoal.system.disk import write_whole
from shoal.trackers.choice import make_tracker
from shoal.trackers.following import Follower
from shoal.trackers.points import Batch, Scalars, about
from shoal.trackers.tracker import Opened, Tracker


class Feed:
    """A tracker and the position in the run's files up to which it has everything. Holds a lock: one process feeds a tracker."""

    def __init__(self, folder: RunFolder, name: str, config: Config | None = None) -> None:
        """config: the run's config with other options of its trackers; None reads the run's own. Waits for the lock."""
        self.name, self._folder = name, folder
        self.sent = 0  # records
        self.config = config or read_back(folder.config_file)
        self._kept = folder.trackers / name
        self._kept.mkdir(parents=True, exist_ok=True)
        self._lock = (self._kept / "lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._read_state()
        self._tracker: Tracker | None = None

    @classmethod
    def from_the_start(cls, folder: RunFolder, name: str, config: Config) -> Self:
        """Return a feed that sends the whole run to a new tracker run. Raises `RunError` while the run is being fed to it."""
        lock = folder.trackers / name / "lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunError(
                    f"{folder.path} is being trained, with {name} in track.to: it has the run already; sync it after the end"
                ) from None
            (lock.parent / "state.json").unlink(missing_ok=True)
        return cls(folder, name, config)

    def _read_state(self) -> None:
        self._state, self._highest = dict[str, Any](), dict[str, int]()
        try:
            state = json.loads((self._kept / "state.json").read_text(encoding="utf-8"))
            self._state, self._highest = dict(state["run"]), dict(state["highest"])
            self._follower = Follower(self._folder, self._kept)
        except (OSError, ValueError, KeyError, TypeError):
            self._forget()

    def _forget(self) -> None:
        """Start over: what was sent belongs to a tracker run that is not continued."""
        for path in self._kept.glob("*.sent"):
            path.unlink()
        self._state, self._highest = {}, {}
        self._follower = Follower(self._folder, self._kept)

    def _save_state(self) -> None:
        state = json.dumps({"run": self._state, "highest": self._highest})
        write_whole(self._kept / "state.json", [state.encode()])

    def load(self) -> None:
        """Import the tracker's library."""
        make_tracker(self.name, self.config.track, self._kept)

    def open(self) -> Opened:
        """Open the tracker: a new run of it, or the one that it had."""
        tracker = make_tracker(self.name, self.config.track, self._kept)
        model = self._folder.model_file
        text = model.read_text(encoding="utf-8") if model.is_file() else ""
        if self._state and self._state["destination"] != tracker.destination:
            self._forget()
        opened = tracker.open(about(self.config, self._follower.last_started(), text), self._state)
        self._state = {**opened.state, "destination": tracker.destination}
        if opened.exists:
            self._save_state()
        self._tracker = tracker
        return opened

    @property
    def complaint(self) -> str:
        """What the tracker cannot take, beside the numbers; "" if nothing."""
        return self._tracker.complaint if self._tracker else ""

    def turn(self) -> bool:
        """Send what is new, at most some thousand lines. Return whether there was something. Whatever it raises, call it again."""
        assert self._tracker is not None
        batch = self._follower.read()
        if not batch:
            return False
        highest = self._highest
        if not self._tracker.rewinds:
            batch, highest = _unsent(batch, highest)
        try:
            self._tracker.write(batch)
        except BaseException:
            self._follower.look_again()  # what arrived is unknown: the next batch says from where on it is sent again
            raise
        self._highest = highest
        self.sent += len(batch.scalars) + len(batch.notes)
        self._commit()
        return True

    def _commit(self) -> None:
        safe = self._tracker is not None and self._tracker.is_safe()
        if safe:
            self._save_state()
        self._follower.commit(safe=safe)

    def close(self) -> None:
        """Wait until everything has arrived, and close the tracker."""
        if self._tracker is not None:
            self._tracker.close()
            self._save_state()
            self._follower.commit(safe=True)
        self._lock.close()


def _unsent(batch: Batch, highest: Mapping[str, int]) -> tuple[Batch, dict[str, int]]:
    """
    Return the batch without the numbers of steps that were sent, for a tracker that cannot replace them; and the highest step sent
    of each number.
    """
    now, kept = dict(highest), []
    for each in batch.scalars:
        new = {name: value for name, value in each.values.items() if each.step > now.get(name, -1)}
        now |= dict.fromkeys(new, each.step)
        if new:
            kept.append(Scalars(each.step, each.time, new))
    return dataclasses.replace(batch, scalars=kept), now
