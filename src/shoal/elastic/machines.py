"""Messages between a run's launchers during one rendezvous round: their hosts and configs, and the progress of their workers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from torch.distributed.distributed_c10d import Store

from shoal.elastic.agreement import difference, most_common
from shoal.elastic.heartbeat import Sign
from shoal.elastic.timed_calls import TimedCalls
from shoal.elastic.watch import LASTING, RankStatus
from shoal.errors import LaunchError

POST_SECONDS: Final = 1.0


class Machines:
    """
    The machines of one rendezvous round. If the store is lost, queries return defaults.

    store: a store used by this round only. rank: this machine's number, from 0. count: the number of machines.
    """

    def __init__(self, store: Store, rank: int, count: int) -> None:
        self._store, self._rank, self._count = store, rank, count
        self._calls = TimedCalls()
        self.hosts: list[str] = []
        self.differing: dict[str, str] = {}  # by host: how its config differs from the reference
        self._posted = 0.0

    def greet(self, host: str, config: Mapping[str, object], *, stays: bool) -> bool:
        """
        Exchange hosts and configs with all machines; return whether all configs match.

        stays: whether this machine was in the previous round. The reference is the config of the first machine that
        was in the previous round; if none was, the config that most machines have. Raises `LaunchError` if this machine's config differs from the
        reference.
        """
        self._store.set(f"machine/{self._rank}", json.dumps([host, config, stays]))
        found = [json.loads(self._store.get(f"machine/{rank}")) for rank in range(self._count)]
        self.hosts = [name for name, _, _ in found]
        usual = found[most_common([theirs for _, theirs, _ in found])][1]
        right = next((theirs for _, theirs, stayed in found if stayed), usual)
        mine = json.loads(json.dumps(config))
        if mine != right:
            other = next(name for name, theirs, _ in found if theirs == right)
            raise LaunchError(
                f"this node's config differs from that of {other}: {difference(mine, right)}; set the same on all nodes"
            )
        self.differing = {name: difference(right, theirs) for name, theirs, _ in found if theirs != right}
        return not self.differing

    def describe(self, before: Sequence[str] | None, processes: int) -> str:
        """
        Describe the machines, and which left or joined since the previous round.

        before: the hosts of the previous round; None if there was none. processes: the number of workers on all machines.
        """
        text = (
            f"{self._count} node{'s' * (self._count > 1)} ({', '.join(self.hosts)}), "
            f"{processes} process{'es' * (processes > 1)}"
        )
        if before is None:
            return text
        changes = [f"{name} left" for name in before if before.count(name) > self.hosts.count(name)]
        changes += [f"{name} joined" for name in self.hosts if self.hosts.count(name) > before.count(name)]
        return "; ".join([text, *dict.fromkeys(changes)])

    def post(self, statuses: Callable[[], Sequence[RankStatus]]) -> None:
        """Publish the progress of this machine's workers, at most once a second."""
        now = time.monotonic()
        if now - self._posted < POST_SECONDS:
            return
        self._posted = now
        # in time of day, which agrees between machines to within seconds; monotonic clocks do not agree
        began = time.time() - now
        mine = [
            [k.rank, k.sign.step, k.sign.turn, k.sign.phase, began + k.sign.since, k.sign.waits, k.works, k.state]
            for k in statuses()
        ]
        for each in mine:
            # state D is not reported: a process that writes to a disk is in state D for moments
            each[-1] = each[-1] if each[-1] in LASTING else ""
        self._calls.call(lambda: self._store.set(f"looks/{self._rank}", json.dumps(mine)), None)

    def others(self) -> list[RankStatus]:
        """Return the latest status of the other machines' workers, in this machine's monotonic time."""
        now = time.monotonic()
        began = time.time() - now
        keys = [f"looks/{rank}" for rank in range(self._count) if rank != self._rank]
        nothing: list[tuple[str, bytes]] = []
        said = self._calls.call(lambda: [(k, self._store.get(k)) for k in keys if self._store.check([k])], nothing)
        return [
            RankStatus(
                each, Sign(step, turn, phase, min(since - began, now), math.inf, waits), state, self._host(key), works
            )
            for key, text in said
            for each, step, turn, phase, since, waits, works, state in json.loads(text)
        ]

    def _host(self, key: str) -> str:
        return self.hosts[int(key.partition("/")[2])]

    def request_regroup(self) -> None:
        """Announce that workers stop now only to let another machine join."""
        self._calls.call(lambda: self._store.set("regroup", "yes"), None)

    def is_regrouping(self) -> bool:
        """Return whether a launcher called `request_regroup` in this round."""
        return self._calls.call(lambda: bool(self._store.check(["regroup"])), False)

    def announce(self, what: str) -> bool:
        """Announce `what`; return True if no launcher had announced it before in this round."""
        return self._calls.call(lambda: int(self._store.add(f"said/{what}", 1)) == 1, True)

    def was_announced(self, what: str) -> bool:
        """Return whether a launcher announced `what` in this round."""
        return self._calls.call(lambda: bool(self._store.check([f"said/{what}"])), False)
