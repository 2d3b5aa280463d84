"""
A training run, in the order in which it happens.

    train
      Run.open (run.py)           data, model, optimizer, newest checkpoint
      complete
        take_steps                until the last step:
          take_step                 batches, then `train_step` (step.py): forward, backward, sums, update
          record                    read the step's numbers, judge them, write them
          do_what_is_due            evaluate, save
        finish (closing.py)       the last checkpoint, the last messages

NaN, Inf, loss spikes and rollbacks: recovery.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from shoal.config.options import Config
from shoal.data.loader import Batch
from shoal.data.order.ledger import checksum
from shoal.data.yardstick import Measuring
from shoal.elastic.agreement import shared_settings
from shoal.elastic.heartbeat import Heartbeat
from shoal.fault.compiling import told_of_compilations
from shoal.fault.inject import Faults
from shoal.mesh.ballot import Ballot, Vote
from shoal.mesh.mesh import open_mesh
from shoal.mesh.place import is_launched, read_place
from shoal.optim.schedule import learning_rate
from shoal.run.folder import RunFolder
from shoal.system.signals import StopRequest
from shoal.training.closing import finish
from shoal.training.compile_check import check_compiled
from shoal.training.data_faults import vote
from shoal.training.health import GoBack
from shoal.training.opening import introduce
from shoal.training.recovery import check_replicas, explain, go_back, overflowed, say_empty
from shoal.training.run import Run
from shoal.training.step import Result, Stats, train_step


def train(config: Config, stop: StopRequest | None = None, heartbeat: Heartbeat | None = None) -> bool:
    """
    Train from the start or from the last checkpoint, as one process of a run. Return True if the run was stopped early.

    stop, heartbeat: the stop request and the heartbeat that the caller has opened; None opens new ones.
    """
    set_threads(config)
    stop = StopRequest() if stop is None else stop  # not `or`: a StopRequest is false until a signal arrives
    heartbeat = heartbeat or Heartbeat.open(config.launch)
    heartbeat.outside("meeting the other processes")
    Faults(read_place().rank, RunFolder.of(config).events_file).at("rendezvous")
    settings = {} if is_launched() or read_place().world_size == 1 else shared_settings(config, sizes=False)
    with open_mesh(config.train.device, config.launch.timeout_seconds, config.parallel, settings) as mesh:
        run = Run.open(config, mesh, stop, heartbeat)
        try:
            return complete(run)
        finally:
            run.close()


def set_threads(config: Config) -> None:
    """Use as many CPU threads as the launcher chose."""
    if config.launch.threads:
        torch.set_num_threads(config.launch.threads)


def reads_late(device: torch.device) -> bool:
    """Return whether a step's numbers are read while the next step runs: on a GPU. On a CPU they are read at once."""
    return device.type == "cuda"


def complete(run: Run) -> bool:
    """Introduce the run, take its steps and finish it. Return True if it was asked to stop before the last step."""
    introduce(run)
    if run.mesh.is_first:
        run.measuring = Measuring(run.dataset.single, idle=True)
    with told_of_compilations(run.watch.heartbeat, compiles=run.config.train.compile):
        if run.runnable.compiled and run.config.train.compile_check and run.state.step < run.total_steps:
            check_compiled(run)
        stopped = take_steps(run) and run.state.step < run.total_steps
    run.watch.heartbeat.outside("end")
    with run.files.clock.spend("end"):
        finish(run, stopped)
    return stopped


def take_steps(run: Run) -> bool:
    """Take the steps, with rollbacks, and evaluate and save between them when due. Return True if a rank was asked to stop."""
    while True:
        try:
            return _steps_to_the_end(run)
        except GoBack as back:
            go_back(run, back)


def _steps_to_the_end(run: Run) -> bool:
    """Take the steps. Raises `GoBack`, on all ranks at the same step, if the run must roll back."""
    pending: Stats | None = None
    stopped, late = False, reads_late(run.mesh.device)
    at_end = run.state.step >= run.total_steps
    run.files.begin(run.header, run.state.step, run.state.position, run.state.quarantined, at_end=at_end)
    run.files.clock.begin(run.state.step)
    run.watch.meter.start()
    while run.state.step < run.total_steps and not stopped:
        stats: Stats | None = take_step(run)
        pending, stats = (stats, pending) if late else (None, stats)
        if stats is not None:
            stopped = record(run, stats)
        if something_is_due(run):
            stopped = (pending is not None and record(run, pending)) or stopped
            pending = None
            do_what_is_due(run)
            run.watch.meter.start()
    if pending is not None:
        stopped = record(run, pending) or stopped
    check_replicas(run)
    return stopped


def take_step(run: Run) -> Stats:
    """Queue one optimizer step; the returned `Stats` hold its numbers, still on the device."""
    config, step = run.config, run.state.step + 1
    run.watch.begin(step)
    with run.watch.phases("data"):
        batches: Sequence[Batch] = run.loader.next_step()
    run.guard.prepare(step)
    stats = train_step(
        run.runnable,
        run.state,
        batches,
        step=step,
        lr=learning_rate(config.optim, step, run.total_steps),
        clip_norm=config.optim.clip_norm,
        guard=run.guard,
        ballot=cast_ballot(run, step, batches),
        phases=run.watch.phases,
    )
    run.state.step, run.state.position = step, run.loader.position
    return dataclasses.replace(stats, first=run.loader.first)


