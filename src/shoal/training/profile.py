"""
Profiling a run: take its steps as `shoal train` does, and record some of them.

    profile_run
      prepare            an own folder, perhaps with another run's checkpoint
      take_steps         up to the last step asked for; `Recording` records those asked for
      Recording.write    the trace, costs and memory of this rank
      merge              all ranks' records in one file, by the first rank

Nothing is evaluated, saved or sampled: steps alone are the same with and without the recording, to the last bit.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from shoal.config.options import Config
from shoal.elastic.heartbeat import Heartbeat
from shoal.errors import RunError
from shoal.fault.compiling import told_of_compilations
from shoal.mesh.mesh import Mesh, open_mesh
from shoal.metrics.profile.costs import modules, operators, outside_operators, overlap, phases, timeline
from shoal.metrics.profile.memory import find_peak
from shoal.metrics.profile.recorder import LOSS, WARNED_BYTES, ModuleRanges, PhaseRanges, Recorder, in_range
from shoal.metrics.profile.records import Profile, RankMemory, RankProfile, read_json, write_json, write_memory
from shoal.metrics.profile.snapshot import AllocatorHistory
from shoal.metrics.profile.trace import Trace, build, enrich, read_events, separate_transfers, write_events
from shoal.parallel.recompute import Compiled
from shoal.run.folder import RunFolder
from shoal.run.profiles import Asked, Steps, folder_of, prepare
from shoal.system.signals import StopRequest
from shoal.training.compile_check import check_compiled
from shoal.training.health import GoBack
from shoal.training.loop import reads_late, record, set_threads, take_step
from shoal.training.opening import introduce
from shoal.training.profile_memory import bytes_by_module
from shoal.training.run import Run
from shoal.training.step import Stats


def profile_run(config: Config, asked: Asked, stop: StopRequest, heartbeat: Heartbeat) -> bool:
    """
    Train and record, as one process of a run; `config` has the run's own name. Return True if it was stopped early.

    The folder of the profile is `folder_of(RunFolder.of(config), asked.steps.first)`.
    """
    set_threads(config)
    heartbeat.outside("meeting the other processes")
    heartbeat.rest()  # a recorded step may take many times as long; the timeout of collectives still applies
    with open_mesh(config.train.device, config.launch.timeout_seconds, config.parallel) as mesh:
        return record_in(mesh, config, asked, stop, heartbeat)


def record_in(mesh: Mesh, config: Config, asked: Asked, stop: StopRequest, heartbeat: Heartbeat | None = None) -> bool:
    """Train and record in an open mesh. Return True if the run was stopped early."""
    _prepare(config, asked, mesh)
    run = Run.open(config, mesh, stop, heartbeat)
    try:
        return _record_run(run, asked)
    finally:
        run.close()


def _prepare(config: Config, asked: Asked, mesh: Mesh) -> None:
    """Prepare the folder on the first rank. A collective over the world. Raises `RunError` on all ranks if that fails."""
    problem = ""
    if mesh.is_first:
        try:
            prepare(RunFolder.of(config), asked.source, asked.source_step)
        except RunError as error:
            problem = str(error)
    if problem := mesh.first_problem(problem):
        raise RunError(problem)


def _record_run(run: Run, asked: Asked) -> bool:
    """Take the steps up to the last one asked for, then write what was recorded. Collectives over the world."""
    asked.steps.check(run.total_steps)
    introduce(run)
    folder = folder_of(run.folder, asked.steps.first)
    if run.mesh.is_first:
        with run.folder.writable():
            _empty(folder)
    run.mesh.barrier()
    recording = Recording(run, asked.steps) if run.mesh.place.rank in asked.ranks else None
    with told_of_compilations(run.watch.heartbeat, compiles=run.config.train.compile):
        if run.runnable.compiled and run.config.train.compile_check:
            check_compiled(run)
        if _take_steps(run, asked.steps, recording):
            run.console.say(f"stopped at step {run.state.step}, before the end of the profile", "bold")
            return True
    run.watch.heartbeat.outside("writing the profile")
    if recording is not None:
        with run.folder.writable():
            recording.write(folder)
    run.mesh.barrier()
    if run.mesh.is_first:
        with run.folder.writable():
            merge(run, asked, folder)
    return False


def _empty(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()


def _take_steps(run: Run, steps: Steps, recording: Recording | None) -> bool:
    """Take the steps in the order of `training/loop.py`. Return True if a rank was asked to stop before the last one."""
    pending: Stats | None = None
    late = reads_late(run.mesh.device)
    run.files.begin(run.header, run.state.step, run.state.position, run.state.quarantined, at_end=False)
    run.files.clock.begin(run.state.step)
    run.watch.meter.start()
    try:
        while run.state.step < steps.last:
            with _recorded(recording, run.state.step + 1):
                stats: Stats | None = take_step(run)
                pending, stats = (stats, pending) if late else (None, stats)
                stopped = stats is not None and record(run, stats)
            if stopped and run.state.step < steps.last:
                return True
        if pending is not None:
            record(run, pending)
    except GoBack as back:
        raise RunError(
            f"too many steps in a row were skipped before step {steps.last}: such steps are not worth a profile. shoal train "
            "finds out why"
        ) from back
    finally:
        if recording is not None:
            recording.close()
    return False


@contextlib.contextmanager
def _recorded(recording: Recording | None, step: int) -> Iterator[None]:
    if recording is None:
        yield
        return
    recording.begin(step)
    yield
    recording.end()


class Recording:
    """The recording of one rank. It changes nothing in the run before the first step asked for."""

    def __init__(self, run: Run, steps: Steps) -> None:
        self._run, self._asked = run, steps
        self._recorder = Recorder(run.mesh.device)
        self._ranges = ModuleRanges(run.runnable.parts.values(), lambda module: isinstance(module.forward, Compiled))
        self._history = AllocatorHistory(run.mesh.device)
        self._before: list[float] = []  # seconds of each step without the profiler
        self._recorded: list[float] = []  # seconds of each recorded step
        self._is_recorded, self._begun = False, 0.0
        self.rank = run.mesh.place.rank

    def begin(self, step: int) -> None:
        """Note that `step` begins; record from the first one asked for on."""
        if step == self._asked.first:
            self._start()
        self._recorder.begin(step)
        self._is_recorded, self._begun = self._recorder.is_on, time.perf_counter()

    def end(self) -> None:
        """Note that the step is over."""
        seconds = time.perf_counter() - self._begun
        if self._is_recorded:
            self._recorded.append(seconds)
        elif not self._recorded:
            self._before.append(seconds)
        self._recorder.end()
        self._recorder.check()

    def _start(self) -> None:
        """Name the phases, modules and the loss, and record."""
        watch, runnable = self._run.watch, self._run.runnable
        watch.phases = watch.phases.also(PhaseRanges(self._recorder.check))
        runnable.loss = in_range(LOSS, runnable.loss)
        self._ranges.open()
        self._history.start()
        self._recorder.start()

    def close(self) -> None:
        """Stop recording."""
        self._recorder.stop()
        self._ranges.close()

    def write(self, folder: Path) -> None:
        """Write the trace of this rank, and its part of the summary and of the memory. Raises `OSError`."""
        path, raw = folder / f"rank{self.rank}.trace.json.gz", folder / f"rank{self.rank}.raw"
        self._recorder.export(raw)
        events = read_events(raw)
        raw.unlink()
        separate_transfers(events)
        trace = build(events["traceEvents"], [*self._ranges.names, LOSS])
        enrich(events, trace, self.rank)
        size = write_events(path, events)
        profile = self._profile(trace, path.name, size, len(events["traceEvents"]))
        memory = self._memory(trace)
        write_json(folder / f"rank{self.rank}.json", {"profile": profile.as_json(), "memory": asdict(memory)})
        self._warn(size)

    def _profile(self, trace: Trace, name: str, size: int, events: int) -> RankProfile:
        on_device = self._run.mesh.device.type == "cuda"
        usual = self._before[1:] or self._before  # the first step compiles and fills caches
        return RankProfile(
            rank=self.rank, device=self._run.mesh.device.type, trace=name, trace_bytes=size, events=events,
            steps=[step.step for step in trace.steps], step_seconds=self._recorded,
            usual_step_seconds=statistics.median(usual) if usual else None,
            recording_bytes=self._recorder.grown_bytes, stopped_early=self._recorder.is_full,
            phase_seconds=phases(trace), outside_seconds=outside_operators(trace),
            operators=operators(trace, on_device=on_device), modules=modules(trace), overlap=overlap(trace),
            timeline=timeline(trace),
        )  # fmt: skip

    def _memory(self, trace: Trace) -> RankMemory:
        peak = find_peak(trace, 1 if self._run.mesh.device.type == "cuda" else 0)
        return RankMemory(
            rank=self.rank, modules=bytes_by_module(self._run.state, peak.by_module, trace.modules), peak_bytes=peak.bytes,
            peak_seconds=peak.seconds, other_bytes=peak.other_bytes, cuda=self._history.read(),
        )  # fmt: skip

    def _warn(self, size: int) -> None:
        grown = f"{self._recorder.grown_bytes / 2**30:.1f} GiB"
        if self._recorder.is_full:
            self._run.console.warn(
                f"recording stopped in step {self._asked.first + len(self._recorded) - 1}: its events took {grown} of memory; profile fewer steps"
            )
        elif self._recorder.grown_bytes > WARNED_BYTES:
            self._run.console.warn(
                f"the recording took {grown} of memory and {size / 2**20:.0f} MiB on disk; fewer steps take less"
            )


def merge(run: Run, asked: Asked, folder: Path) -> None:
    """Write the records of all ranks into one file each, on the first rank. Ranks on other disks are not in them."""
    files = sorted(folder.glob("rank*.json"), key=lambda path: int(path.stem.removeprefix("rank")))
    found = [read_json(path) for path in files]
    layout = {axis: size for axis, size in asdict(run.mesh.layout).items() if isinstance(size, int)}
    profile = Profile(
        run=run.config.launch.name or "", first=asked.steps.first, last=asked.steps.last,
        world_size=run.mesh.world_size, layout=layout, total_steps=run.total_steps,
        ranks=[RankProfile.of_json(each["profile"]) for each in found],
    )  # fmt: skip
    write_memory(folder, [RankMemory.of_json(each["memory"]) for each in found])
    profile.write(folder)
    for path in files:
        path.unlink()
    run.files.event("profiled", step=run.state.step, first=asked.steps.first, last=asked.steps.last)
    if missing := len(asked.ranks) - len(found):
        run.console.warn(f"{missing} ranks wrote their profile to another disk: {folder} is not shared by all nodes")
