"""Everything a run holds while it trains, and how it is opened."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shoal.checkpoint.saved import Saved
from shoal.config.keys import ChangedOption
from shoal.config.options import Config
from shoal.data.dataset import BlendRows, Dataset, continued_stages, open_data, order_of, planned_stages
from shoal.data.loader import Loader
from shoal.data.order.blend import Blend
from shoal.data.order.held_out import HeldOutQuarantine, Skipped, in_words
from shoal.data.order.ledger import Header
from shoal.data.yardstick import Measuring
from shoal.elastic.heartbeat import Heartbeat
from shoal.errors import DataError
from shoal.fault.inject import Faults, flip, poison, tear
from shoal.fault.limit import TimeLimit
from shoal.mesh.mesh import Mesh
from shoal.mesh.place import is_launched
from shoal.metrics.meter import Meter
from shoal.metrics.progress import DeviceProgress
from shoal.models.outline import outline
from shoal.parallel.runnable import Runnable
from shoal.plan.length import count_steps, length_of
from shoal.run.console import Console
from shoal.run.folder import RunFolder
from shoal.run.phases import Phases
from shoal.run.records import Evaluation
from shoal.system.repository import Look
from shoal.system.signals import StopRequest
from shoal.training.assemble import assemble, open_loader
from shoal.training.by_rank import ByRank
from shoal.training.evaluate import evaluate
from shoal.training.finish_config import finish_config, write_run_files
from shoal.training.guard import Guard
from shoal.training.health import Recovery
from shoal.training.last_words import say_held_out
from shoal.training.pace import Pace
from shoal.training.run_files import RunFiles, tokens_of
from shoal.training.saving import Saving
from shoal.training.state import TrainState


@dataclass(kw_only=True)
class Start:
    """The facts about a run's start that are reported to the user."""

    before: Config  # the config of the run before this start; the new config if the run is new
    changed: Sequence[ChangedOption]
    restored: Saved | None = None  # the checkpoint that the run resumes from; None if the run is new
    applied: list[str] = field(default_factory=list)  # a line for each technique applied to the model
    repository: Look | None = None  # a look at the user's git repository; on the first rank


@dataclass(kw_only=True)
class Watch:
    """The observers of a run's steps."""

    heartbeat: Heartbeat
    progress: DeviceProgress
    meter: Meter
    pace: Pace
    by_rank: ByRank
    faults: Faults
    phases: Phases

    @classmethod
    def open(
        cls, config: Config, mesh: Mesh, runnable: Runnable, heartbeat: Heartbeat, faults: Faults, files: RunFiles
    ) -> Watch:
        """Open the observers. A collective over the world."""
        meter = Meter(config, mesh)
        heartbeat.outside("opening the run")
        pace = Pace.open(config, mesh, runnable, files.console, files.event)
        pace.busy.waits.tell = heartbeat.waits
        by_rank = ByRank(mesh, pace.busy, meter.splits, files.ranks)
        progress = DeviceProgress(mesh.device, heartbeat)
        # Order matters: a delay injected by `faults` counts in the times of the meter and the pace, not in the clock's "data".
        phases = Phases([progress, meter, pace.busy, faults, files.clock])
        return cls(
            heartbeat=heartbeat, progress=progress, meter=meter, pace=pace, by_rank=by_rank, faults=faults, phases=phases
        )  # fmt: skip

    def begin(self, step: int) -> None:
        """Tell the observers that `step` begins."""
        self.meter.begin(step)
        self.faults.step = step
        self.heartbeat.begin(step)
        self.by_rank.begin(step)


@dataclass(kw_only=True)
class Stopping:
    """The two sources of a request to stop before the last step: a signal and the time limit."""

    stop: StopRequest
    limit: TimeLimit

    def is_asked(self) -> bool:
        """Return whether this process was asked to stop. Call it once a step: the time limit measures steps by these calls."""
        time_is_up = self.limit.is_due()
        return bool(self.stop) or time_is_up


