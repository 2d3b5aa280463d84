"""A fault at a moment of a small run, and what must come of it: a pure function of a seed."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Final

STEPS: Final = 12
SAVE_EVERY: Final = 3

# phase -> what can go wrong there
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
    "write": ("kill", "full", "hang"),
    "manifest": ("kill", "full"),
    "rename": ("kill", "full"),
    "retention": ("kill", "full", "tear"),
}
OF_FIRST_RANK: Final = ("manifest", "rename", "retention")
BEFORE_STEPS: Final = ("rendezvous", "load")


@dataclass(frozen=True)
class Case:
    """
    One fault; and after a restart (`again`), perhaps the same once more while the workers start anew.

    processes: data parallel, of one thread each.
    """

    processes: int
    step: int
    phase: str
    rank: int
    fault: str
    again: bool = False

    @property
    def plan(self) -> list[dict[str, object]]:
        first = {"step": self.step, "phase": self.phase, "rank": self.rank, "fault": self.fault}
        more = [{"step": 0, "phase": "load", "rank": 0, "fault": "kill", "life": 1}] if self.again else []
        return [first, *more]

    @property
    def restarts(self) -> bool:
        """Whether the workers are started anew: not for what the run mends by itself."""
        return self.fault not in ("nan", "flip", "full")

    def __str__(self) -> str:
        again = ", and again while it restarts" if self.again else ""
        return f"{self.fault} in {self.phase} of step {self.step} on rank {self.rank} of {self.processes}{again}"


def every_fault() -> list[Case]:
    """Each fault in each phase once, on two processes."""
    cases = [
        Case(2, 0 if phase in BEFORE_STEPS else 5, phase, 0 if phase in OF_FIRST_RANK else 1, fault)
        for phase, faults in POSSIBLE.items()
        for fault in faults
    ]
    return [*cases, dataclasses.replace(cases[0], phase="forward", step=8, again=True)]


def drawn(seed: int) -> Case:
    """A case by chance, the same for the same seed on any machine."""
    draw = random.Random(seed)
    phase = draw.choice(sorted(POSSIBLE))
    fault = draw.choice(POSSIBLE[phase])
    processes = 3 if fault == "flip" else draw.choice((2, 3, 4))
    rank = 0 if phase in OF_FIRST_RANK else draw.randrange(processes)
    step = 0 if phase in BEFORE_STEPS else draw.randrange(1, STEPS)
    case = Case(processes, step, phase, rank, fault)
    return dataclasses.replace(case, again=case.restarts and draw.random() < 0.2)
