"""`shoal profile`: record some steps of a run, and say where their time and memory went."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shoal.commands.flags import Override
from shoal.commands.recipes import decided, resolve_asked, resolve_run, tell_of_torch, tell_once
from shoal.errors import EXIT_REQUEUE, RunError, ShoalError
from shoal.system.output import outlast

# The profiler's library logs each start and stop, and torch each release of memory from before the recording.
QUIET: Final = {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}

if TYPE_CHECKING:
    from shoal.config.options import Config
    from shoal.run.console import Console
    from shoal.run.folder import RunFolder
    from shoal.run.profiles import Steps


def profile(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    outlast()
    for name, level in QUIET.items():
        os.environ.setdefault(name, level)
    source, config = _open(args, overrides)
    tell_of_torch()
    from shoal.launch.torchrun import launch
    from shoal.mesh.place import is_worker
    from shoal.run.folder import RunFolder

    before = source.begun() if source is not None else None
    if is_worker():
        return _work(args, config, source, before)
    from shoal.fault.limit import start_clock

    start_clock()
    with _planned(config, before) as (config, console):
        plan = _Plan.of(args, config, source, console)
    planned = [f"--launch.processes={config.launch.processes}", f"--launch.threads={config.launch.threads}"]
    code = launch(config, [*argv, *planned, f"--steps={plan.steps}", f"--checkpoint={plan.checkpoint}"])
    if code == 0:
        _say(RunFolder.of(config), plan.steps)
    return code


def _open(args: argparse.Namespace, overrides: list[Override]) -> tuple[RunFolder | None, Config]:
    """Return the run to start from, None if a recipe is named, and the config of the run that is trained for the profile."""
    from shoal.run.profiles import config_of_profile

    source = _run_named(args.recipe, overrides)
    if source is None:
        if args.checkpoint:
            raise ShoalError("--checkpoint needs a run to take it from: shoal profile RUN --checkpoint N")
        return None, config_of_profile(decided(resolve_asked(args, overrides)))
    place: list[Override] = [
        ("launch.runs", str(source.path.parent), "the run's folder"),
        ("launch.name", source.path.name, "the run's folder"),
    ]
    # a run's file holds the size that its tokenizer turned out to have, which a recipe may not ask for
    chosen: Override = ("model.vocab_size", "null", "the run's tokenizer")
    named = {key for key, _, _ in overrides}
    config = resolve_run(
        source.config_file, [o for o in (*place, chosen) if o[0] not in named] + overrides, named=False
    )
    if config.model.vocab_size is None:
        config = config.replace("model", vocab_size=source.load_config().model.vocab_size)
    return source, config_of_profile(config)


def _run_named(target: Path | None, overrides: list[Override]) -> RunFolder | None:
    """Return the run that is named by its folder or, if there is no such recipe, by its name; None for a recipe."""
    from shoal.config.run_options import Launch
    from shoal.resolve.recipe import find_recipe
    from shoal.run.folder import RunFolder

    if target is None:
        return None
    runs = next((text for key, text, _ in reversed(overrides) if key == "launch.runs"), Launch().runs)
    folder = RunFolder.named(str(target), Path(runs))
    if not folder.config_file.is_file():
        return None
    is_recipe = not target.is_dir() and find_recipe(target).is_file()
    return None if is_recipe else folder


@dataclass(frozen=True)
class _Plan:
    """The steps to profile, and the step of the checkpoint to start from; 0: the beginning."""

    steps: Steps
    checkpoint: int

    @classmethod
    def of(cls, args: argparse.Namespace, config: Config, source: RunFolder | None, console: Console) -> _Plan:
        """Find the run's length, and with it the steps. Raises `ShoalError` if they are not in the run."""
        from shoal.data.dataset import open_data
        from shoal.plan.length import count_steps
        from shoal.run.profiles import Steps, default_steps, read_ranks
        from shoal.training.run_files import tokens_of

        asked = None if args.steps is None else Steps.read(args.steps)
        read_ranks(args.ranks, (config.launch.processes or 1) * config.launch.nodes)
        past = "" if source is None else tokens_of(source)
        dataset = open_data(config.data, console, rows=config.model.vocab_size, past=past)
        total = count_steps(config.train, config.data.seq_len, len(dataset.rows("train")))
        if asked is not None:
            asked.check(total)
        before = asked.first if asked is not None else total
        checkpoint = _checkpoint(args.checkpoint, source, before)
        return cls(asked or default_steps(total, checkpoint), checkpoint)


def _checkpoint(named: int | None, source: RunFolder | None, before: int) -> int:
    """Return the step of the newest checkpoint before step `before`, or the named one; 0 if there is none."""
    from shoal.checkpoint.saved import listed

    steps = [saved.step for saved in listed(source.checkpoints)] if source is not None else []
    if named and (named not in steps or named >= before):
        usable = ", ".join(str(step) for step in steps if step < before) or "none"
        raise RunError(
            f"--checkpoint {named}: the checkpoints before step {before:,} are {usable}; name one, or 0 for none"
        )
    return named if named is not None else max((step for step in steps if step < before), default=0)


def _work(args: argparse.Namespace, config: Config, source: RunFolder | None, before: Config | None) -> int:
    """Profile as one process of the run; return the exit code."""
    from shoal.commands.worker import place_worker, profile_as_worker
    from shoal.mesh.place import is_launched, read_place
    from shoal.run.console import Console
    from shoal.run.folder import RunFolder
    from shoal.run.profiles import Asked, Steps, read_ranks

    config = place_worker(config, before)
    place = read_place()
    if is_launched():
        plan = _Plan(Steps.read(args.steps), args.checkpoint or 0)
    else:
        plan = _Plan.of(args, config, source, Console(speaks=place.rank == 0))
    asked = Asked(plan.steps, read_ranks(args.ranks, place.world_size), source, plan.checkpoint)
    code = profile_as_worker(config, asked)
    if code == 0 and place.rank == 0 and not is_launched():
        _say(RunFolder.of(config), plan.steps)
    return code


@contextlib.contextmanager
def _planned(config: Config, before: Config | None) -> Iterator[tuple[Config, Console]]:
    """Yield the config with processes and threads planned, and a console; the folder of the profile is locked."""
    from shoal.commands.worker import look_for_gpus
    from shoal.launch.torchrun import plan_processes
    from shoal.mesh.place import unused_claims
    from shoal.run.console import Console
    from shoal.run.folder import RunFolder
    from shoal.run.profiles import check_is_scratch
    from shoal.system.signals import ends_when_asked

    tell_once(unused_claims(config.launch.nodes, config.launch.fewest_nodes))
    console = Console()
    with ends_when_asked(EXIT_REQUEUE):
        config = plan_processes(config, look_for_gpus(), before=before, say=console.warn)
        folder = RunFolder.of(config)
        check_is_scratch(folder)
        folder.lock(config.launch.rendezvous)
        try:
            yield config, console
        except ShoalError:
            folder.remove_unused()
            raise


def _say(run: RunFolder, steps: Steps) -> None:
    """Print what the profile says, and where it is."""
    from shoal.metrics.profile.records import Profile, read_memory
    from shoal.report.profile.table import lines
    from shoal.run.profiles import folder_of

    folder = folder_of(run, steps.first)
    for line in lines(Profile.read(folder), read_memory(folder), folder):
        print(line)
