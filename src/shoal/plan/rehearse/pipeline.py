"""The order in which a rank of a pipeline runs the forwards and backwards of its stages, as torch's schedules do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from shoal.config.schedules import Schedule
from shoal.plan.rehearse.tape import Space


class Action(NamedTuple):
    """The forward or backward of a micro-batch through one of this rank's stages, counted from 0."""

    forward: bool
    stage: int
    micro_batch: int


def actions(schedule: Schedule, pp: int, stages: int, rank: int, micro_batches: int) -> Iterator[Action]:
    """
    Yield a rank's actions in order. stages: per rank.

    gpipe, 1f1b and interleaved_1f1b as in `torch.distributed.pipelining.schedules` (2.13). The V schedules hold as many forwards
    at a time as 1f1b does (Qi et al. 2024, arXiv:2401.10241, section 6), and are counted so.
    """
    total = stages * micro_batches
    match schedule:
        case "gpipe":
            ahead = total
        case "interleaved_1f1b":
            rounds = max(1, micro_batches // pp)
            ahead = min(total, (stages - 1) * (micro_batches // rounds) + 2 * (pp - 1 - rank))
        case "1f1b":
            ahead = min(total, pp - 1 - rank)
        case _:
            ahead = min(total, 2 * pp - 1)
    forwards, backwards = _order(pp, stages, micro_batches), _order(pp, stages, micro_batches, back=True)
    for _ in range(ahead):
        yield Action(True, *next(forwards))
    for stage, number in forwards:
        yield Action(True, stage, number)
        yield Action(False, *next(backwards))
    for stage, number in backwards:
        yield Action(False, stage, number)


def _order(pp: int, stages: int, micro_batches: int, *, back: bool = False) -> Iterator[tuple[int, int]]:
    """Yield (stage of this rank, micro-batch) in rounds of `pp` micro-batches; backward takes the stages in reverse."""
    for first in range(0, micro_batches, pp):
        for stage in reversed(range(stages)) if back else range(stages):
            for number in range(first, min(first + pp, micro_batches)):
                yield stage, number


class Sent:
    """
    Tensors that torch's schedules keep alive after they were sent, or passed to the loss.

    Each has variables that refer to its last messages; all but 1f1b keep all messages of a step. waits: whether to wait for a message
    drops it, as with NCCL; gloo's messages refer to their tensor until nothing refers to them.
    """

    def __init__(self, schedule: Schedule, *, waits: bool) -> None:
        self.keeps_all = schedule != "1f1b"
        self._waits = waits
        self._all: list[Space] = []
        self._last: Space | None = None  # what the last forward returned
        self._warm: Space | None = None  # the last message of the warm-up that was not sent together with another
        self._gradient: Space | None = None
        self._is_warm, self._cools = True, False

    def forward(self, out: Space, *, leaves: bool) -> None:
        """Keep what a forward returned. leaves: whether it is sent."""
        if self.keeps_all and leaves:
            self._all.append(out)
        if self._is_warm and not self._waits:
            self._warm = self._last
        self._last, self._cools = out, False

    def backward(self) -> None:
        """Begin a backward: two in a row end the steady phase of 1f1b."""
        if self._cools:
            self._warm = None
        self._is_warm, self._cools = False, True

    def gradient(self, grad: Space) -> None:
        """Keep the gradient that a backward found for the stage before."""
        self._gradient = grad
        if self.keeps_all:
            self._all.append(grad)
