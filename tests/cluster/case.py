"""
Plans of cluster faults for a small run in jobs of a real Slurm: pure functions of a seed.

A fault comes some steps after the run has recovered from the one before it. `trial.py` makes them happen.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

# Fault -> what happens if it is short, and if it is long. Most long ones last until the run or Slurm has noticed.
FAULTS: Final[dict[str, tuple[str, str]]] = {
    "slurmd killed": ("slurmd starts again at once", "Slurm finds the node down and requeues the job"),
    "node off": ("the operator sets the node down", "Slurm finds the node down"),
    "node drained": ("the job is requeued by shoal launch requeue", "by scontrol requeue"),
    "link down": ("for a second", "until a launcher or Slurm has noticed"),
    "partition": ("for a second", "until a launcher has noticed"),
    "signal": ("to the batch script, as before its limit", "to one launcher"),
    "requeue": ("by shoal launch requeue", "by scontrol requeue, which kills"),
    "disk full": ("while the run computes", "while the run is signaled and saves"),
    "wrong host name": ("of the first node, and a requeue", "of another node, and a requeue"),
    "launcher killed": ("on the first node", "on another node"),
    "controller restarted": ("while the run computes", "stopped while the launchers are signaled and end"),
}
# Those that cost no wait for Slurm's own time limits
QUICK: Final = ("signal", "requeue", "disk full", "node drained", "wrong host name", "controller restarted")
SHAPES: Final = ((2, None), (3, None), (3, 2))  # nodes of the job, and launch.min_nodes
COUNT: Final = 5  # faults of a run
_SOON, _LATE = 3, 12  # steps between a recovery and the next fault


@dataclass(frozen=True)
class Fault:
    """One fault. after: steps since the run has recovered. node: which of the job's nodes, if it is on one."""

    kind: str
    long: bool = False
    after: int = _SOON
    node: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{f' on its node {self.node}' if self.node else ''}: {FAULTS[self.kind][self.long]}"


@dataclass(frozen=True)
class Case:
    """A run on `nodes` nodes, which may continue on `min_nodes` or with one of `spares`, and its faults in order."""

    nodes: int
    min_nodes: int | None
    faults: tuple[Fault, ...]
    spares: int = 0

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Case:
        """Return the case that `plain` was made from with `dataclasses.asdict`."""
        return cls(**{**plain, "faults": tuple(Fault(**fault) for fault in plain["faults"])})

    @property
    def plain(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def alone(self) -> Iterator[Case]:
        """Yield a case for each fault alone."""
        return (dataclasses.replace(self, faults=(fault,)) for fault in self.faults)

    def __str__(self) -> str:
        least = f", at least {self.min_nodes}" if self.min_nodes else ""
        spare = f", {self.spares} spare" if self.spares else ""
        return f"{self.nodes} nodes{least}{spare}; {'; '.join(map(str, self.faults))}"


def drawn(seed: int, count: int = COUNT) -> Case:
    """Return a case of `count` random faults, the same for the same seed on any machine."""
    draw = random.Random(seed)
    nodes, least = draw.choice(SHAPES)
    faults = []
    for _ in range(count):
        kind, long = draw.choice(sorted(FAULTS)), draw.random() < 0.5
        faults.append(Fault(kind, long, draw.randint(_SOON, _LATE), _node(kind, long, nodes, draw)))
    return Case(nodes, least, tuple(faults))


def _node(kind: str, long: bool, nodes: int, draw: random.Random) -> int:
    node = draw.randrange(nodes)
    if kind in ("wrong host name", "launcher killed"):
        return 1 + node % (nodes - 1) if long else 0
    return node


def few() -> Case:
    """Return the case that tests run: six faults that take no more time than restarts of the job."""
    return Case(2, None, tuple(Fault(kind, long=kind == "requeue") for kind in QUICK))
