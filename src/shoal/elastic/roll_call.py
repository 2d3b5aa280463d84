"""
Roll call of a run's launchers, before and while they meet: they find in seconds why they would never meet, or not agree.

Each launcher posts its folder, its number of nodes and its settings in the rendezvous's store, under the run's name. It thus
sees launchers of the same run that have another folder, because the disk is not shared, and that torch's rendezvous would
keep apart; and launchers that expect another world, with which torch's rendezvous would never complete.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from torch.distributed.distributed_c10d import Store

from shoal.elastic.agreement import difference, most_common
from shoal.elastic.timed_calls import TimedCalls
from shoal.errors import LaunchError
from shoal.system.output import on_one_line

LOOK_SECONDS: Final = 1.0
FRESH_SECONDS: Final = 5.0  # a launcher whose beat has not changed for this long is gone
ODD_SECONDS: Final = 3.0  # to wait for others with this launcher's settings
PATIENCE_SECONDS: Final = 10.0  # to wait for another node in place of one that cannot join


@dataclass
class _Present:
    """What another launcher posted, and when its beat last changed."""

    host: str
    folder: str
    path: str
    settings: dict[str, Any]
    beat: bytes = b""
    changed: float = field(default=-FRESH_SECONDS)
    seen: int = 0

    def note_beat(self, beat: bytes, now: float) -> None:
        if beat != self.beat:
            self.seen += 1
            self.beat = beat
            self.changed = now

    def is_fresh(self, now: float) -> bool:
        """Return whether the launcher lives: its beat was seen to change."""
        return self.seen > 1 and now - self.changed < FRESH_SECONDS

    @property
    def runs(self) -> bool:
        return self.beat.startswith(b"runs")


class RollCall:
    """This launcher among those of its run. `has_met`: whether it was in a round; then it waits for others without a limit."""

    def __init__(
        self, store: Store, name: str, folder: str, path: str, settings: Mapping[str, object], fewest: int,
        launchers: int = 0, problems: Callable[[], Mapping[str, str]] = dict, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """
        Begin; the first `look` posts this launcher.

        store: a connection for the roll call alone. name: of the run. folder: the id of the run's folder. path: of the folder.
        settings: what must match on all nodes. fewest: the minimum number of nodes. launchers: how many were started, spares
        included, if that is known. problems: returns the errors with which other nodes' launchers ended, by host.
        """
        self.has_met = False
        self._store, self._fewest, self._problems, self._clock = store, fewest, problems, clock
        self._launchers = max(launchers, fewest)
        digest = hashlib.sha256(f"{_user()}/{name}".encode()).hexdigest()
        self._base = f"shoal/present/{digest[:16]}"
        self._me = _Present(socket.gethostname(), folder, path, json.loads(json.dumps(settings)))
        self._number = 0
        self._beats = 0
        self._others: dict[int, _Present] = {}
        self._differing: dict[str, str] = {}  # by host: why it cannot join
        self._odd_since: float | None = None
        self._short_since: float | None = None
        self._looked = -LOOK_SECONDS
        self._calls = TimedCalls()

    def look(self) -> None:
        """
        Compare with the other launchers, at most once a second; for use while waiting for them.

        Raises `LaunchError` if this launcher must not join them, or if too few remain that can.
        """
        now = self._clock()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        if not self._calls.call(lambda: self._exchange(now), False):
            return
        fresh = {number: other for number, other in self._others.items() if other.is_fresh(now)}
        if not self.has_met:
            self._check_folders(fresh.values())
        self._check_settings(fresh, now)
        self._check_number(fresh, now)

    def beat(self) -> None:
        """Show, at most once a second, that this launcher's workers run."""
        now = self._clock()
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            self._calls.call(lambda: self._post("runs"), None)

    def differs(self, host: str, how: str) -> None:
        """Note that a launcher that has already met this one cannot stay, because its settings differ."""
        self._differing[host] = how

    def _post(self, state: str) -> None:
        if not self._number:
            self._number = int(self._store.add(f"{self._base}/count", 1))
            me = self._me
            self._store.set(f"{self._base}/{self._number}", json.dumps([me.host, me.folder, me.path, me.settings]))
        self._beats += 1
        self._store.set(f"{self._base}/{self._number}/beat", f"{state} {self._beats}")

    def _exchange(self, now: float) -> bool:
        """Post this launcher's beat, and read the others'."""
        self._post("runs" if self.has_met else "waits")
        count = int(self._store.add(f"{self._base}/count", 0))
        for number in range(1, count + 1):
            if number == self._number:
                continue
            key = f"{self._base}/{number}"
            if number not in self._others:
                if not self._store.check([f"{key}/beat"]):
                    continue  # between its number and its post
                host, folder, path, settings = json.loads(self._store.get(key))
                self._others[number] = _Present(on_one_line(host), folder, on_one_line(path), settings)
            self._others[number].note_beat(self._store.get(f"{key}/beat"), now)
        return True

    def _check_folders(self, others: Any) -> None:
        """Raise `LaunchError` if another launcher of this run has another folder: the disk is not shared."""
        me = self._me
        for other in others:
            if other.folder == me.folder:
                continue
            if other.path == me.path:
                raise LaunchError(
                    f"{me.path} is not the same folder on {me.host} and {other.host}, so their launchers cannot meet; set "
                    "launch.runs to a folder on a disk that all nodes share"
                )
            if other.settings == me.settings:
                raise LaunchError(
                    f"this run's folder is {me.path} on {me.host} but {other.path} on {other.host}; set launch.runs to the same "
                    "shared folder on all nodes, or choose another --name for a separate run"
                )

    def _check_settings(self, fresh: Mapping[int, _Present], now: float) -> None:
        """
        Note whose settings differ from those of a running launcher or, if none runs, from those that most have.

        Raises `LaunchError` if this launcher is among these for `ODD_SECONDS`, in which others may come that agree with it.
        """
        others = {number: other for number, other in fresh.items() if other.folder == self._me.folder}
        everyone = dict(sorted((others | {self._number: self._me}).items()))
        running = [other for other in others.values() if other.runs]
        usual = list(everyone.values())[most_common([each.settings for each in everyone.values()])]
        right = self._me if self.has_met else [*running, usual][0]
        for number, other in sorted(others.items()):
            if other.settings == right.settings:
                self._differing.pop(other.host, None)
            elif not any(later > number and each.host == other.host for later, each in others.items()):
                self._differing[other.host] = difference(right.settings, other.settings)
        if self._me.settings == right.settings:
            self._odd_since = None
            return
        self._odd_since = self._odd_since or now
        if now - self._odd_since >= ODD_SECONDS:
            raise LaunchError(
                f"this node's settings differ from those of {right.host}: {difference(self._me.settings, right.settings)}; set "
                "the same on all nodes"
            )

    def _check_number(self, fresh: Mapping[int, _Present], now: float) -> None:
        """Raise `LaunchError` if too few nodes were left for `PATIENCE_SECONDS`, because the others cannot join."""
        me = self._me
        found = {**self._problems(), **self._differing}
        there = 1 + sum(o.folder == me.folder and o.settings == me.settings for o in fresh.values())
        if self.has_met or there >= self._fewest or self._launchers - len(found) >= self._fewest:
            self._short_since = None
            return
        self._short_since = self._short_since or now
        if now - self._short_since >= PATIENCE_SECONDS:
            why = "; ".join(f"{host}: {text}" for host, text in sorted(found.items()))
            raise LaunchError(f"{there} of at least {self._fewest} nodes can start. {why}")


def _user() -> str:
    """Return the user's name, or the number in containers without a list of users."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
