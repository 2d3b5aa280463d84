"""A run whose numbers went wrong: what is found out and said of it, when it goes back, and how."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoal.config.options import Fault
from shoal.errors import DivergedError
from shoal.fault.origin import find_origin
from shoal.metrics.meter import no_phases
from shoal.parallel.replicas import Mismatch, compare, has_replicas
from shoal.run.console import Console
from shoal.training.assemble import open_loader, start_anew
from shoal.training.scaler import SMALLEST
from shoal.training.step import Stats

if TYPE_CHECKING:
    from shoal.training.loop import Run


@dataclass
class GoBack(Exception):
    """The run is to go on from its last checkpoint; `passed_over` are positions [first, stop) to leave out then."""

    why: str
    passed_over: tuple[int, int] | None = None


class Recovery:
    """Counts what went wrong since it last went well. All processes see the same, and decide alike."""

    def __init__(self, fault: Fault, console: Console, event: Callable[..., None]) -> None:
        self._fault, self._console, self._event = fault, console, event
        self._in_row = 0  # steps left out
        self._first = 0  # the position where the first of them began
        self._rollbacks = 0
        self._farthest = 0  # the step at which it went back last

    @property
    def is_sound(self) -> bool:
        """Whether the last step counted: else what is there may be the reason, and is not worth saving."""
        return self._in_row == 0

    def went_well(self, step: int) -> None:
        """A step counted."""
        self._in_row = 0
        if step > self._farthest:
            self._rollbacks = 0

    def left_out(
        self, step: int, *, loss: float, norm: float, first: int, stop: int, samples: list[int], origin: str
    ) -> None:
        """A step of positions [first, stop) was left out. Raises `GoBack` where it is one too many in a row."""
        self._in_row += 1
        if self._in_row == 1:
            self._first = first
        spike = math.isfinite(loss) and math.isfinite(norm)
        why = f"its loss {loss:.4f} is a spike" if spike else f"loss {loss}, gradient norm {norm}"
        where = f"; it began in {origin}" if origin else ""
        self._console.warn(f"step {step} was left out: {why}{where}")
        facts = {"loss": loss if math.isfinite(loss) else str(loss), "norm": norm if math.isfinite(norm) else str(norm)}
        self._event("left out", step=step, **facts, origin=origin, samples=samples)
        if self._in_row > self._fault.max_skipped:
            self._in_row = 0
            raise GoBack(f"{self._fault.max_skipped + 1} steps in a row were left out", (self._first, stop))

    def compared(self, step: int, differing: Sequence[Mismatch]) -> None:
        """Replicas were compared. Raises `GoBack` where they differ."""
        if not differing:
            return
        ranks = sorted({rank for each in differing for rank in each.ranks})
        names = ", ".join(each.name for each in differing[:3]) + (", ..." if len(differing) > 3 else "")
        self._event("corrupted", step=step, ranks=ranks, tensors=[each.name for each in differing])
        which = f"rank {ranks[0]} holds" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} hold"
        raise GoBack(f"{which} other bits than its replicas, of {names}: memory or arithmetic failed there")

    def may_go_back(self, step: int, why: str) -> None:
        """Raises `DivergedError` where going back has not helped so often."""
        self._rollbacks += 1
        self._farthest = max(self._farthest, step)
        if self._rollbacks > self._fault.max_rollbacks:
            raise DivergedError(
                f"step {step}: {why}, and going back {self._fault.max_rollbacks} times did not help. A lower optim.lr, a "
                "longer optim.warmup_steps or another train.seed may"
            )


# --- what is done to a run, by all its processes together ---------------------------------------------------


def overflowed(run: Run, stats: Stats, norm: float) -> bool:
    """Whether float16's loss scale left this step out, with a smaller one to try; said where it is so."""
    if stats.loss_scale is None or math.isfinite(norm) or (scale := float(stats.loss_scale)) == SMALLEST:
        return False
    run.console.note(f"step {stats.step} overflowed in float16 and was left out; the loss scale is {scale:g}")
    run.records.event("overflowed", step=stats.step, loss_scale=scale)
    return True


def explain(run: Run, stats: Stats, loss: float, norm: float) -> None:
    """Find where it began, by taking the step once more, and say it. A collective; raises `GoBack`."""
    run.pace.busy.interrupt()
    batches = run.loader.batches_at(stats.first)
    scale = run.state.scaler.scale if run.state.scaler else 1.0
    found = find_origin(
        run.runnable.parts,
        lambda: run.runnable.forward_backward(batches, stats.step, run.marked(no_phases, stats.step), scale),
    )
    origins = [(each, rank) for rank, each in enumerate(run.mesh.gather_objects(found)) if each is not None]
    origin = "{} on rank {}".format(*min(origins)) if origins else ""
    run.recovery.left_out(
        stats.step, loss=loss, norm=norm, first=stats.first, stop=stats.first + run.config.train.global_batch,
        samples=run.loader.samples(stats.first), origin=origin,
    )  # fmt: skip


def check_replicas(run: Run) -> None:
    """Raises `GoBack` where processes that should hold the same bits do not. A collective."""
    if run.config.fault.check_replicas_every and has_replicas(run.mesh):
        run.recovery.compared(run.state.step, compare(run.state.tensors(), run.mesh))


def go_back(run: Run, back: GoBack) -> None:
    """To the newest checkpoint that is whole. A collective; raises `DivergedError` where that does not help."""
    step = run.state.step
    run.heartbeat.outside("going back")
    run.pace.busy.interrupt()
    run.recovery.may_go_back(step, back.why)
    run.saving.settle_all(step)
    newest = run.saving.find()
    if newest is None and back.passed_over is not None:
        raise DivergedError(
            f"step {step}: {back.why}, and there is no checkpoint to go back to. A lower optim.lr, a longer "
            "optim.warmup_steps, other weights or another train.seed may help"
        )
    if newest is not None:
        run.saving.restore(newest, run.state)
    else:  # memory failed before there was a checkpoint, and the numbers themselves were good
        start_anew(run.config, run.mesh, run.state)
    run.saving.begin_life(newest)
    samples = ""
    if back.passed_over is not None:
        first, stop = back.passed_over
        run.state.passed_over.append((first, stop))
        samples = f"; the samples at {first:,} to {stop - 1:,} are passed over"
    run.guard.losses.clear()
    run.guard.losses.extend(run.state.losses)
    run.val = {}
    run.loader.close()
    run.loader = open_loader(
        run.config, run.mesh, run.loader.rows, run.state.position, run.state.passed_over, run.faults.at
    )
    where = newest.folder if newest else "the start: there is no checkpoint yet"
    run.console.warn(f"{back.why}: back from step {step} to {where}{samples}")
    run.records.event("went back", step=step, to=run.state.step, why=back.why, passed_over=back.passed_over)
