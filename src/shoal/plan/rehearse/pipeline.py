"""The order in which a rank of a pipeline runs the forwards and backwards of its stages, as torch's schedules do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from shoal.config.schedules import V_SHAPED, Schedule
from shoal.plan.rehearse.tape import Space


class Action(NamedTuple):
    """The forward or backward of a micro-batch through one of this rank's stages, counted from 0."""

    forward: bool
    stage: int
    micro_batch: int


def actions(schedule: Schedule, pp: int, stages: int, rank: int, micro_batches: int) -> Iterator[Action]:
    """
    Yield a rank's actions in order. stages: per rank.

    As in `torch.distributed.pipelining.schedules` (2.13), but for dualpipev, which is counted like zbv, and the gradients of weights,
    which the V schedules compute after all others, at the end of the pipeline several micro-batches later.
    """
    if schedule in V_SHAPED:
        yield from _v_shaped(pp, rank, micro_batches)
        return
    total = stages * micro_batches
    match schedule:
        case "gpipe":
            ahead = total
        case "interleaved_1f1b":
            rounds = max(1, micro_batches // pp)
            ahead = min(total, (stages - 1) * (micro_batches // rounds) + 2 * (pp - 1 - rank))
        case _:
            ahead = min(total, pp - 1 - rank)
    forwards, backwards = _order(pp, stages, micro_batches), _order(pp, stages, micro_batches, back=True)
    for _ in range(ahead):
        yield Action(True, *next(forwards))
    for stage, number in forwards:
        yield Action(True, stage, number)
        yield Action(False, *next(backwards))
    for stage, number in backwards:
        yield Action(False, stage, number)


def _v_shaped(pp: int, rank: int, micro_batches: int) -> Iterator[Action]:
    """Yield the actions of a rank whose stages lie on both arms of a V (Qi et al. 2024, arXiv:2405.15362, figure 4)."""
    count = max(micro_batches, 2 * pp - 1)  # torch schedules at least this many, and drops the excess
    done = [[0, 0], [0, 0]]  # backwards and forwards of each stage

    def act(forward: bool, stage: int) -> Iterator[Action]:
        number = done[stage][forward]
        if number < count:
            done[stage][forward] += 1
        if number < micro_batches:
            yield Action(forward, stage, number)

    for _ in range(2 * (pp - rank) - 1):
        yield from act(True, 0)
    for _ in range(rank):
        yield from act(True, 1)
        yield from act(True, 0)
    for _ in range(pp - rank):
        yield from act(True, 1)
        yield from act(False, 1)
    while min(done[0][False], done[1][False]) < count:
        yield from act(True, 0)
        yield from act(False, 0)
        yield from act(True, 1)
        yield from act(False, 1)


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
