"""What a person is told before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shoal.checkpoint.saved import Saved
from shoal.config.options import Config
from shoal.hub.find import find_model
from shoal.metrics.machine import bits_depend_on, what_differs
from shoal.optim.schedule import replanned
from shoal.plan.length import count_steps, length_of
from shoal.system.output import on_one_line
from shoal.training.last_words import already_taken

if TYPE_CHECKING:
    from shoal.training.loop import Run


def introduce(
    run: Run, applied: list[str], restored: Saved | None, before: Config, changed: list[tuple[str, object, object]]
) -> None:
    """
    Say what is about to happen.

    applied: a line for each thing that was done to the model; restored: what the run goes on from; before, changed: the
    config it had, and (option, then, now).
    """
    config, mesh = run.config, run.mesh
    machine = bits_depend_on(mesh.device)
    last = run.records.last_machine()
    run.records.event(
        "started", step=run.state.step, processes=mesh.world_size, device=str(mesh.device), machine=machine
    )
    run.console.say(f"{on_one_line(run.folder.path)}: {run.meter.describe_model()}", "bold")
    run.console.note(
        f"{mesh.world_size} process{'es' * (mesh.world_size > 1)} on {run.meter.device_name}, {config.train.dtype}, "
        f"{config.train.global_batch * config.data.seq_len:,} tokens a step, {run.total_steps} steps"
    )
    for line in filter(None, (*applied, run.meter.describe_mfu())):
        run.console.note(line)
    rows, length = len(run.loader.rows), length_of(config.train)
    if config.train.global_batch > rows:
        run.console.warn(
            f"one step reads the corpus {config.train.global_batch / rows:.1f} times: train.global_batch is "
            f"{config.train.global_batch:,} rows of {config.data.seq_len:,} tokens, and the corpus has {rows:,}. "
            f"train.{length[0]} {length[1]:g} is {run.total_steps * config.train.global_batch / rows:.1f} epochs; a smaller "
            "train.global_batch takes more steps"
        )
    if config.train.steps is None and config.optim.warmup_steps > run.total_steps:  # else the config has said so
        run.console.warn(
            f"optim.warmup_steps is {run.config.optim.warmup_steps}, and the run has {run.total_steps} steps: the "
            "learning rate never reaches optim.lr; set fewer"
        )
    source = config.model.from_
    if source is not None:
        how = f"weights were loaded from {found_at(source, config.model.kept)} (model.from)"
        run.console.say(how if restored is None else f"{how} when the run began; now they are the checkpoint's")
    if restored is None:
        return
    run.console.say(f"resumed from {restored.folder}", "bold")
    if run.state.step >= run.total_steps:
        run.console.warn(already_taken(config, run.state.step))
        return
    if last and (differs := what_differs(last, machine)):
        run.console.warn(f"bits may differ from here on: {differs} since the last start")
    for key, old, new in changed:
        if key == "launch.threads" and "threads" in last:
            continue  # said
        run.console.warn(f"{key} was {old} and is {new} from step {run.state.step + 1} on")
    planned = count_steps(before.train, config.data.seq_len, rows)
    if text := replanned(config.optim, run.state.step, planned, run.total_steps):
        run.console.warn(text)


def found_at(name: str, kept: Path | None) -> str:
    """ "OWNER/NAME, models/OWNER/NAME": what a person wrote, and the folder where that is another one."""
    folder = str(find_model(name, kept))
    return folder if folder == name else f"{name}, {folder}"