@dataclass(kw_only=True)
class Run:
    """Everything a run holds while it trains."""

    config: Config
    mesh: Mesh
    console: Console
    folder: RunFolder
    dataset: Dataset
    rows: BlendRows
    files: RunFiles
    header: Header
    runnable: Runnable
    state: TrainState
    saving: Saving
    loader: Loader
    guard: Guard
    recovery: Recovery
    watch: Watch
    stopping: Stopping
    total_steps: int
    start: Start
    evaluation: Evaluation | None = None  # the last evaluation
    measuring: Measuring | None = None  # compresses the held-out text with gzip and xz; on the first rank

    @classmethod
    def open(cls, config: Config, mesh: Mesh, stop: StopRequest, heartbeat: Heartbeat | None = None) -> Run:
        """Open the data, build the model on meta, parallelize it, build the optimizer, restore the newest checkpoint if any."""
        heartbeat = heartbeat or Heartbeat.open(config.launch)
        heartbeat.outside("opening the data")
        files = _open_files(config, mesh)
        try:
            return cls._open(config, mesh, stop, heartbeat, files)
        except BaseException:
            files.close()
            files.folder.release()  # the caller may correct the config and train again in this process
            raise

    @classmethod
    def _open(cls, config: Config, mesh: Mesh, stop: StopRequest, heartbeat: Heartbeat, files: RunFiles) -> Run:
        console, folder = files.console, files.folder
        repository = Look.at(Path(".")) if mesh.is_first else None
        # A launcher has shown the progress already
        speaks = Console(speaks=mesh.is_first and not is_launched())
        speaks.on_progress = heartbeat.on_progress
        dataset = open_data(config.data, speaks, past=tokens_of(folder))
        heartbeat.outside("measuring the device")
        config = finish_config(config, folder, dataset, mesh, console.warn)
        rows = dataset.rows("train")
        dataset.held_out_rows()  # raises if there is no row for the evaluations, before the first step
        start = Start(changed=folder.agree(config), before=folder.begun() or config, repository=repository)
        mesh.barrier()  # all ranks compare the config before rank 0 writes it
        faults = Faults(mesh.place.rank, folder.events_file)
        saving = Saving.open(config, folder.checkpoints, mesh, console, files.event, dataset.data_id, faults.at)
        saving.total_steps = count_steps(config.train, config.data.seq_len, len(rows))
        runnable, state = _build_or_restore(config, mesh, saving, heartbeat, faults, start, files)
        heartbeat.outside("opening the run")
        if mesh.is_first:
            with folder.writable():
                write_run_files(folder, config, dataset)
        order = continue_order(config, rows, state)
        if (needed := (saving.total_steps - state.step) * config.train.global_batch + state.position) > order.end:
            raise DataError(
                f"max_epochs of the sources allows {order.end:,.0f} rows, and the run takes {needed:,}; raise max_epochs or "
                f"lower train.{length_of(config.train)[0]}"
            )
        if not config.data.max_quarantined:
            state.quarantined, state.unread = {}, {}  # all rows are read again
        loader = open_loader(config, mesh, rows, state.position, state.passed_over, faults.at, order, state.quarantined)
        guard = Guard(mesh.device, config.fault.spike_zscore)
        guard.losses.extend(state.losses)
        run = cls(
            config=config,
            mesh=mesh,
            console=console,
            folder=folder,
            dataset=dataset,
            rows=rows,
            files=files,
            header=ledger_header(config, mesh, dataset, order),
            runnable=runnable,
            state=state,
            saving=saving,
            loader=loader,
            guard=guard,
            recovery=Recovery(config.fault, console, files.event),
            watch=Watch.open(config, mesh, runnable, heartbeat, faults, files),
            stopping=Stopping(stop=stop, limit=_time_limit(config, state)),
            total_steps=saving.total_steps,
            start=start,
        )
        run.connect()
        return run

    def connect(self) -> None:
        """Connect saves with the time limit and the heartbeat, and planned faults with their targets."""
        self.saving.on_saved = self.stopping.limit.saved
        self.saving.on_checkpoint = self.watch.heartbeat.saved
        faults = self.watch.faults
        faults.targets = {
            "nan": lambda: poison(self.runnable.parts.values(), faults),
            "flip": lambda: flip(self.state.shards),
            "tear": lambda: tear(self.saving.folder),
        }

    def evaluate(self, max_tokens: int | None) -> None:
        """Compute the validation loss; show and record it, and keep it for a checkpoint of this step. A collective."""
        self.watch.pace.busy.interrupt()
        runnable = self.runnable
        runnable.train(False)
        result = evaluate(
            runnable.evaluate, self.mesh, self.dataset, self.config, max_tokens,
            alive=lambda: self.watch.heartbeat.outside("evaluation"),
            progress=lambda done, total: self.watch.heartbeat.on_progress("evaluation", done, total),
            quarantine=self._held_out_quarantine(),
        )  # fmt: skip
        runnable.train()
        if result is None:
            self.console.warn(
                f"no held-out loss: none of the first {max_tokens:,} held-out tokens (train.eval_tokens) is learned"
            )
            return
        self.evaluation = Evaluation(
            step=self.state.step, tokens=self.state.tokens, time=round(time.time(), 3), **dataclasses.asdict(result)
        )
        say_held_out(self.evaluation, self.console)
        self.files.metrics(self.evaluation)

    def _held_out_quarantine(self) -> HeldOutQuarantine | None:
        """Return what skips held-out rows that cannot be read, and records them; None if the first one ends the run."""
        state, most = self.state, self.config.data.max_quarantined

        def tell(found: Sequence[Skipped]) -> None:
            self.console.warn(in_words(found, f" ({state.num_quarantined:,} of at most {most:,} such rows)"))
            for each in found:
                self.files.event("held-out row skipped", step=state.step, **dataclasses.asdict(each))

        return HeldOutQuarantine(state.unread, most, replaced=len(state.quarantined), tell=tell) if most else None

    def keep_losses(self) -> None:
        """Put the recent losses into the state, for the next checkpoint: a resumed run computes the same spike scores."""
        self.state.losses = list(self.guard.losses)

    def val_loss(self) -> float | None:
        """Return the validation loss of this very step, or None: an older one belongs to other weights."""
        last = self.evaluation
        return last.val_loss if last is not None and last.step == self.state.step else None

    def close(self) -> None:
        """Close files, threads and the run's lock. May be called twice."""
        if self.measuring is not None:
            self.measuring.close()
        self.loader.close()
        self.watch.pace.close()
        self.files.close()
        self.folder.release()


