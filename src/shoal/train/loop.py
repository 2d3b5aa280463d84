"""A training run, in the order in which it happens."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil
import torch

from shoal.checkpoint.load import load_model
from shoal.checkpoint.saved import Saved, listed
from shoal.config import Config, Train
from shoal.data.loader import Batch, Loader
from shoal.data.open import open_data
from shoal.data.prepare import Prepared
from shoal.data.tokenize import tokenizer_folder
from shoal.errors import CheckpointError
from shoal.fault.health import check_finite
from shoal.fault.signals import StopRequest
from shoal.hub.beside import OF_MODEL, TOKENIZER, WEIGHTS, keep, keep_dtypes
from shoal.hub.find import find_model
from shoal.hub.folder import ModelFolder
from shoal.launch.place import LOCKED_BY
from shoal.metrics.console import Console
from shoal.metrics.meter import Meter, settle_dtype
from shoal.metrics.trackers import Events, JsonLines, forget_after
from shoal.models.build import build_model
from shoal.models.family import LanguageModel
from shoal.optim.schedule import learning_rate, replanned
from shoal.parallel.apply import Runnable
from shoal.parallel.mesh import Mesh, check_dtype, open_mesh
from shoal.runs import RunFolder
from shoal.train.assemble import assemble, open_loader
from shoal.train.closing import close_run
from shoal.train.evaluate import evaluate
from shoal.train.saving import Saving
from shoal.train.scaler import SMALLEST
from shoal.train.state import TrainState
from shoal.train.step import Stats, train_step


def train(config: Config) -> None:
    """Train, from the start or from the last checkpoint, as one of the processes of a run."""
    set_threads(config)
    stop = StopRequest()
    with open_mesh(config.train.device, config.launch.timeout_seconds, config.parallel) as mesh:
        run = Run.open(config, mesh, stop)
        try:
            run.train()
        finally:
            run.close()


def set_threads(config: Config) -> None:
    """As many CPU threads as the launcher settled on."""
    if config.launch.threads:
        torch.set_num_threads(config.launch.threads)


@dataclass
class Run:
    """All that a run holds while it goes on. Built once, in the order of its fields."""

    config: Config
    mesh: Mesh
    stop: StopRequest
    console: Console
    folder: RunFolder
    prepared: Prepared
    events: Events | None
    runnable: Runnable
    state: TrainState
    saving: Saving
    loader: Loader
    meter: Meter
    total_steps: int
    val: dict[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(cls, config: Config, mesh: Mesh, stop: StopRequest) -> Run:
        """Open the data, build the model on meta, parallelize, build the optimizer, restore."""
        console = Console(speaks=mesh.is_first)
        folder = RunFolder.of(config)
        if mesh.is_first and os.environ.get(LOCKED_BY) != str(os.getppid()):
            folder.lock()
        prepared = open_data(config.data, console)
        config = settle(config, folder, prepared, mesh)
        rows = prepared.split("train", seq_len=config.data.seq_len, document_mask=config.data.document_mask)
        total_steps = count_steps(config.train, config.data.seq_len, len(rows))
        changed = folder.agree(config)
        before = folder.load_config() if folder.config_file.is_file() else config
        mesh.barrier()  # nobody writes the config before everybody has compared
        with folder.writable():
            events = Events(folder.events_file) if mesh.is_first else None
        say = events.say if events else lambda event, **facts: None
        saving = Saving.open(config, folder.checkpoints, mesh, console, say, prepared.data_id)
        newest = saving.find()
        applied: list[str] = []
        runnable, state = assemble(config, mesh, applied.append, fresh=newest is None)
        if newest is not None:
            saving.restore(newest, state)
        if mesh.is_first:
            with folder.writable():
                write_run_files(folder, config, prepared, state.step)
        loader = open_loader(config, mesh, rows, state.position)
        meter = Meter(config, mesh)
        run = cls(
            config, mesh, stop, console, folder, prepared, events, runnable, state, saving, loader, meter, total_steps
        )
        run._introduce(applied, newest, before, [(d.key, d.before, d.after) for d in changed])
        return run

    def train(self) -> None:
        """The steps, then the end."""
        stopped = self.take_steps()
        self._end(stopped)

    def take_steps(self) -> bool:
        """The steps, and what is due between them; True where somebody asked to stop."""
        lines = JsonLines(self.folder.metrics_file) if self.mesh.is_first else None
        pending: Stats | None = None
        stopped = False
        self.meter.start()
        while self.state.step < self.total_steps and not stopped:
            stats: Stats | None = self._step()
            # On a GPU a step's numbers are read while the next one runs; a CPU has taken the step by now.
            pending, stats = (stats, pending) if self.mesh.device.type == "cuda" else (None, stats)
            if stats is not None:
                stopped = self._record(stats, lines)
            if self._due(self.config.train.eval_every) or self._save_is_due():
                stopped = (pending is not None and self._record(pending, lines)) or stopped
                pending = None
                self._evaluate_if_due()
                if self._save_is_due():
                    self.saving.begin(self.state, self._val_loss())
                self.meter.start()
        if pending is not None:
            stopped = self._record(pending, lines) or stopped
        return stopped

    def close(self) -> None:
        self.loader.close()

    def _step(self) -> Stats:
        """One optimizer step, begun; what it did is in the `Stats`, still on the device."""
        config, step = self.config, self.state.step + 1
        timer = self.meter.phases(step)
        with timer("data"):
            batches: Sequence[Batch] = self.loader.next_step()
        serials = self.saving.serials()
        stats = train_step(
            self.runnable,
            self.state,
            batches,
            step=step,
            lr=learning_rate(config.optim, step, self.total_steps),
            clip_norm=config.optim.clip_norm,
            votes=[float(bool(self.stop)), *self.saving.votes()],
            phases=timer,
        )
        self.state.step, self.state.position = step, self.loader.position
        return dataclasses.replace(stats, serials=serials)

    def _record(self, stats: Stats, lines: JsonLines | None) -> bool:
        """Judge a step that is over and write its line; True where a rank was asked to stop."""
        loss_sum, tokens, norm, asked, *votes = stats.numbers.tolist()
        self.saving.settle(stats.serials, votes, stats.step)
        self.state.tokens += int(tokens)
        loss = loss_sum / max(tokens, 1.0)
        overflowed = self._overflowed(stats.step, norm)
        check_finite(stats.step, loss, 0.0 if overflowed else norm)
        norm_known = None if overflowed else norm
        record = self.meter.record(stats.step, self.state.tokens, int(tokens), loss, stats.lr, norm_known)
        if record is not None and lines is not None:
            lines.write(record)
            self.console.step(record, self.total_steps, self.meter.left_seconds(self.total_steps - stats.step))
        return bool(asked > 0)

    def _overflowed(self, step: int, norm: float) -> bool:
        """Whether float16's loss scale left this step out, with a smaller one to try; said where it is so."""
        scaler = self.state.scaler
        if scaler is None or math.isfinite(norm) or float(scaler.scale) == SMALLEST:
            return False
        self.console.note(
            f"step {step} overflowed in float16 and was left out; the loss scale is {float(scaler.scale):g}"
        )
        self._event("overflowed", step=step, loss_scale=float(scaler.scale))
        return True

    def _due(self, every: int) -> bool:
        return every > 0 and self.state.step % every == 0 and self.state.step < self.total_steps

    def _evaluate_if_due(self) -> None:
        if self._due(self.config.train.eval_every):
            self._evaluate(self.config.train.eval_tokens)

    def _evaluate(self, max_tokens: int | None) -> None:
        """Loss on held-out documents, to the console, the metrics and the next checkpoint."""
        runnable = self.runnable
        runnable.train(False)
        result = evaluate(runnable.evaluate, self.mesh, self.prepared, self.config, max_tokens)
        runnable.train()
        self.val = {"step": self.state.step, "tokens": self.state.tokens, **result}
        self.console.say(
            f"step {self.state.step}: held-out loss {self.val['val_loss']:.4f} nats/token, "
            f"{self.val['val_bits_per_byte']:.4f} bits/byte",
            "bold",
        )
        if self.mesh.is_first:
            lines = JsonLines(self.folder.metrics_file)
            lines.write(self.val)
            lines.close()

    def _save_is_due(self) -> bool:
        return self.saving.is_due(self.state.step) and self.state.step < self.total_steps

    def _val_loss(self) -> float | None:
        """Of this step; an older evaluation was of another model."""
        return self.val["val_loss"] if self.val.get("step") == self.state.step else None

    def _end(self, stopped: bool) -> None:
        """Save; say how to go on, or how well it went."""
        if stopped and self.state.step < self.total_steps:
            saved = self.saving.finish(self.state, self._val_loss())
            self._event("stopped", step=self.state.step)
            where = f"saved at step {self.state.step}" if saved.ok else "NOT saved"
            self.console.say(
                f"stopped: {where} of {self.total_steps}. The same command again goes on from there.", "bold"
            )
            return
        self._evaluate(None)
        saved = self.saving.finish(self.state, self._val_loss())
        self._event("finished", **self.val)
        if self.mesh.is_first:
            close_run(self.config, self.folder, self.prepared, self._whole_model(), self.val, self.console)
        self.mesh.barrier()
        if not saved.ok:
            raise CheckpointError(
                f"all {self.total_steps} steps are taken, and the last checkpoint could not be written: "
                f"{self.saving.folder} has {self._newest()}. Make room there; the same command goes on from it"
            )

    def _newest(self) -> str:
        saved = listed(self.saving.folder)
        return f"one of step {saved[-1].step}" if saved else "none"

    def _whole_model(self) -> LanguageModel | None:
        """The model on one device, or None where no process has it and it would be large."""
        if not self.mesh.layout.sharded and self.mesh.layout.cp == 1:
            return self.runnable.parts[0]
        return whole_model(self.config, listed(self.saving.folder)[-1:], self.runnable.shapes)

    def _event(self, event: str, **facts: object) -> None:
        if self.events is not None:
            self.events.say(event, **facts)

    def _introduce(
        self, applied: list[str], restored: Saved | None, before: Config, changed: list[tuple[str, object, object]]
    ) -> None:
        """Say what is about to happen."""
        config, mesh = self.config, self.mesh
        self._event("started", step=self.state.step, processes=mesh.world_size, device=str(mesh.device))
        self.console.say(f"{self.folder.path}: {self.meter.describe_model()}", "bold")
        self.console.note(
            f"{mesh.world_size} process{'es' * (mesh.world_size > 1)} on {self.meter.device_name}, {config.train.dtype}, "
            f"{config.train.global_batch * config.data.seq_len:,} tokens a step, {self.total_steps} steps"
        )
        for line in (*applied, self.meter.describe_mfu()):
            self.console.note(line)
        if self.config.optim.warmup_steps > self.total_steps:
            self.console.warn(
                f"optim.warmup_steps is {self.config.optim.warmup_steps}, and the run has {self.total_steps} steps: the "
                "learning rate never reaches optim.lr; set fewer"
            )
        if restored is None:
            return
        self.console.say(f"resumed from {restored.folder}", "bold")
        if self.state.step >= self.total_steps:
            self.console.warn(
                f"all {self.total_steps} steps of this run are taken; a larger train.{length_of(config.train)[0]} goes on "
                "with it, another --name starts anew"
            )
            return
        for key, old, new in changed:
            self.console.warn(f"{key} was {old} and is {new} from step {self.state.step + 1} on")
        planned = count_steps(before.train, config.data.seq_len, len(self.loader.rows))
        if text := replanned(config.optim, self.state.step, planned, self.total_steps):
            self.console.warn(text)