def cast_ballot(run: Run, step: int, batches: Sequence[Batch]) -> Ballot:
    """Collect this process's votes in `step`: the numbers that its modules tell the other ranks."""
    samples = sum(checksum(batch.sample_ids, run.header.bits) for batch in batches)
    return Ballot(
        {
            "stop": Vote([float(run.stopping.is_asked())]),
            "samples": Vote([float(samples)]),
            "pace": run.watch.pace.vote(step),
            "ranks": run.watch.by_rank.vote(step),
            "data": vote(run, step, batches),
            "sources": Vote(_tokens_by_source(run, batches)),
            **run.saving.votes(step),
        }
    )


def _tokens_by_source(run: Run, batches: Sequence[Batch]) -> list[float]:
    """Return the valid tokens of each source of a blend in this rank's batches; of ranks with the same batches, one counts."""
    if run.runnable.num_sources == 1:
        return []
    counted = [0.0] * run.runnable.num_sources
    if run.mesh.first_of_batch:
        for batch in batches:
            assert batch.sources is not None
            for source, tokens in zip(batch.sources.tolist(), batch.row_tokens, strict=True):
                counted[source] += tokens
    return counted


def record(run: Run, stats: Stats) -> bool:
    """
    Read a finished step's numbers, pass the sums of all ranks' votes to their modules, and record whether the step counts.

    Returns True if any rank was asked to stop.

    Raises `GoBack` if too many steps in a row were skipped.
    """
    with run.watch.pace.busy.waits.here():
        run.watch.progress.wait(stats.over)
        result = stats.read()
    run.files.clock.reached(stats.step)
    run.stopping.stop.nothing_to_lose = False
    said = stats.ballot.count(result.said)
    run.files.samples(
        stats.step, stats.first, stats.first + run.config.train.global_batch, said["samples"][0],
        skipped=result.skipped, empty=result.is_empty, windows=run.state.passed_over,
    )  # fmt: skip
    names = run.config.data.sources or {}
    by_source = {
        name: loss / tokens
        for name, loss, tokens in zip(names, result.source_loss_sums, said["sources"], strict=False)
        if tokens
    }
    _judge(run, stats, result, by_source or None)
    return bool(said["stop"][0])


def _judge(run: Run, stats: Stats, result: Result, source_loss: Mapping[str, float] | None) -> None:
    """Count a step and write its line, or find out why it was skipped. Raises `GoBack` after too many skipped steps in a row."""
    loss = result.loss_sum / max(result.tokens, 1.0)
    has_overflowed = overflowed(run, stats, result.norm)
    run.state.skipped += result.skipped
    score = run.guard.score(stats.step, loss)
    if result.skipped and not has_overflowed:
        run.watch.meter.pass_over()
        if result.is_empty:
            say_empty(run, stats)
        else:
            explain(run, stats, loss, result.norm, score)
        return
    run.state.tokens += int(result.tokens)
    if not result.skipped:
        run.guard.learn(stats.step, loss)
        run.recovery.went_well(stats.step)
    norm = None if has_overflowed else result.norm
    left = run.total_steps - stats.step
    line = run.watch.meter.record(
        stats.step, stats.over, run.state.tokens, int(result.tokens), loss, stats.lr, norm, source_loss=source_loss,
        spike_score=score, last=left == 0,
    )  # fmt: skip
    if line is not None:
        run.files.metrics(line)
        run.console.step(line, run.total_steps, run.watch.meter.left_seconds(left), run.config.metrics.console_every)


def something_is_due(run: Run) -> bool:
    """Return whether an evaluation, a save or a comparison of replicas is due after this step."""
    return (
        _due(run, run.config.train.eval_every) or _save_is_due(run) or _due(run, run.config.fault.check_replicas_every)
    )


def do_what_is_due(run: Run) -> None:
    """
    Evaluate, compare replicas and save, each if it is due.

    If `fault.check_replicas_every` is set, replicas are also compared before each save.
    """
    clock = run.files.clock
    run.watch.heartbeat.outside("between steps")
    if _due(run, run.config.train.eval_every):
        with clock.spend("evaluation"):
            run.evaluate(run.config.train.eval_tokens)
    saves = _save_is_due(run)
    if saves or _due(run, run.config.fault.check_replicas_every):
        check_replicas(run)
    if saves and not run.recovery.is_sound:
        run.saving.put_off(run.state.step)
    elif saves:
        run.keep_losses()
        run.watch.heartbeat.outside("save")
        with clock.spend("checkpoint"):
            run.files.sync()
            run.saving.begin(run.state, run.val_loss())


def _due(run: Run, every: int) -> bool:
    return every > 0 and run.state.step % every == 0 and run.state.step < run.total_steps


def _save_is_due(run: Run) -> bool:
    return run.saving.is_due(run.state.step) and run.state.step < run.total_steps
