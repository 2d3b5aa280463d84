"""The messages that a run prints before its first step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.checkpoint.saved import Saved
from shoal.hub.find import find_model
from shoal.metrics.machine import bits_depend_on, what_differs
from shoal.optim.schedule import replanned
from shoal.plan.length import count_steps, length_of
from shoal.system.output import on_one_line
from shoal.training.last_words import already_taken
from shoal.training.prediction import say_prediction
from shoal.training.run import Run
from shoal.training.start_facts import start_facts


def introduce(run: Run) -> None:
    """Describe the run to the user before its first step, and record the start. A collective over the world."""
    machine = bits_depend_on(run.mesh.device)
    last = run.files.last_machine()
    run.files.event("started", **start_facts(run, machine))
    run.files.track(run.config.track)
    _describe(run)
    _warn_of_length(run)
    if unheard := [name for name in run.dataset.parts if name not in run.dataset.held_out_rows()]:
        run.console.warn(
            f"not evaluated, since the held-out documents of each fill no row of data.seq_len {run.config.data.seq_len:,}: "
            f"{', '.join(unheard)}"
        )
    source = run.config.model.from_
    if source is not None:
        how = f"weights were loaded from {found_at(source, run.config.model.kept)} (model.from)"
        fresh = run.start.restored is None
        run.console.say(how if fresh else f"{how} when the run began; now they come from the checkpoint")
    if run.start.restored is not None:
        _describe_resume(run, run.start.restored, last, machine)


def _describe(run: Run) -> None:
    """Say what is trained, on what, and how it is parallelized."""
    config, mesh, meter = run.config, run.mesh, run.watch.meter
    run.console.say(f"{on_one_line(run.folder.path)}: {meter.describe_model()}", "bold")
    run.console.note(
        f"{mesh.world_size} process{'es' * (mesh.world_size > 1)} on {meter.device_name}, {config.train.dtype}, "
        f"{config.train.global_batch * config.data.seq_len:,} tokens a step, {run.total_steps} steps"
    )
    for line in filter(None, (*run.start.applied, meter.describe_mfu())):
        run.console.note(line)
    if mesh.is_first:
        say_prediction(run)


def _warn_of_length(run: Run) -> None:
    """Warn of a step that reads the corpus more than once, and of a warmup longer than the run."""
    config, rows, length = run.config, len(run.loader.rows), length_of(run.config.train)
    if config.train.global_batch > rows:
        run.console.warn(
            f"one step reads the corpus {config.train.global_batch / rows:.1f} times: train.global_batch is "
            f"{config.train.global_batch:,} rows of {config.data.seq_len:,} tokens, and the corpus has {rows:,}. "
            f"train.{length[0]} {length[1]:g} is {run.total_steps * config.train.global_batch / rows:.1f} epochs; for "
            "more steps set a smaller train.global_batch"
        )
    # A config with train.steps was warned about when it was resolved
    if config.train.steps is None and config.optim.warmup_steps > run.total_steps:
        run.console.warn(
            f"optim.warmup_steps is {config.optim.warmup_steps}, and the run has {run.total_steps} steps: the "
            "learning rate never reaches optim.lr; set a smaller optim.warmup_steps"
        )


def _describe_resume(run: Run, restored: Saved, last: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
    """Say from where the run resumes, and what differs from the last start."""
    run.console.say(f"resumed from {restored.folder}", "bold")
    if run.state.step >= run.total_steps:
        run.console.warn(already_taken(run.config, run.state.step))
        return
    if last and (differs := what_differs(last, machine)):
        run.console.warn(f"bits may differ from here on: {differs} since the last start")
    for each in run.start.changed:
        if each.key == "launch.threads" and "threads" in last:
            continue  # `what_differs` reports it
        if each.key == "launch.rendezvous":
            continue  # each Slurm job has another
        run.console.warn(f"{each.key} was {each.before} and is {each.after} from step {run.state.step + 1} on")
    planned = count_steps(run.start.before.train, run.config.data.seq_len, len(run.loader.rows))
    if text := replanned(run.config.optim, run.state.step, planned, run.total_steps):
        run.console.warn(text)


def found_at(name: str, kept: Path | None) -> str:
    """Return "OWNER/NAME, models/OWNER/NAME": the name as given, and the folder if it differs."""
    folder = str(find_model(name, kept))
    return folder if folder == name else f"{name}, {folder}"