def whole_model(config: Config, saved: list[Saved], shapes: Mapping[str, torch.Size]) -> LanguageModel | None:
    """A sharded run's model, read from its last checkpoint to the CPU, if it takes no more than a tenth of the memory."""
    if not saved or 4 * sum(s.numel() for s in shapes.values()) > psutil.virtual_memory().available / 10:
        return None
    model = build_model(config.model, compute_dtype=torch.float32)
    load_model(saved[-1], model, torch.device("cpu"))
    return model


def settle(config: Config, folder: RunFolder, prepared: Prepared, mesh: Mesh) -> Config:
    """
    Fill what only this machine and the tokenizer can say: the vocabulary, the dtype. A collective over the world.

    Raises `DataError` where the vocabulary is too small, `LaunchError` where the device lacks the dtype.
    """
    config = folder.settled(config)
    size = config.model.vocab_size or prepared.vocab_size
    prepared.tokenizer.check_rows(size)
    dtype = settle_dtype(config.train.dtype, mesh)
    check_dtype(dtype, mesh.device)
    return config.replace("model", vocab_size=size).replace("train", dtype=dtype)


def count_steps(train: Train, seq_len: int, rows: int) -> int:
    """The run's length in steps, from whichever of steps, tokens or epochs is given."""
    match length_of(train):
        case "steps", steps:
            return int(steps)
        case "tokens", tokens:
            return math.ceil(tokens / (train.global_batch * seq_len))
        case _, epochs:
            return math.ceil(epochs * rows / train.global_batch)


def length_of(train: Train) -> tuple[str, float]:
    """Which of steps, tokens or epochs says how long the run is, and how much of it."""
    return next((k, v) for k in ("steps", "tokens", "epochs") if (v := getattr(train, k)) is not None)


def write_run_files(folder: RunFolder, config: Config, prepared: Prepared, step: int) -> None:
    """The config and the tokenizer; and no metrics of steps that are taken again."""
    forget_after(folder.metrics_file, step)
    folder.save_config(config)
    origin = None if config.model.from_ is None else find_model(config.model.from_)
    tokenizer = tokenizer_folder(config.data.tokenizer)
    if origin is not None and not (folder.source / WEIGHTS).is_file():
        keep(origin, OF_MODEL if tokenizer != origin else (*OF_MODEL, *TOKENIZER), folder.source)
        keep_dtypes(ModelFolder.open(origin), folder.source)
    if tokenizer is not None and tokenizer != origin:
        keep(tokenizer, TOKENIZER, folder.tokenizer)
    shutil.copyfile(prepared.folder / "tokenizer.json", folder.tokenizer_file)
