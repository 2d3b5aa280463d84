"""Who keeps the others waiting: each process measures itself, and the first one compares and says it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Final

import numpy as np

from shoal.config.options import Config
from shoal.fault.stragglers import Change, Stragglers
from shoal.mesh.mesh import Mesh
from shoal.metrics.busy import PHASES, Busy
from shoal.parallel.runnable import Runnable
from shoal.run.console import Console

_WORDS: Final = {
    "data": "its wait for data",
    "forward": "its forward",
    "backward": "its backward",
    "reduce": "its share of the sums",
    "optimizer": "its optimizer",
    "between": "what it does between steps",
}


class Pace:
    """
    Its methods are called by all processes at the same steps. What each was busy with in a step travels with the votes of
    the next one, in a sum that is taken anyway.
    """

    def __init__(
        self, busy: Busy, ranks: Stragglers | None, hosts: Sequence[str], rank: int, phases: Sequence[str],
        scale: float, console: Console, event: Callable[..., None],
    ) -> None:  # fmt: skip
        """hosts: by rank; empty: nothing is compared. phases: those that can be; scale: of forward and backward."""
        self.busy = busy
        self._ranks, self._hosts, self._rank, self._phases, self._scale = ranks, hosts, rank, phases, scale
        self._console, self._event = console, event

    @classmethod
    def open(cls, config: Config, mesh: Mesh, runnable: Runnable, console: Console, event: Callable[..., None]) -> Pace:
        """A collective over the world."""
        factor = config.fault.straggler_factor
        compares = factor is not None and mesh.world_size > 1
        hosts = mesh.gather_objects(socket.gethostname()) if compares else []
        ranks = None
        if factor is not None and compares and mesh.is_first:
            # the stages of a pipeline do different work: each rank is compared with those at its own
            peers = mesh.layout.groups("dp_replicate", "dp_shard", "cp", "tp")
            ranks = Stragglers(factor, peers, len(PHASES))
        # where some have a micro-batch more than others, as if all had as many
        most = max(map(len, runnable.slots))
        busy = Busy(mesh.device, runnable.turns, measures=compares)
        phases = comparable(config, mesh)
        return cls(busy, ranks, hosts, mesh.place.rank, phases, most / runnable.turns, console, event)

    @property
    def size(self) -> int:
        """How many votes there are."""
        return len(self._hosts) * len(PHASES)

    def votes(self) -> list[float]:
        """A place for each process and phase, of which this one fills its own: the sum over the world has all of them."""
        votes = [0.0] * self.size
        seconds = self.busy.seconds()
        for place, phase in enumerate(PHASES if votes else ()):
            if phase in self._phases:
                scale = self._scale if phase in ("forward", "backward") else 1.0
                votes[self._rank * len(PHASES) + place] = scale * seconds.get(phase, 0.0)
        return votes

    def settle(self, votes: Sequence[float], step: int) -> None:
        """Say what the sum of the votes that were cast in `step` comes to."""
        if self._ranks is None or not votes:
            return
        changes = self._ranks.look(step - 1, np.array(votes).reshape(len(self._hosts), len(PHASES)))
        for (rank, is_slow), group in groupby(
            sorted(changes, key=lambda c: (c.rank, not c.is_slow)), lambda c: (c.rank, c.is_slow)
        ):
            self._tell(rank, is_slow, list(group))

    def _tell(self, rank: int, is_slow: bool, changes: Sequence[Change]) -> None:
        worst = changes[0]
        takes = "; ".join(
            f"{_WORDS[PHASES[c.phase]]} takes {_short(c.seconds)}, the others' {_short(c.others)}" for c in changes
        )
        steps = f"steps {worst.steps[0]} to {worst.steps[1]}"
        tell = self._console.warn if is_slow else self._console.note
        tell(f"rank {rank} ({self._hosts[rank]}) {'is slow' if is_slow else 'keeps pace again'}: {takes} ({steps})")
        for c in changes:
            self._event(
                "straggler" if is_slow else "keeps pace", step=c.steps[1], rank=rank, host=self._hosts[rank],
                phase=PHASES[c.phase], seconds=round(c.seconds, 6), others_seconds=round(c.others, 6), since=c.steps[0],
            )  # fmt: skip

    def close(self) -> None:
        """May be called twice."""
        self.busy.close()


def comparable(config: Config, mesh: Mesh) -> list[str]:
    """
    The phases in which a process's own time can be told from its waiting, and is the same work for all.

    On CUDA a stream waits in a collective, and events around it count that: what has one inside is left out.
    """
    inside = set()
    if mesh.device.type == "cuda":
        inside.add("reduce")
        if mesh.layout.sharded or mesh.layout.cp > 1:
            inside |= {"forward", "backward"}
        if mesh.layout.sharded or config.train.repro == "bitwise":
            inside.add("optimizer")  # the gradient's norm
    if config.optim.name == "muon":
        inside.add("optimizer")  # a matrix has one owner: some own more than others
    return [phase for phase in PHASES if phase not in inside]


def _short(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"
