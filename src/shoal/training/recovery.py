"""A run whose numbers went wrong: what is found out and said of it, and how it goes back. By all processes together."""

from __future__ import annotations

import math

from shoal.errors import DivergedError
from shoal.fault.origin import find_origin
from shoal.parallel.replicas import compare, has_replicas
from shoal.training.assemble import open_loader, start_anew
from shoal.training.health import GoBack
from shoal.training.run import Run
from shoal.training.scaler import SMALLEST
from shoal.training.step import Stats


def overflowed(run: Run, stats: Stats, norm: float) -> bool:
    """Whether float16's loss scale left this step out, with a smaller one to try; said where it is so."""
    if stats.loss_scale is None or math.isfinite(norm) or (scale := float(stats.loss_scale)) == SMALLEST:
        return False
    run.console.note(f"step {stats.step} overflowed in float16 and was left out; the loss scale is {scale:g}")
    run.records.event("overflowed", step=stats.step, loss_scale=scale)
    return True


def explain(run: Run, stats: Stats, loss: float, norm: float) -> None:
    """Find where it began, by taking the step once more, and say it. A collective; raises `GoBack`."""
    run.watch.pace.busy.interrupt()
    batches = run.loader.batches_at(stats.first)
    scale = run.state.scaler.scale if run.state.scaler else 1.0
    run.watch.faults.step = stats.step
    phases = run.watch.phases.without(run.watch.meter)  # a step's split is of the step itself
    found = find_origin(
        run.runnable.parts,
        lambda: run.runnable.forward_backward(batches, stats.step, phases, scale),
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
    run.watch.heartbeat.outside("going back")
    run.watch.pace.busy.interrupt()
    run.recovery.may_go_back(step, back.why)
    run.saving.wait_for_all(step)
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
    run.evaluation = None
    run.loader.close()
    run.loader = open_loader(
        run.config, run.mesh, run.loader.rows, run.state.position, run.state.passed_over, run.watch.faults.at
    )
    where = newest.folder if newest else "the start: there is no checkpoint yet"
    run.console.warn(f"{back.why}: back from step {step} to {where}{samples}")
    run.records.event("went back", step=step, to=run.state.step, why=back.why, passed_over=back.passed_over)
