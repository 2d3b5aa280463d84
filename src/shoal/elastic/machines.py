"""What the launchers of a run tell each other while a round of it goes on: names, and how far their workers are."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch
from torch.distributed.distributed_c10d import Store

import shoal
from shoal.config.options import Config
from shoal.elastic.heartbeat import Sign
from shoal.elastic.rendezvous import Aside
from shoal.elastic.watch import LASTING, Look
from shoal.errors import LaunchError

POST_SECONDS: Final = 1.0
# Each machine may have its own copy, or its own speed.
_OF_A_PLACE: Final = {
    ("data", "paths"), ("data", "folder"), ("data", "tokenizer"), ("model", "from_"), ("checkpoint", "fast"),
    ("metrics", "peak_tflops"), ("model", "kept"), ("data", "kept"),
}  # fmt: skip


def alike(config: Config) -> dict[str, object]:
    """What has to be the same on all machines: the options but those of places and processes, and the versions."""
    found: dict[str, object] = {"shoal": shoal.__version__, "torch": torch.__version__.partition("+")[0]}
    for section, values in dataclasses.asdict(config).items():
        for key, value in values.items():
            if section != "launch" and (section, key) not in _OF_A_PLACE:
                found[f"{section}.{key}"] = value
    return found


def _difference(mine: Mapping[str, object], theirs: Mapping[str, object]) -> str:
    keys = [key for key in theirs if mine.get(key) != theirs[key]]
    return ", ".join(f"{key} is {mine.get(key)} here and {theirs[key]} there" for key in keys[:4])


class Machines:
    """
    Of one round. `store`: one that is of this round alone; `rank`, `count`: of this machine among them.

    A store that has gone is borne: what is asked of it is not known then.
    """

    def __init__(self, store: Store, rank: int, count: int) -> None:
        self._store, self._rank, self._count = store, rank, count
        self._aside = Aside()
        self.hosts: list[str] = []
        self.others_differ = ""
        self._posted = 0.0

    def greet(self, host: str, config: Mapping[str, object], *, stays: bool) -> bool:
        """
        Learn the names of all machines, in the order of their ranks; whether all have the same config.

        stays: this machine was in the round before, and those decide what is right. Raises `LaunchError` where this
        machine's config is another one than theirs.
        """
        self._store.set(f"machine/{self._rank}", json.dumps([host, config, stays]))
        found = [json.loads(self._store.get(f"machine/{rank}")) for rank in range(self._count)]
        self.hosts = [name for name, _, _ in found]
        right = next((theirs for _, theirs, stayed in found if stayed), found[0][1])
        mine = json.loads(json.dumps(config))
        if mine != right:
            other = next(name for name, theirs, _ in found if theirs == right)
            raise LaunchError(
                f"this machine was started otherwise than {other}: {_difference(mine, right)}; set all alike"
            )
        differing = [name for name, theirs, _ in found if theirs != right]
        self.others_differ = f"{', '.join(differing)} was started otherwise"
        return not differing

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
            [k.rank, k.sign.step, k.sign.turn, k.sign.phase, began + k.sign.since, k.sign.waits, k.works, k.state]
            for k in looks()
        ]
        for each in mine:
            each[-1] = each[-1] if each[-1] in LASTING else ""  # one that writes to a disk is in state D for moments
        self._aside.ask(lambda: self._store.set(f"looks/{self._rank}", json.dumps(mine)), None)

    def others(self) -> list[Look]:
        """What the others left last, as if seen now."""
        now = time.monotonic()
        began = time.time() - now
        keys = [f"looks/{rank}" for rank in range(self._count) if rank != self._rank]
        nothing: list[tuple[str, bytes]] = []
        said = self._aside.ask(lambda: [(k, self._store.get(k)) for k in keys if self._store.check([k])], nothing)
        return [
            Look(each, Sign(step, turn, phase, min(since - began, now), math.inf, waits), state, self._host(key), works)
            for key, text in said
            for each, step, turn, phase, since, waits, works, state in json.loads(text)
        ]

    def _host(self, key: str) -> str:
        return self.hosts[int(key.partition("/")[2])]

    def regroup(self) -> None:
        """The round ends so that a machine can join: workers that stop now do so for that."""
        self._aside.ask(lambda: self._store.set("regroup", "yes"), None)

    def regroups(self) -> bool:
        """Whether somebody said so."""
        return self._aside.ask(lambda: bool(self._store.check(["regroup"])), False)

    def first_to(self, what: str) -> bool:
        """Whether no other launcher said `what` in this round before."""
        return self._aside.ask(lambda: int(self._store.add(f"said/{what}", 1)) == 1, True)

    def was_said(self, what: str) -> bool:
        """Whether a launcher said `what` in this round."""
        return self._aside.ask(lambda: bool(self._store.check([f"said/{what}"])), False)
