"""
Plans of faults for a small run, and their expected events: pure functions of a seed.

Most of a fault's cost is restarting the workers, so each run has many faults. A fault that ends the workers ends a "life",
and later faults are planned for the next life. Faults that the run repairs without a restart do not end a life.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from shoal.fault.inject import Injected

STEPS: Final = 112
SAVE_EVERY: Final = 4
GAP: Final = 9  # minimum steps between faults: the reader is 3 steps ahead, and a save takes a few
MOST: Final = 9  # maximum faults per run, so that good saves can follow the last one

# phase -> possible faults
_DIES: Final = ("kill", "exception")
_STEP: Final = (*_DIES, "stop", "hang", "cut")
POSSIBLE: Final[dict[str, tuple[str, ...]]] = {
    "rendezvous": _DIES,
    "load": (*_DIES, "stop"),
    "read": ("exception", "hang"),  # in the loader's thread
    "data": _STEP,
    "forward": (*_STEP, "nan"),
    "backward": _STEP,
    "reduce": _STEP,
    "optimizer": (*_STEP, "flip"),
    "stage": (*_DIES, "full"),
    "write": (*_DIES, "full", "hang"),
    "manifest": (*_DIES, "full"),
    "rename": (*_DIES, "full"),
    "retention": ("kill", "full", "tear"),
}
SAVES: Final = ("stage", "write", "manifest", "rename", "retention")
OF_FIRST_RANK: Final = ("manifest", "rename", "retention")
BEFORE_STEPS: Final = ("rendezvous", "load")
_EVENTS: Final = {
    "kill": "crashed", "exception": "crashed", "cut": "crashed", "tear": "crashed", "stop": "hang", "hang": "hang",
    "nan": "left out", "flip": "corrupted", "full": "save failed",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A data-parallel run of `processes` with one thread each, and its faults in order."""

    processes: int
    faults: tuple[Injected, ...]

    @property
    def plan(self) -> list[dict[str, object]]:
        return [dataclasses.asdict(fault) for fault in self.faults]

    @property
    def must_say(self) -> Counter[str]:
        """The number of times that each event must appear in `events.jsonl`."""
        return Counter(event for fault in self.faults if (event := said_of(fault.phase, fault.fault)))

    def alone(self) -> Iterator[Case]:
        """Yield a case for each fault alone."""
        return (Case(self.processes, (dataclasses.replace(fault, life=0),)) for fault in self.faults)

    @property
    def command(self) -> str:
        """The command that runs this case alone."""
        return f"python scripts/chaos.py --processes {self.processes} --plan '{json.dumps(self.plan)}'"

    def __str__(self) -> str:
        return f"{self.processes} processes: {', '.join(map(in_words, self.faults))}"


def in_words(fault: Injected) -> str:
    again = f" of life {fault.life}" if fault.life else ""
    where = f"of step {fault.step}" if fault.step else "before the first step"
    return f"{fault.fault} in {fault.phase} {where} on rank {fault.rank}{again}"


def said_of(phase: str, fault: str) -> str | None:
    """Return the event that a fault causes; None if it causes none."""
    if phase in SAVES and fault in ("full", "exception"):
        return None if phase == "retention" else "save failed"
    return "loader restarted" if phase == "read" else _EVENTS[fault]


def ends_the_workers(phase: str, fault: str) -> bool:
    return said_of(phase, fault) in ("crashed", "hang")


@dataclass(frozen=True)
class _Drawn:
    """A fault before `arrange` gives it a step and a life."""

    phase: str
    fault: str
    rank: int

    @property
    def ends_the_workers(self) -> bool:
        return ends_the_workers(self.phase, self.fault)

    @property
    def lasts(self) -> bool:
        """Whether the fault hangs a save: this is detected only at the end of the run, and blocks other saves until then."""
        return self.phase in SAVES and self.fault == "hang"

    @property
    def is_late(self) -> bool:
        """Whether the fault disturbs a save but ends no worker. Such faults come last, so that no other interrupts the save."""
        return self.phase in SAVES and not self.ends_the_workers


def arrange(processes: int, drawn: Sequence[_Drawn], jitter: Sequence[int] = ()) -> Case:
    """
    Order the faults so that each one happens, and give them lives and increasing steps.

    A fault before the first step happens in the restart after a fault that ends the workers. If it is the first one drawn, or
    no such restart is left for it, it happens at the start of the run. jitter: number of steps added to each gap.
    """
    waiting = [d for d in drawn if d.phase in BEFORE_STEPS]
    order = [waiting.pop(0)] if drawn[0] in waiting else []
    for each in (d for d in drawn if d.phase not in BEFORE_STEPS and not d.is_late and not d.lasts):
        order.append(each)
        if each.ends_the_workers and waiting:
            order.append(waiting.pop(0))
    order = [*waiting, *order, *(d for d in drawn if d.lasts), *(d for d in drawn if d.is_late)]
    faults, step, life = [], 0, 0
    for number, each in enumerate(order):
        if each.phase not in BEFORE_STEPS:
            step += GAP + (jitter[number] if jitter else 0)
        faults.append(Injected(0 if each.phase in BEFORE_STEPS else step, each.phase, each.rank, each.fault, life))
        life += each.ends_the_workers
    return Case(processes, tuple(faults))


def few() -> list[Case]:
    """Return a few cases with each kind of fault: deaths, hangs, damage and NaN."""
    dies = [_Drawn("backward", "kill", 1), _Drawn("forward", "nan", 1), _Drawn("load", "kill", 0)]
    damaged = [_Drawn("retention", "tear", 0), _Drawn("write", "full", 1), _Drawn("stage", "exception", 0)]
    hangs = [_Drawn("reduce", "stop", 0), _Drawn("read", "hang", 1), _Drawn("write", "kill", 1)]
    flips = [_Drawn("optimizer", "flip", 1), _Drawn("reduce", "cut", 2), _Drawn("read", "exception", 0)]
    return [arrange(2, dies + damaged), arrange(3, flips + hangs)]


def others() -> list[Case]:
    """Return cases that have each pair of phase and fault once, except those in `few`."""
    done = {(fault.phase, fault.fault) for case in few() for fault in case.faults}
    left = [
        _Drawn(phase, fault, 0 if phase in OF_FIRST_RANK else number % 2)
        for phase, faults in POSSIBLE.items()
        for number, fault in enumerate(faults)
        if (phase, fault) not in done
    ]
    runs = -(-len(left) // MOST)
    return [arrange(2, left[number::runs]) for number in range(runs)]


def drawn(seed: int, count: int = 5) -> Case:
    """Return a case of `count` random faults, the same for the same seed on any machine."""
    draw = random.Random(seed)
    processes = draw.choice((2, 3, 4))
    found: list[_Drawn] = []
    while len(found) < count:
        phase = draw.choice(sorted(POSSIBLE))
        fault = draw.choice(POSSIBLE[phase])
        found.append(_Drawn(phase, fault, 0 if phase in OF_FIRST_RANK else draw.randrange(processes)))
    if any(each.fault == "flip" for each in found) and processes == 2:
        processes = 3  # with two replicas, nothing shows which one is right
    return arrange(processes, found, [draw.randrange(4) for _ in found])