def _open_files(config: Config, mesh: Mesh) -> RunFiles:
    """Lock the run's folder, unless a launcher has locked it, and open its files."""
    folder = RunFolder.of(config)
    if mesh.is_first and not is_launched():
        folder.lock()
    return RunFiles(folder, Console(speaks=mesh.is_first), writes=mesh.is_first)


def _build_or_restore(
    config: Config, mesh: Mesh, saving: Saving, heartbeat: Heartbeat, faults: Faults, start: Start, files: RunFiles
) -> tuple[Runnable, TrainState]:
    """Build the model and its optimizer, and fill them from the newest checkpoint if there is one."""
    heartbeat.outside("looking for checkpoints")
    faults.at("load")
    newest = start.restored = saving.find()
    loads = newest is None and config.model.from_ is not None
    heartbeat.outside("loading weights" if loads else "building the model")
    runnable, state = assemble(
        config, mesh, start.applied.append, fresh=newest is None, built=lambda model: files.model(outline(model))
    )
    if newest is not None:
        heartbeat.outside("reading the checkpoint")
        saving.restore(newest, state)
        heartbeat.saved(newest.step)
    saving.begin_life(newest)
    saving.prepare(state)
    return runnable, state


def continue_order(config: Config, rows: BlendRows, state: TrainState) -> Blend:
    """Return the order of rows after a start, a resume or a rollback. Changed weights hold from `state.position` on."""
    planned = planned_stages(config.data, config.train.global_batch, state.step, state.position)
    state.stages = continued_stages(state.stages, planned, state.position)
    return order_of(config.data, rows.sizes, config.train.seed, state.stages)


def ledger_header(config: Config, mesh: Mesh, dataset: Dataset, order: Blend) -> Header:
    """Return the facts that the lines of a run's ledger depend on."""
    train = config.train
    sources = [
        (name, rows, source.max_epochs)
        for (name, source), rows in zip((config.data.sources or {}).items(), order.sizes, strict=False)
    ]
    return Header(
        rows=order.num_rows, seed=train.seed, global_batch=train.global_batch,
        copies=mesh.world_size // mesh.dp_size, data_id=dataset.data_id, sources=sources,
        stages=[(stage.first, stage.shares) for stage in order.stages],
    )  # fmt: skip


def _time_limit(config: Config, state: TrainState) -> TimeLimit:
    """Open this worker's time limit; the size of its state gives a first estimate of a save's duration."""
    return TimeLimit.open(config.launch.time_limit_minutes, sum(p.tensor.nbytes for p in state.tensors().values()))
