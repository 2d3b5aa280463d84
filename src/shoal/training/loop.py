"""
A training run, in the order in which it happens.

    train
      Run.open                    data, model, optimizer, what was saved
      Run.take_steps              again and again:
        Run._step                   batches, then `train_step` (step.py): forward, backward, sums, update
        Run._record                 what it came to, written down
        Run._do_what_is_due         evaluation, a save
      finish (closing.py)         the last checkpoint, the last words

Where numbers go wrong: recovery.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from shoal.config.options import Config
from shoal.data.ledger import Header, checksum
from shoal.data.loader import Batch, Loader
from shoal.data.prepare import Prepared, open_data
from shoal.data.yardstick import Measuring
from shoal.elastic.heartbeat import Heartbeat
from shoal.fault.compiling import told_of_compilations
from shoal.fault.inject import Faults, flip, poison, tear
from shoal.fault.limit import TimeLimit
from shoal.mesh.mesh import Mesh, open_mesh
from shoal.mesh.place import is_launched, read_place
from shoal.metrics.meter import Meter, Phases
from shoal.optim.schedule import learning_rate
from shoal.parallel.runnable import Runnable
from shoal.plan.length import count_steps
from shoal.run.console import Console
from shoal.run.folder import RunFolder
from shoal.system.signals import StopRequest
from shoal.training.assemble import assemble, open_loader
from shoal.training.closing import finish
from shoal.training.compile_check import check_compiled
from shoal.training.evaluate import evaluate
from shoal.training.finish_config import settle, write_run_files
from shoal.training.guard import Guard
from shoal.training.last_words import say_held_out
from shoal.training.opening import introduce
from shoal.training.pace import Pace
from shoal.training.progress import DeviceProgress
from shoal.training.records import Records
from shoal.training.recovery import GoBack, Recovery, check_replicas, explain, go_back, overflowed
from shoal.training.saving import Saving
from shoal.training.state import TrainState
from shoal.training.step import Stats, train_step


def train(config: Config, stop: StopRequest | None = None, heartbeat: Heartbeat | None = None) -> bool:
    """
    Train, from the start or from the last checkpoint, as one of the processes of a run.

    stop, heartbeat: where the caller has them already. Whether it was asked to stop before its end.
    """
    set_threads(config)
    stop = stop or StopRequest()
    heartbeat = heartbeat or Heartbeat.open(config.launch)
    heartbeat.outside("meeting the other processes")
    Faults(read_place().rank, RunFolder.of(config).events_file).at("rendezvous")
    with open_mesh(config.train.device, config.launch.timeout_seconds, config.parallel) as mesh:
        run = Run.open(config, mesh, stop, heartbeat)
        try:
            return run.train()
        finally:
            run.close()


def set_threads(config: Config) -> None:
    """As many CPU threads as the launcher settled on."""
    if config.launch.threads:
        torch.set_num_threads(config.launch.threads)


def reads_late(device: torch.device) -> bool:
    """Whether a step's numbers are read while the next one runs: a GPU's. A CPU has taken the step by then."""
    return device.type == "cuda"


@dataclass
class Run:
    """All that a run holds while it goes on. Built once, in the order of its fields."""

    config: Config
    mesh: Mesh
    stop: StopRequest
    console: Console
    folder: RunFolder
    prepared: Prepared
    records: Records
    runnable: Runnable
    state: TrainState
    saving: Saving
    loader: Loader
    meter: Meter
    guard: Guard
    recovery: Recovery
    pace: Pace
    faults: Faults
    header: Header
    heartbeat: Heartbeat
    progress: DeviceProgress
    limit: TimeLimit
    total_steps: int
    val: dict[str, float] = dataclasses.field(default_factory=dict)
    measuring: Measuring | None = None  # what gzip and xz make of the held-out text; on the first rank

    @classmethod
    def open(cls, config: Config, mesh: Mesh, stop: StopRequest, heartbeat: Heartbeat | None = None) -> Run:
        """Open the data, build the model on meta, parallelize, build the optimizer, restore."""
        heartbeat = heartbeat or Heartbeat.open(config.launch)
        heartbeat.outside("opening the data")
        console = Console(speaks=mesh.is_first)
        folder = RunFolder.of(config)
        if mesh.is_first and not is_launched():
            folder.lock()
        records = Records(folder, console, writes=mesh.is_first)
        prepared = open_data(
            config.data, Console(speaks=mesh.is_first and not is_launched())
        )  # else it is said already
        heartbeat.outside("measuring the device")
        config = settle(config, folder, prepared, mesh, console.warn)
        rows = prepared.split("train", seq_len=config.data.seq_len, document_mask=config.data.document_mask)
        total_steps = count_steps(config.train, config.data.seq_len, len(rows))
        changed = folder.agree(config)
        before = folder.begun() or config
        mesh.barrier()  # nobody writes the config before everybody has compared
        faults = Faults(mesh.place.rank, folder.events_file)
        saving = Saving.open(config, folder.checkpoints, mesh, console, records.event, prepared.data_id, faults.at)
        heartbeat.outside("looking for checkpoints")
        faults.at("load")
        newest = saving.find()
        applied: list[str] = []
        loads = newest is None and config.model.from_ is not None
        heartbeat.outside("loading weights" if loads else "building the model")
        runnable, state = assemble(config, mesh, applied.append, fresh=newest is None)
        if newest is not None:
            heartbeat.outside("reading the checkpoint")
            saving.restore(newest, state)
            heartbeat.saved(newest.step)
        saving.begin_life(newest)
        saving.prepare(state)
        heartbeat.outside("opening the run")
        if mesh.is_first:
            with folder.writable():
                write_run_files(folder, config, prepared)
        loader = open_loader(config, mesh, rows, state.position, state.passed_over, faults.at)
        meter = Meter(config, mesh)
        heartbeat.outside("opening the run")
        guard = Guard(mesh.device, config.fault.spike_zscore)
        guard.losses.extend(state.losses)
        recovery = Recovery(config.fault, console, records.event)
        pace = Pace.open(config, mesh, runnable, console, records.event)
        pace.busy.waits.tell = heartbeat.waits
        header = Header(
            len(rows), config.train.seed, config.train.global_batch, mesh.world_size // mesh.dp_size, prepared.data_id
        )
        limit = TimeLimit.open(config.launch.time_limit_minutes, sum(p.tensor.nbytes for p in state.tensors().values()))
        saving.on_saved = limit.saved
        saving.on_checkpoint = heartbeat.saved
        saving.total_steps = total_steps
        faults.targets = {
            "nan": lambda: poison(runnable.parts.values(), faults),
            "flip": lambda: flip(state.shards),
            "tear": lambda: tear(saving.folder),
        }
        run = cls(
            config, mesh, stop, console, folder, prepared, records, runnable, state, saving, loader, meter, guard,
            recovery, pace, faults, header, heartbeat, DeviceProgress(mesh.device, heartbeat), limit, total_steps,
        )  # fmt: skip
        introduce(run, applied, newest, before, [(d.key, d.before, d.after) for d in changed])
        return run

    def train(self) -> bool:
        """The steps, then the end; whether it was asked to stop before the last step."""
        if self.mesh.is_first:
            self.measuring = Measuring(self.prepared, idle=True)
        with told_of_compilations(self.heartbeat, compiles=self.config.train.compile):
            if self.runnable.compiled and self.config.train.compile_check and self.state.step < self.total_steps:
                check_compiled(self)
            stopped = self.take_steps() and self.state.step < self.total_steps
        self.heartbeat.outside("end")
        with self.records.clock.spend("end"):
            finish(self, stopped)
        return stopped

    def take_steps(self) -> bool:
        """The steps, and what is due between them; True where somebody asked to stop."""
        while True:
            try:
                return self._steps_to_the_end()
            except GoBack as back:
                go_back(self, back)

    def _steps_to_the_end(self) -> bool:
        """`take_steps`, unless something makes the run go back: raises `GoBack`, on all processes at once."""
        pending: Stats | None = None
        stopped, late = False, reads_late(self.mesh.device)
        at_end = self.state.step >= self.total_steps
        self.records.begin(self.header, self.state.step, self.state.position, at_end=at_end)
        self.records.clock.begin(self.state.step)
        self.meter.start()
        while self.state.step < self.total_steps and not stopped:
            stats: Stats | None = self._step()
            pending, stats = (stats, pending) if late else (None, stats)
            if stats is not None:
                stopped = self._record(stats)
            if self._something_is_due():
                stopped = (pending is not None and self._record(pending)) or stopped
                pending = None
                self._do_what_is_due()
                self.meter.start()
        if pending is not None:
            stopped = self._record(pending) or stopped
        check_replicas(self)
        return stopped

    def close(self) -> None:
        """May be called twice."""
        if self.measuring is not None:
            self.measuring.close()
        self.loader.close()
        self.pace.close()
        self.records.close()
        self.folder.release()

    def marked(self, timer: Phases, step: int) -> Phases:
        """`timer`, and a word at each phase of `step` that this process has come so far."""
        self.faults.step = step

        @contextlib.contextmanager
        def mark(name: str) -> Iterator[None]:
            self.heartbeat.beat(name)
            self.progress.mark()
            with timer(name), self.pace.busy.phase(name):
                self.faults.at(name)
                yield

        return mark

    def _step(self) -> Stats:
        """One optimizer step, begun; what it did is in the `Stats`, still on the device."""
        config, step = self.config, self.state.step + 1
        timer = self.marked(self.meter.phases(step), step)
        self.heartbeat.begin(step)
        self.pace.busy.begin()
        with timer("data"), self.records.clock.spend("data"):
            batches: Sequence[Batch] = self.loader.next_step()
        samples = sum(checksum(batch.sample_ids, self.header.bits) for batch in batches)
        serials = self.saving.serials()
        self.guard.prepare(step)
        stats = train_step(
            self.runnable,
            self.state,
            batches,
            step=step,
            lr=learning_rate(config.optim, step, self.total_steps),
            clip_norm=config.optim.clip_norm,
            guard=self.guard,
            votes=[float(self._asked_to_stop()), float(samples), *self.pace.votes(), *self.saving.votes()],
            phases=timer,
        )
        self.state.step, self.state.position = step, self.loader.position
        return dataclasses.replace(stats, first=self.loader.first, serials=serials)

    def _asked_to_stop(self) -> bool:
        time_is_up = self.limit.is_due()  # asked in every step: it learns from that
        return bool(self.stop) or time_is_up

    def _record(self, stats: Stats) -> bool:
        """
        Judge a step that is over and write its line; True where a rank was asked to stop.

        Raises `GoBack` where too many were left out.
        """
        with self.pace.busy.waits.here():
            self.progress.wait(stats.over)
            loss_sum, tokens, norm, skipped, asked, samples, *votes = stats.numbers.tolist()
        self.records.clock.reached(stats.step)
        self.stop.nothing_to_lose = False
        self.records.samples(
            stats.step, stats.first, stats.first + self.config.train.global_batch, samples, skipped=bool(skipped),
            windows=self.state.passed_over,
        )  # fmt: skip
        self.pace.settle(votes[: self.pace.size], stats.step)
        self.saving.settle(stats.serials, votes[self.pace.size :], stats.step)
        loss = loss_sum / max(tokens, 1.0)
        has_overflowed = overflowed(self, stats, norm)
        self.state.skipped += int(skipped)
        if skipped and not has_overflowed:
            self.meter.pass_over()
            explain(self, stats, loss, norm)
            return bool(asked)
        self.state.tokens += int(tokens)
        if not skipped:
            self.guard.learn(stats.step, loss)
            self.recovery.went_well(stats.step)
        norm_known = None if has_overflowed else norm
        left = self.total_steps - stats.step
        record = self.meter.record(
            stats.step, stats.over, self.state.tokens, int(tokens), loss, stats.lr, norm_known, last=left == 0
        )
        if record is not None:
            self.records.metrics(record)
            self.console.step(
                record, self.total_steps, self.meter.left_seconds(left), self.config.metrics.console_every
            )
        return bool(asked)

    def _due(self, every: int) -> bool:
        return every > 0 and self.state.step % every == 0 and self.state.step < self.total_steps

    def _something_is_due(self) -> bool:
        return (
            self._due(self.config.train.eval_every)
            or self._save_is_due()
            or self._due(self.config.fault.check_replicas_every)
        )

    def _do_what_is_due(self) -> None:
        clock = self.records.clock
        self.heartbeat.outside("between steps")
        if self._due(self.config.train.eval_every):
            with clock.spend("evaluation"):
                self.evaluate(self.config.train.eval_tokens)
        saves = self._save_is_due()
        if saves or self._due(self.config.fault.check_replicas_every):
            check_replicas(self)
        if saves and not self.recovery.is_sound:
            self.saving.put_off(self.state.step)
        elif saves:
            self.state.losses = list(self.guard.losses)
            self.heartbeat.outside("save")
            with clock.spend("checkpoint"):
                self.records.sync()
                self.saving.begin(self.state, self.val_loss())

    def evaluate(self, max_tokens: int | None) -> None:
        """Loss on held-out documents, to the console, the metrics and the next checkpoint."""
        self.pace.busy.interrupt()
        runnable = self.runnable
        runnable.train(False)
        result = evaluate(
            runnable.evaluate, self.mesh, self.prepared, self.config, max_tokens,
            alive=lambda: self.heartbeat.outside("evaluation"),
        )  # fmt: skip
        runnable.train()
        self.val = {"step": self.state.step, "tokens": self.state.tokens, **result}
        say_held_out(self.val, self.console)
        self.records.metrics(self.val)

    def _save_is_due(self) -> bool:
        return self.saving.is_due(self.state.step) and self.state.step < self.total_steps

    def val_loss(self) -> float | None:
        """Of this step; an older evaluation was of another model."""
        return self.val["val_loss"] if self.val.get("step") == self.state.step else None
