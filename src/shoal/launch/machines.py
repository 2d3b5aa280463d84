"""What the launchers of a run tell each other while a round of it goes on: names, and how far their workers are."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Final

from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store

from shoal.errors import LaunchError
from shoal.fault.heartbeat import Sign
from shoal.launch.watch import Look

POST_SECONDS: Final = 1.0


class Machines:
    """
    Of one round. `store`: one that is of this round alone; `rank`, `count`: of this machine among them.

    A store that has gone is borne: what is asked of it is not known then.
    """

    def __init__(self, store: Store, rank: int, count: int) -> None:
        self._store, self._rank, self._count = store, rank, count
        self.hosts: list[str] = []
        self._posted = 0.0

    def greet(self, host: str, lock: str) -> list[str]:
        """
        The names of all machines, in the order of their ranks.

        lock: what the lock of the run's folder says here. Raises `LaunchError` where it says something else elsewhere:
        that is another folder of the same name.
        """
        self._store.set(f"machine/{self._rank}", json.dumps([host, lock]))
        found = [json.loads(self._store.get(f"machine/{rank}")) for rank in range(self._count)]
        self.hosts = [name for name, _ in found]
        if others := [name for name, theirs in found if theirs != lock]:
            raise LaunchError(
                f"{host} and {', '.join(others)} have folders of their own where the run is kept; set launch.runs to a folder "
                "that all machines share"
            )
        return self.hosts

    def describe(self, before: Sequence[str] | None, processes: int) -> str:
        """Who takes part, and who did not `before`."""
        text = (
            f"{self._count} machine{'s' * (self._count > 1)} ({', '.join(self.hosts)}), "
            f"{processes} process{'es' * (processes > 1)}"
        )
        if before is None:
            return text
        changes = [f"{name} left" for name in before if before.count(name) > self.hosts.count(name)]
        changes += [f"{name} joined" for name in self.hosts if self.hosts.count(name) > before.count(name)]
        return "; ".join([text, *dict.fromkeys(changes)])

    def post(self, looks: Callable[[], Sequence[Look]]) -> None:
        """Leave for the others how far the workers here are; once a second at most."""
        now = time.monotonic()
        if now - self._posted < POST_SECONDS:
            return
        self._posted = now
        # in the time of day, which machines share but for some seconds; signs are in each machine's own
        began = time.time() - now
        mine = [
            [k.rank, k.sign.step, k.sign.turn, k.sign.phase, began + k.sign.since, k.sign.waits, k.state]
            for k in looks()
        ]
        with contextlib.suppress(DistError):
            self._store.set(f"looks/{self._rank}", json.dumps(mine))

    def others(self) -> list[Look]:
        """What the others left last, as if seen now."""
        now, found = time.monotonic(), []
        began = time.time() - now
        for rank in range(self._count):
            if rank == self._rank:
                continue
            with contextlib.suppress(DistError):
                key = f"looks/{rank}"
                said = json.loads(self._store.get(key)) if self._store.check([key]) else []
                found += [
                    Look(
                        each, Sign(step, turn, phase, min(since - began, now), math.inf, waits), state, self.hosts[rank]
                    )
                    for each, step, turn, phase, since, waits, state in said
                ]
        return found

    def regroup(self) -> None:
        """The round ends so that a machine can join: workers that stop now do so for that."""
        with contextlib.suppress(DistError):
            self._store.set("regroup", "yes")

    def regroups(self) -> bool:
        """Whether somebody said so."""
        try:
            return bool(self._store.check(["regroup"]))
        except DistError:
            return False

    def first_to(self, what: str) -> bool:
        """Whether no other launcher said `what` in this round before."""
        try:
            return int(self._store.add(f"said/{what}", 1)) == 1
        except DistError:
            return True
