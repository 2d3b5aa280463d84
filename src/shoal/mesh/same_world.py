"""
Ranks that torchrun, srun or a user started check that they belong to one world, before they join it.

Otherwise ranks that disagree about the world's size would wait for each other until the timeout, and ranks with other code or
another config would train something else.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch.distributed.distributed_c10d import Store

from shoal.errors import LaunchError
from shoal.mesh.place import Place
from shoal.system.output import on_one_line

POLL_SECONDS: Final = 0.05
READ_SECONDS: Final = 10.0  # rank 0, which may serve the store, waits this long until the others have read its verdict
_BASE: Final = "shoal/world"


@dataclass(frozen=True)
class _Rank:
    """What a process posts about itself."""

    rank: int
    world_size: int
    host: str
    settings: dict[str, Any]

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


def check_same_world(store: Store, place: Place, settings: Mapping[str, object], timeout_seconds: float) -> None:
    """
    Raise `LaunchError` on all ranks if they disagree, or if some do not come within `timeout_seconds`.

    store: a store that no other world uses. settings: what must be the same on all ranks. A collective over the world.
    """
    text = json.dumps([place.rank, place.world_size, socket.gethostname(), settings])
    number = int(store.add(f"{_BASE}/count", 1))
    store.set(f"{_BASE}/{number}", text)
    if place.rank == 0:
        problem = _judge(store, number, _read(text), timeout_seconds)
    else:
        problem = _await_verdict(store, timeout_seconds)
    if problem:
        raise LaunchError(problem)


def _judge(store: Store, number: int, me: _Rank, timeout_seconds: float) -> str:
    """Compare the other ranks with rank 0, `me`, as they come, and post the verdict: "" if all are there and agree."""
    ranks = {0: me}
    problem: str | None = None
    next_ = 1

    def is_decided() -> bool:
        nonlocal problem, next_
        count = int(store.add(f"{_BASE}/count", 0))
        while problem is None and next_ <= count and store.check([f"{_BASE}/{next_}"]):
            if next_ != number:
                other = _read(store.get(f"{_BASE}/{next_}"))
                problem = _disagreement(me, other, ranks.get(other.rank))
                ranks[other.rank] = other
            next_ += 1
        if problem is None and len(ranks) == me.world_size:
            problem = ""
        return problem is not None

    if not _poll(is_decided, timeout_seconds):
        missing = sorted(set(range(me.world_size)) - ranks.keys())
        named = ", ".join(map(str, missing[:8])) + ", ..." * (len(missing) > 8)
        problem = (
            f"not all ranks joined within {timeout_seconds:.0f} s: of WORLD_SIZE {me.world_size}, {named} did not; start shoal "
            "once for each rank, and check that MASTER_ADDR and MASTER_PORT are the same for all and reach rank 0's node"
        )
    store.set(f"{_BASE}/verdict", problem or "")
    others = int(store.add(f"{_BASE}/count", 0)) - 1
    _poll(lambda: int(store.add(f"{_BASE}/read", 0)) >= others, READ_SECONDS if problem else timeout_seconds)
    return problem or ""


def _await_verdict(store: Store, timeout_seconds: float) -> str:
    """Return rank 0's verdict."""
    if not _poll(lambda: bool(store.check([f"{_BASE}/verdict"])), timeout_seconds + READ_SECONDS):
        return f"rank 0 did not join within {timeout_seconds:.0f} s; start shoal once for each rank from 0 to WORLD_SIZE - 1"
    problem = store.get(f"{_BASE}/verdict").decode()
    store.add(f"{_BASE}/read", 1)
    return problem


def _read(text: bytes | str) -> _Rank:
    rank, world_size, host, settings = json.loads(text)
    return _Rank(rank, world_size, on_one_line(host), settings)


def _disagreement(me: _Rank, other: _Rank, twin: _Rank | None) -> str | None:
    """Return how `other` disagrees with rank 0, `me`. twin: another process of the same rank, if there is one."""
    if other.world_size != me.world_size:
        return f"WORLD_SIZE is {other.world_size} for {other} but {me.world_size} for {me}; set the same for all ranks"
    if twin is not None:
        return f"two processes are rank {other.rank}, on {twin.host} and {other.host}; give each process its own RANK"
    keys = [key for key in me.settings if other.settings.get(key) != me.settings[key]]
    named = [f"{key} is {other.settings.get(key)} for {other} but {me.settings[key]} for {me}" for key in keys[:4]]
    return f"{', '.join(named)}; set the same on all nodes" if named else None


def _poll(is_true: Callable[[], bool], seconds: float) -> bool:
    """Wait until `is_true()`, at most for `seconds`; return whether it was."""
    end = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_SECONDS)
    return True
