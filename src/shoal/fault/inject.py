"""
Faults on purpose, for the tests that show what a run lives through: nothing happens unless a plan is set.

A plan is JSON in the environment's SHOAL_FAULTS: a list of {"step", "phase", "rank", "fault", "life"}. A process comes to
a phase (see `PHASES`) of a step, and where the plan has a fault there, it happens once: `life` counts the starts of the
run, from 0, so that a fault does not come again when the step is taken again.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from shoal.parallel.region import Shard

PLAN: Final = "SHOAL_FAULTS"
LIFE: Final = "TORCHELASTIC_RESTART_COUNT"
PHASES: Final = (
    "load", "data", "forward", "backward", "reduce", "optimizer", "stage", "write", "manifest", "rename", "retention",
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """What happens to a process when it comes to a phase of a step."""

    step: int
    phase: str
    rank: int
    fault: str
    life: int = 0


class PlannedError(Exception):
    """The exception of the fault "exception"."""


class Faults:
    """The faults of this process."""

    def __init__(self, rank: int, environment: Mapping[str, str] = os.environ) -> None:
        life = int(environment.get(LIFE, "0"))
        planned = [Fault(**each) for each in json.loads(environment.get(PLAN, "[]"))]
        self._left = [f for f in planned if f.rank == rank and f.life == life]
        self.step = 0
        self.targets: dict[str, Callable[[], None]] = {}
        """What is done for a fault that is none of `HAPPENS`: it concerns what only the run knows."""

    def at(self, phase: str) -> None:
        """This process comes to `phase` of its `step`."""
        for fault in self._left:
            if (fault.step, fault.phase) == (self.step, phase):
                self._left.remove(fault)
                (HAPPENS | self.targets)[fault.fault]()
                return


def poison(parts: Iterable[nn.Module], faults: Faults) -> None:
    """What the first block gives is no number, in this step."""
    step = faults.step
    block = next(m for part in parts for n, m in part.named_modules() if n.removeprefix("blocks.").isdigit())

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        if faults.step == step:
            return output * float("nan")
        handle.remove()
        return output

    handle = block.register_forward_hook(hook)


def flip(shards: Sequence[Shard]) -> None:
    """One bit of one weight that this process holds."""
    words = shards[len(shards) // 2].tensor.detach().view(torch.int32).view(-1)
    words[len(words) // 2] ^= 1 << 20


def _raise() -> None:
    raise PlannedError("a fault that was planned")


HAPPENS: Final[dict[str, Callable[[], None]]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "exception": _raise,
}
