"""Recovers a run from NaN, Inf, loss spikes and differing replicas. All ranks take part."""

from __future__ import annotations

import math

import numpy as np

from shoal.data.document_index import has_documents
from shoal.data.where import Finder, Timeline
from shoal.errors import DivergedError, UnreadableError
from shoal.fault.origin import find_origin
from shoal.parallel.replicas import compare, has_replicas
from shoal.training.assemble import open_loader, start_over
from shoal.training.health import GoBack
from shoal.training.run import Run, continue_order, ledger_header
from shoal.training.scaler import SMALLEST
from shoal.training.step import Stats


def overflowed(run: Run, stats: Stats, norm: float) -> bool:
    """Return whether float16 overflowed in this step and a smaller loss scale is left to try; if so, report it."""
    if stats.loss_scale is None or math.isfinite(norm) or (scale := float(stats.loss_scale)) == SMALLEST:
        return False
    run.console.note(f"step {stats.step} overflowed in float16 and was skipped; the loss scale is now {scale:g}")
    run.files.event("overflowed", step=stats.step, loss_scale=scale)
    return True


def explain(run: Run, stats: Stats, loss: float, norm: float, score: float | None) -> None:
    """
    Rerun a skipped step to find where NaN or Inf first appeared, and report it. A collective over the world.

    score: the spike score of its loss, if known.

    Raises `GoBack` after too many skipped steps in a row.
    """
    run.watch.pace.busy.interrupt()
    batches = run.loader.batches_at(stats.first)
    scale = run.state.scaler.scale if run.state.scaler else 1.0
    run.watch.faults.step = stats.step
    phases = run.watch.phases.without(run.watch.meter)  # do not time the rerun
    found = find_origin(
        run.runnable.parts,
        lambda: run.runnable.forward_backward(batches, stats.step, phases, scale),
    )
    origins = [(each, rank) for rank, each in enumerate(run.mesh.gather_objects(found)) if each is not None]
    origin = "{} on rank {}".format(*min(origins)) if origins else ""
    run.recovery.left_out(
        stats.step, loss=loss, norm=norm, score=score, first=stats.first,
        stop=stats.first + run.config.train.global_batch, samples=run.loader.samples(stats.first),
        documents=_documents(run, stats), origin=origin,
    )  # fmt: skip


def say_empty(run: Run, stats: Stats) -> None:
    """Report a step that was skipped because none of its labels is learned: it has no gradient."""
    if run.mesh.is_first:
        run.recovery.no_label(stats.step, run.loader.samples(stats.first), _documents(run, stats))


def _documents(run: Run, stats: Stats) -> list[tuple[str, int, int]]:
    """
    Return the documents of a step's rows, each as (source, first document, last document).

    Empty for token files without an index of documents, which could take minutes to make, or with one that cannot be read.
    """
    if not all(has_documents(part, "train") for part in run.dataset.parts.values()):
        return []
    finder = Finder.of(run.dataset, run.loader.order, Timeline([], run.config.train.micro_batch))
    try:
        rows = finder.of_rows(np.array(run.loader.samples(stats.first)))
    except UnreadableError:
        return []
    return [(source, min(documents), max(documents)) for source, _, documents in rows]


def check_replicas(run: Run) -> None:
    """Compare replicas if `fault.check_replicas_every` is set. A collective; raises `GoBack` if their bits differ."""
    if run.config.fault.check_replicas_every and has_replicas(run.mesh):
        run.recovery.compared(run.state.step, compare(run.state.tensors(), run.mesh))


def go_back(run: Run, back: GoBack) -> None:
    """
    Roll back to the newest whole checkpoint or, if replicas differed before the first checkpoint, to the start.

    Raises `DivergedError` after too many rollbacks without progress, or if steps were skipped and there is no checkpoint.
    A collective over the world.
    """
    step = run.state.step
    run.watch.heartbeat.outside("rolling back")
    run.watch.pace.busy.interrupt()
    run.recovery.may_go_back(step, back.why)
    run.saving.wait_for_all(step)
    newest = run.saving.find()
    if newest is None and back.passed_over is not None:
        raise DivergedError(
            f"step {step}: {back.why}, and there is no checkpoint to roll back to. Try a lower optim.lr, a longer "
            "optim.warmup_steps, other weights or another train.seed"
        )
    quarantined, unread = run.state.quarantined, run.state.unread
    if newest is not None:
        run.saving.restore(newest, run.state)
    else:  # replicas differed before the first checkpoint; the training itself was healthy
        start_over(run.config, run.mesh, run.state)
    run.state.quarantined, run.state.unread = quarantined, unread  # rows found since the checkpoint are not tried again
    run.saving.begin_life(newest)
    samples = ""
    if back.passed_over is not None:
        first, stop = back.passed_over
        run.state.passed_over.append((first, stop))
        samples = f"; the samples at {first:,} to {stop - 1:,} are skipped"
    run.guard.losses.clear()
    run.guard.losses.extend(run.state.losses)
    run.evaluation = None
    run.loader.close()
    order = continue_order(run.config, run.rows, run.state)
    run.header = ledger_header(run.config, run.mesh, run.dataset, order)
    run.loader = open_loader(
        run.config, run.mesh, run.rows, run.state.position, run.state.passed_over, run.watch.faults.at, order,
        run.state.quarantined,
    )  # fmt: skip
    where = newest.folder if newest else "the start (no checkpoint yet)"
    run.console.warn(f"{back.why}: rolled back from step {step} to {where}{samples}")
    run.files.event("went back", step=step, to=run.state.step, why=back.why, passed_over=back.passed_over)
