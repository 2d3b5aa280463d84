"""
Planned faults, for tests of recovery: without a plan nothing happens.

A plan is JSON in the environment variable SHOAL_FAULTS: a list of {"step", "phase", "rank", "fault", "life"}. A fault happens
once, when its rank reaches its phase (see `POINTS`) in that step or a later one; an event "fault" is recorded just before.
`life` counts the starts of the run's workers from 0, so a fault does not recur when the step is repeated.

The fault "slow" also has "seconds" and "steps": it delays its phase by "seconds" in each of "steps" steps. It records no event.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from shoal.mesh.region import Shard
from shoal.run.events import Events
from shoal.run.phases import PHASES

PLAN: Final = "SHOAL_FAULTS"
LIFE: Final = "TORCHELASTIC_RESTART_COUNT"
POINTS: Final = (
    "rendezvous", "load", "read", *PHASES, "stage", "write", "manifest", "rename", "retention",
)  # fmt: skip


@dataclass(frozen=True)
class Injected:
    """A planned fault of one rank in one phase of a step."""

    step: int
    phase: str
    rank: int
    fault: str
    life: int = 0
    seconds: float = 0.0  # delay by "slow", in each of `steps` steps
    steps: int = 1


class PlannedError(Exception):
    """Raised by the fault "exception"."""


class Faults:
    """The planned faults of this process. events: the run's event file."""

    def __init__(self, rank: int, events: Path, environment: Mapping[str, str] = os.environ) -> None:
        life = int(environment.get(LIFE, "0"))
        planned = [Injected(**each) for each in json.loads(environment.get(PLAN, "[]"))]
        self.planned = bool(planned)  # for any rank
        self._left = [f for f in planned if f.rank == rank and f.life == life]
        self._events = events
        self._lock = threading.Lock()  # saves and the loader run in other threads
        self.step = 0
        self.targets: dict[str, Callable[[], None]] = {}
        """Functions that cause the faults not in `HAPPENS`, by fault: they need parts of the run."""

    def enter(self, phase: str) -> None:
        """Cause the faults planned where `phase` begins."""
        self.at(phase)

    def leave(self, phase: str) -> None:
        """Do nothing: faults happen where a phase begins."""

    def at(self, phase: str) -> None:
        """Cause the fault planned at `phase`, if one is due."""
        if not self._left:
            return
        with self._lock:
            due = next((f for f in self._left if f.phase == phase and f.step <= self.step), None)
            if due is not None:
                self._left.remove(due)
                if due.steps > 1:
                    self._left.append(dataclasses.replace(due, step=self.step + 1, steps=due.steps - 1))
        if due is not None and due.fault == "slow":
            threading.Event().wait(due.seconds)
        elif due is not None:
            events = Events(self._events)  # any rank may write this line
            events.say("fault", **dataclasses.asdict(due), came=self.step)
            events.close()
            (HAPPENS | self.targets)[due.fault]()


def poison(parts: Iterable[nn.Module], faults: Faults) -> None:
    """Make the first block's output NaN in this step."""
    step = faults.step
    block = next(m for part in parts for n, m in part.named_modules() if n.removeprefix("blocks.").isdigit())

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        if faults.step == step:
            return output * float("nan")
        handle.remove()
        return output

    handle = block.register_forward_hook(hook)


def flip(shards: Sequence[Shard]) -> None:
    """Flip one bit of one weight held by this process."""
    words = shards[len(shards) // 2].tensor.detach().view(torch.int32).view(-1)
    words[len(words) // 2] ^= 1 << 20


def tear(checkpoints: Path) -> None:
    """Truncate a shard of the newest checkpoint, as a power cut does on a disk that lied about flushing; kill this process."""
    newest = max(checkpoints.glob("step-*/*.safetensors"), default=None)
    if newest is not None:
        os.truncate(newest, newest.stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)


def _raise() -> None:
    raise PlannedError("a planned fault")


def _hang() -> None:
    threading.Event().wait()


def _fill() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _cut() -> None:
    """Close all network connections of this process, as a failing switch would."""
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        try:
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                with socket.socket(fileno=os.dup(descriptor)) as connection:
                    if connection.family in (socket.AF_INET, socket.AF_INET6):
                        connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # it listens, or is closed already
            continue


HAPPENS: Final[dict[str, Callable[[], None]]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "hang": _hang,
    "exception": _raise,
    "full": _fill,
    "cut": _cut,
}
