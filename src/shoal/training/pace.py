"""Finds stragglers: each rank measures itself, and the first rank compares and reports."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Final

import numpy as np

from shoal.config.options import Config
from shoal.fault.stragglers import Change, Stragglers
from shoal.mesh.ballot import Vote
from shoal.mesh.mesh import GROUPS, Mesh
from shoal.metrics.busy import PARTS, Busy
from shoal.parallel.runnable import Runnable
from shoal.run.console import Console

_WORDS: Final = {
    "data": "its wait for data",
    "forward": "its forward",
    "backward": "its backward",
    "reduce": "its reduction of gradients",
    "optimizer": "its optimizer",
    "between": "its work between steps",
}


class Pace:
    """
    Compares, by phase, the time that each rank takes without waiting for others. All ranks call its methods at the same steps.

    A step's times are part of the next step's ballot, so they need no all-reduce of their own.
    """

    def __init__(
        self, busy: Busy, ranks: Stragglers | None, hosts: Sequence[str], rank: int, phases: Sequence[str],
        scale: float, console: Console, event: Callable[..., None],
    ) -> None:  # fmt: skip
        """
        Store what `open` gathered.

        hosts: host names by rank; empty disables the comparison. phases: the phases that can be compared.
        scale: factor for the times of forward and backward.
        """
        self.busy = busy
        self._ranks, self._hosts, self._rank, self._phases, self._scale = ranks, hosts, rank, phases, scale
        self._console, self._event = console, event

    @classmethod
    def open(cls, config: Config, mesh: Mesh, runnable: Runnable, console: Console, event: Callable[..., None]) -> Pace:
        """Gather the ranks' hosts, and start to measure. A collective over the world."""
        factor = config.fault.straggler_factor
        compares = factor is not None and mesh.world_size > 1
        hosts = mesh.gather_objects(socket.gethostname()) if compares else []
        ranks = None
        if factor is not None and compares and mesh.is_first:
            # Pipeline stages do different work: compare ranks within a stage.
            peers = mesh.layout.groups(*GROUPS["stage"])
            ranks = Stragglers(factor, peers, len(PARTS))
        # Ranks may have one micro-batch fewer than others: scale their times to the largest count.
        most = max(map(len, runnable.slots))
        busy = Busy(mesh.device, runnable.turns, measures=compares, waits=mesh.world_size > 1)
        phases = comparable(config, mesh)
        return cls(busy, ranks, hosts, mesh.place.rank, phases, most / runnable.turns, console, event)

    def vote(self, step: int) -> Vote:
        """
        Return a vote with this rank's seconds by phase in the last step.

        It has one number per rank and phase, zero for other ranks, so that the sum has the times of all ranks.
        """
        numbers = [0.0] * (len(self._hosts) * len(PARTS))
        seconds = self.busy.seconds()
        for place, phase in enumerate(PARTS if numbers else ()):
            if phase in self._phases:
                scale = self._scale if phase in ("forward", "backward") else 1.0
                numbers[self._rank * len(PARTS) + place] = scale * seconds.get(phase, 0.0)
        return Vote(numbers, lambda sums: self._compare(step - 1, sums))

    def _compare(self, step: int, seconds: Sequence[float]) -> None:
        """Report stragglers in `step`. seconds: [ranks * parts], flattened."""
        if self._ranks is None or not seconds:
            return
        changes = self._ranks.look(step, np.array(seconds).reshape(len(self._hosts), len(PARTS)))
        for (rank, is_slow), group in groupby(
            sorted(changes, key=lambda c: (c.rank, not c.is_slow)), lambda c: (c.rank, c.is_slow)
        ):
            self._tell(rank, is_slow, list(group))

    def _tell(self, rank: int, is_slow: bool, changes: Sequence[Change]) -> None:
        """Report a rank that became slow, or is not slow any more."""
        worst = changes[0]
        takes = "; ".join(
            f"{_WORDS[PARTS[c.phase]]} takes {_short(c.seconds)}, the others' {_short(c.others)}" for c in changes
        )
        steps = f"steps {worst.steps[0]} to {worst.steps[1]}"
        tell = self._console.warn if is_slow else self._console.note
        tell(f"rank {rank} ({self._hosts[rank]}) {'is slow' if is_slow else 'keeps pace again'}: {takes} ({steps})")
        for c in changes:
            self._event(
                "straggler" if is_slow else "keeps pace", step=c.steps[1], rank=rank, host=self._hosts[rank],
                phase=PARTS[c.phase], seconds=round(c.seconds, 6), others_seconds=round(c.others, 6), since=c.steps[0],
            )  # fmt: skip

    def close(self) -> None:
        """Stop measuring. May be called twice."""
        self.busy.close()


def comparable(config: Config, mesh: Mesh) -> list[str]:
    """
    Return the phases in which a rank's own time can be separated from its waiting, and all ranks have equal work.

    On CUDA a stream waits inside a collective, and events around it include the wait: phases with collectives are excluded.
    """
    inside = set()
    if mesh.device.type == "cuda":
        inside.add("reduce")
        if mesh.layout.sharded or mesh.layout.cp > 1:
            inside |= {"forward", "backward"}
        if mesh.layout.sharded or config.train.repro == "bitwise":
            inside.add("optimizer")  # it includes the all-reduce of the gradient norm
    if config.optim.name == "muon":
        inside.add("optimizer")  # each matrix has one owner rank, and some own more than others
    return [phase for phase in PARTS if phase not in inside]


def _short(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"
