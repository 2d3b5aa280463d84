"""One process of a run or of a verification, and its errors in terms that a user can act on."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.commands.recipes import tell_of_torch, tell_once
from shoal.errors import (
    EXIT_LOST_PEER,
    EXIT_REQUEUE,
    ConfigError,
    LaunchError,
    LostPeerError,
    MemoryProblem,
    ShoalError,
)
from shoal.system.output import say_error

if TYPE_CHECKING:
    from shoal.config.options import Config
    from shoal.elastic.heartbeat import Heartbeat
    from shoal.mesh.place import Place
    from shoal.run.narrator import Narrator
    from shoal.run.now import Now
    from shoal.run.profiles import Asked
    from shoal.system.signals import StopRequest


@dataclass(frozen=True)
class Trained:
    """The result of `shoal.train`: the run's folder, and whether all steps are done; if not, the same call resumes."""

    folder: Path
    finished: bool


def train_here(config: Config) -> Trained:
    """Train in this process, alone or as one of the processes that torchrun or srun started."""
    from shoal.config.tracker_names import check_installed
    from shoal.mesh.place import is_worker
    from shoal.run.folder import RunFolder
    from shoal.system.signals import StopRequest

    config = _checked(config)
    check_installed(config.track.to)
    tell_of_torch()
    folder = RunFolder.of(config)
    config = place_worker(config, folder.begun()) if is_worker() else _plan_alone(config, folder.begun())
    now = _open_now(config)
    narrator, heartbeat = _open_heartbeat(config, now)
    with (
        contextlib.closing(now),
        contextlib.closing(narrator),
        contextlib.closing(StopRequest(ends_process=False)) as stop,
    ):
        try:
            return Trained(folder.path, finished=not _train(config, stop, heartbeat))
        except (RuntimeError, MemoryError, OSError) as error:
            if problem := _explain(error, config, "; set train.repro to fast"):
                raise problem from error
            raise


def _checked(config: Config) -> Config:
    """Return a config, perhaps not made by `read_config`, with its derived widths. Raises `ConfigError` if it is invalid."""
    from shoal.config.keys import options_of
    from shoal.config.presets import resolve_shape
    from shoal.resolve.checks import DEFAULT, contradictions

    if problems := list(contradictions(config, dict.fromkeys(options_of(config), DEFAULT))):
        raise ConfigError(problems)
    return dataclasses.replace(config, model=resolve_shape(config.model))


def _plan_alone(config: Config, before: Config | None) -> Config:
    """
    Return the config with one process and its threads planned. Raises `LaunchError` if it asks for more processes.

    before: the config of the run to resume; None for a new run.
    """
    from shoal.launch.torchrun import plan_processes
    from shoal.mesh.place import unused_claims
    from shoal.run.console import Console

    count = (config.launch.processes or 1) * config.launch.nodes
    if count > 1:
        raise LaunchError(
            f"shoal.train uses one process, but the config asks for {count}; set launch.processes and launch.nodes to 1, "
            "start the script with torchrun, or use the command shoal train"
        )
    tell_once(unused_claims(config.launch.nodes))
    config = config.replace("launch", processes=1)
    return plan_processes(config, look_for_gpus(), before=before, say=Console().warn)


def look_for_gpus() -> int:
    """Return the number of CUDA devices. Counting may import torch, so the console names this phase if it takes long."""
    from shoal.launch.torchrun import count_gpus
    from shoal.run.console import Console
    from shoal.run.narrator import Narrator

    with contextlib.closing(Narrator.of(Console())) as narrator, narrator.phase("looking for GPUs"):
        return count_gpus()


def place_worker(config: Config, before: Config | None = None) -> Config:
    """
    Return the config of a worker with its threads chosen. Under torchrun or srun, rank 0 first prints its rank and world size.

    before: the config of the run to resume; None for a new run.
    """
    from shoal.launch.torchrun import fit_to_place
    from shoal.mesh.place import check_world, describe_place, read_place, speaks_first

    if speaks_first():
        print(describe_place(), flush=True)
    check_world()
    place = read_place()
    config = fit_to_place(config, place, before)
    if speaks_first() and place.local_world_size < place.world_size:
        _show_layout(config, place)
    return config


def _show_layout(config: Config, place: Place) -> None:
    """Print the layout's ranks by node and device. Does nothing if the nodes' sizes differ."""
    from shoal.config.layout import find_layout
    from shoal.plan.topology import layout_table, node_notes

    nodes, rest = divmod(place.world_size, place.local_world_size)
    layout = find_layout(config.parallel, place.world_size)
    if rest or isinstance(layout, str):
        return
    hosts = [f"node {number}" for number in range(nodes)]
    print("\n".join(layout_table(layout, place.local_world_size, hosts)), flush=True)
    tell_once(node_notes(layout, place.local_world_size))


def train_as_worker(config: Config) -> int:
    """Train as one process of a run; return the exit code."""
    from shoal.mesh.place import is_launched, read_place
    from shoal.system.signals import StopRequest

    now = _open_now(config)
    heartbeat = _begin(config, now)
    stop = StopRequest()
    if not is_launched():
        stop.end_early(say_error if read_place().rank == 0 else lambda text: None)
    try:
        return _exit_code(config, heartbeat, lambda: _train(config, stop, heartbeat), "; set train.repro to fast")
    finally:
        now.close()


