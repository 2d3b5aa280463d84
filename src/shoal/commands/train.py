"""`shoal train` and `shoal verify`: plan and start the processes, or work as one of them."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from shoal.commands.flags import Override
from shoal.commands.recipes import decided, resolve_asked, tell_of_torch, tell_once
from shoal.commands.sizes import kept_sizes, sizes_for
from shoal.errors import EXIT_REQUEUE, ShoalError
from shoal.system.output import on_one_line, outlast

if TYPE_CHECKING:
    from shoal.config.options import Config
    from shoal.data.dataset import Dataset
    from shoal.run.console import Console
    from shoal.run.folder import RunFolder

VERIFIED = "verify-"  # prefix of a run's name for the folder of its certificate


def train(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    outlast()
    asked = resolve_asked(args, overrides)
    config, undecided = asked.config, asked.undecided
    tell_of_torch()
    from shoal.commands.worker import place_worker, train_as_worker
    from shoal.config.tracker_names import check_installed
    from shoal.fault.limit import start_clock
    from shoal.launch.command import hand_on
    from shoal.launch.torchrun import launch
    from shoal.mesh.place import is_worker
    from shoal.run.folder import RunFolder
    from shoal.run.now import Now

    check_installed(config.track.to)
    before = RunFolder.of(config).begun()
    if is_worker():
        return train_as_worker(place_worker(decided(asked), before))
    start_clock()
    hand_on(["shoal", *argv])
    with (
        _planned(config, before, undecided, before) as (config, folder, console, left),
        contextlib.closing(Now(folder.now_file)) as now,
    ):
        from shoal.data.dataset import open_data
        from shoal.training.run_files import tokens_of

        console.on_progress = now.progress
        past = tokens_of(folder)
        dataset = open_data(config.data, console, rows=config.model.vocab_size, past=past)
        dataset.rows("train")
        dataset.held_out_rows()  # a split too small for a row is an error now, not after the workers have started
        if folder.config_file.is_file() and _is_finished(config, folder, dataset, console):
            now.close("end")
            return 0
        if left:
            now.say("trying layouts")
            config = sizes_for(config, left, dataset, console, config.launch.auto_seconds)
        now.say("starting the workers")
    code = launch(config, [*argv, *_planned_flags(config, undecided)])
    if config.metrics.report and code != EXIT_REQUEUE:  # a preempted process has seconds left
        from shoal.commands.report import leave_report

        folder.release()  # this process has ended its workers, and a report calls a locked run running
        leave_report(folder.path, console)
    return code


def verify(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    asked = resolve_asked(args, overrides)
    config, undecided = asked.config, asked.undecided
    tell_of_torch()
    from shoal.commands.worker import place_worker, verify_as_worker
    from shoal.launch.torchrun import launch
    from shoal.mesh.place import is_worker
    from shoal.run.folder import RunFolder

    chosen = RunFolder.of(config).begun() if undecided else None
    if is_worker():
        config = decided(asked)
    config = config.replace("launch", name=f"{VERIFIED}{config.launch.name}", max_restarts=0)
    if is_worker():
        return verify_as_worker(place_worker(config))
    with _planned(config, None, undecided, chosen) as (config, folder, console, left):
        certificate = folder.path / "certificate.json"
        certificate.unlink(missing_ok=True)
        from shoal.data.dataset import open_data

        dataset = open_data(config.data, console, rows=config.model.vocab_size)
        config = sizes_for(config, left, dataset, console, 0)
    code = launch(config, [*argv, *_planned_flags(config, undecided)])
    if code != 0 or not certificate.is_file():
        return code or 1
    print(f"wrote {on_one_line(certificate)}: versions, device, layout and every comparison")
    return 0 if json.loads(certificate.read_text())["passed"] else 1


@contextlib.contextmanager
def _planned(
    config: Config, before: Config | None, undecided: Mapping[str, str], chosen: Config | None
) -> Iterator[tuple[Config, RunFolder, Console, Mapping[str, str]]]:
    """
    Yield the config with processes and threads planned, the run's locked folder, a console, and the sizes still undecided.

    A signal inside the block ends the command. before: the config of the run to resume; None for a new run. chosen: the config of
    the run whose choice of `undecided` sizes is kept; None if there is none.
    """
    from shoal.commands.worker import look_for_gpus
    from shoal.launch.torchrun import plan_processes
    from shoal.mesh.place import unused_claims
    from shoal.run.console import Console
    from shoal.run.folder import RunFolder
    from shoal.system.signals import ends_when_asked

    console, folder = Console(), RunFolder.of(config)
    with ends_when_asked(EXIT_REQUEUE), _noted(folder, config.launch.nodes):
        tell_once(unused_claims(config.launch.nodes, config.launch.fewest_nodes))
        gpus = look_for_gpus()
        if undecided and (kept := kept_sizes(config, undecided, chosen, gpus, console.note)):
            config, undecided = kept, {}
        config = plan_processes(config, gpus, before=before, say=console.warn, has_sizes=not undecided)
        tell_once(_notes_on_nodes(config))
        folder.agree(config)
        folder.lock(config.launch.rendezvous)
        try:
            yield config, folder, console, undecided
        except ShoalError:
            folder.remove_unused()
            raise


@contextlib.contextmanager
def _noted(folder: RunFolder, nodes: int) -> Iterator[None]:
    """Note this start, and an error that ends it in this block, for launchers on other nodes that would wait for this one."""
    from shoal.run.starts import Starts

    starts = Starts(folder.launchers_file)
    if nodes > 1:
        starts.begin()
    try:
        yield
    except ShoalError as error:
        if nodes > 1 or folder.launchers_file.is_file():
            starts.fail(str(error))
        raise


def _notes_on_nodes(config: Config) -> list[str]:
    """Return a note for each axis that should be inside a node but is not."""
    from shoal.config.layout import find_layout
    from shoal.plan.topology import node_notes

    processes = config.launch.processes or 1
    layout = find_layout(config.parallel, processes * config.launch.nodes)
    return [] if isinstance(layout, str) else node_notes(layout, processes)


def _planned_flags(config: Config, undecided: Mapping[str, str]) -> list[str]:
    """Return the planned processes and threads as flags for the workers, and the chosen sizes in place of auto."""
    from shoal.resolve.undecided import flags_of

    planned = [f"--launch.processes={config.launch.processes}", f"--launch.threads={config.launch.threads}"]
    return [*planned, *flags_of(config, undecided)]


def _is_finished(config: Config, folder: RunFolder, dataset: Dataset, console: Console) -> bool:
    """Return whether the run has taken all its steps, and if so print its result again."""
    from shoal.run.narrator import Narrator
    from shoal.training.last_words import finished, say_result_again

    with contextlib.closing(Narrator.of(console)) as narrator, narrator.phase("checking the last checkpoint"):
        result = finished(config, folder, dataset)
    if result is not None:
        say_result_again(config, folder, result, console)
    return result is not None