def profile_as_worker(config: Config, asked: Asked) -> int:
    """Profile as one process of a run; return the exit code."""
    from shoal.system.signals import StopRequest

    heartbeat = _begin(config)
    stop = StopRequest()

    def work() -> bool:
        heartbeat.outside("importing torch")
        from shoal.training.profile import profile_run

        return profile_run(config, asked, stop, heartbeat)

    return _exit_code(config, heartbeat, work, "; set train.repro to fast")


def verify_as_worker(config: Config) -> int:
    """Compare layouts as one process of a verification; return the exit code."""
    heartbeat = _begin(config)
    heartbeat.rest()  # no hang detection: step times vary too much here; the timeout of collectives still applies

    def work() -> bool:
        heartbeat.outside("importing torch")
        from shoal.bench.parity import verify_here

        verify_here(config, heartbeat)
        return False

    return _exit_code(config, heartbeat, work)


def _train(config: Config, stop: StopRequest, heartbeat: Heartbeat) -> bool:
    """Train; return whether the run was stopped early. Without a launcher of shoal, the first rank watches for alerts."""
    from shoal.launch.torchrun import HOW_IT_ENDED
    from shoal.mesh.place import is_launched, read_place
    from shoal.run.console import Console
    from shoal.trackers.alerts import watched

    watches = not is_launched() and read_place().rank == 0
    with watched(config, Console()) if watches else contextlib.nullcontext() as ends:
        heartbeat.outside("importing torch")
        from shoal.training.loop import train

        stopped = train(config, stop, heartbeat)
        if ends is not None:
            ends(HOW_IT_ENDED[EXIT_REQUEUE if stopped else 0])
    return stopped


def _begin(config: Config, now: Now | None = None) -> Heartbeat:
    """Make this worker end with its launcher and write its stacks on SIGUSR2; return its heartbeat."""
    from shoal.elastic.heartbeat import leave_stacks_when_asked
    from shoal.system.signals import die_with_parent

    die_with_parent()
    leave_stacks_when_asked()
    return _open_heartbeat(config, now)[1]


def _open_now(config: Config) -> Now:
    """Open `now.json` on the first rank, which says there what the run does."""
    from shoal.mesh.place import read_place
    from shoal.run.folder import RunFolder
    from shoal.run.now import Now

    return Now(RunFolder.of(config).now_file if read_place().rank == 0 else None)


def _open_heartbeat(config: Config, now: Now | None = None) -> tuple[Narrator, Heartbeat]:
    """Return the heartbeat of this process and the narrator that names its phases; `now` gets them too."""
    from shoal.elastic.heartbeat import Heartbeat
    from shoal.mesh.place import is_launched, read_place
    from shoal.run.console import Console
    from shoal.run.narrator import Narrator
    from shoal.run.now import TRAINING

    narrator = Narrator(Console(speaks=read_place().rank == 0).note)
    narrates = not is_launched()  # shoal's own launcher narrates itself
    if narrates:
        narrator.watch()

    def tell(phase: str | None) -> None:
        if narrates:
            narrator.begin(phase)
        if now is not None:
            now.say(phase or TRAINING, None if phase else heartbeat.place[0])

    heartbeat = Heartbeat.open(config.launch, tell)
    if now is not None:
        heartbeat.on_progress = now.progress
    return narrator, heartbeat


def _exit_code(config: Config, heartbeat: Heartbeat, work: Callable[[], bool], advice: str = "") -> int:
    """Run `work` and return the exit code: 85 if `work` returns true, which means stopped early on request."""
    from shoal.mesh.place import is_launched

    try:
        return EXIT_REQUEUE if work() else 0
    except (RuntimeError, MemoryError, OSError) as error:
        problem = _explain(error, config, advice)
        if isinstance(problem, LostPeerError):
            if not is_launched():  # shoal's own launcher reports which worker was lost and why
                say_error(str(problem))
            return EXIT_LOST_PEER
        if isinstance(problem, MemoryProblem) and heartbeat.taken > 1:
            say_error(str(problem))  # earlier steps fitted into memory, so a restart may succeed: treat this as a crash
            return 1
        if problem is not None:
            raise problem from error
        raise


def _explain(error: Exception, config: Config, advice: str) -> ShoalError | None:
    """
    Return a torch error as a `ShoalError`, or None if its cause is unknown.

    advice: text to append to the message about a missing deterministic kernel.
    """
    from shoal.mesh.mesh import is_lost_peer
    from shoal.mesh.place import read_place
    from shoal.models.attention import not_deterministic
    from shoal.plan.fit import what_ran_out, what_would_fit
    from shoal.run.folder import RunFolder

    if reason := what_ran_out(error):
        fits = what_would_fit(RunFolder.of(config).with_earlier_choices(config), read_place().world_size)
        return MemoryProblem(f"out of memory: {reason}. {fits}")
    if isinstance(error, RuntimeError) and is_lost_peer(error):
        return LostPeerError(f"lost another process of this run: {str(error).splitlines()[0]}")
    if isinstance(error, RuntimeError) and (operator := not_deterministic(error)):
        return LaunchError(f"{operator} has no deterministic kernel on this device{advice}")
    return None
