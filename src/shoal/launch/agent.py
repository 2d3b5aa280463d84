"""
torch's elastic agent, which starts the workers of this machine and starts them anew, with what shoal knows of its own.

It finds workers that hang, ends at once those that wait for a dead one, does not restart what was asked to stop or will
fail again, lets workers save when a machine joins, and says in one line what it does.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousTimeoutError,
)

from shoal.config import Config
from shoal.errors import EXIT_BAD_INPUT, EXIT_LOST_PEER, EXIT_REQUEUE, LaunchError
from shoal.launch.crashes import Crashes, first_death, how_it_died
from shoal.launch.machines import Machines
from shoal.launch.meeting import Meeting
from shoal.launch.stops import AskedToStop, PassOn, tell
from shoal.launch.watch import Hang, Watch
from shoal.metrics.trackers import Events
from shoal.runs import RunFolder

NO_LIMIT: Final = 1_000_000  # restarts: torch counts them down
CAUSE_SECONDS: Final = 2.0  # a worker that lost a peer may be seen to end before that peer
SLOW_SECONDS: Final = 3.0  # who waits longer for other machines says so
# A worker that these killed had not come so far as to listen to them.
ASKING: Final = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGUSR1)


class Agent(LocalElasticAgent):
    """`why` says, after a run that failed, what it failed of; `asked` whether somebody asked it to stop."""

    def __init__(self, spec: WorkerSpec, config: Config, stop: PassOn, meeting: Meeting) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="shoal-"))  # the workers' pages, and what torch keeps of them
        logs = DefaultLogsSpecs(log_dir=str(self._folder))
        super().__init__(spec=spec, logs_specs=logs, start_method="spawn", exit_barrier_timeout=30)
        self.why = ""
        self.asked = False
        self._launch, self._stop, self._meeting = config.launch, stop, meeting
        self._run_folder = RunFolder.of(config)
        self._watch = Watch(self._run_folder.path / "stacks", self._folder)
        self._crashes = Crashes(config.launch.max_crashes)
        self._lost_since: float | None = None
        self._machines: Machines | None = None  # where there are several
        meeting.rendezvous.on_lost = self._say_lost

    def close(self) -> None:
        self._watch.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _rendezvous(self, worker_group: Any) -> None:
        """Meet the other machines; a signal ends the wait. Raises `LaunchError` where they cannot work together."""
        needed = self._launch.min_nodes or self._launch.nodes
        say = f"waiting at {self._launch.rendezvous} for {needed} machine{'s' * (needed > 1)} or more"
        timer = threading.Timer(SLOW_SECONDS, tell, [say])
        with self._stop.may_raise():
            if self._launch.nodes > 1:
                timer.start()
            try:
                super()._rendezvous(worker_group)
            finally:
                timer.cancel()
        self._meeting.rendezvous.machines = worker_group.group_world_size
        if self._launch.nodes == 1:
            return
        before = self._machines.hosts if self._machines else None
        self._machines = Machines(worker_group.store, worker_group.group_rank, worker_group.group_world_size)
        hosts = self._machines.greet(socket.gethostname(), self._run_folder.lock_id())
        tell(self._machines.describe(before, worker_group.workers[0].world_size))
        if worker_group.group_rank == 0:
            self._record("machines", hosts=hosts, processes=worker_group.workers[0].world_size)

    def _start_workers(self, worker_group: Any) -> Any:
        self._lost_since = None
        self._watch.start([w.global_rank for w in worker_group.workers], self._launch.timeout_seconds)
        return super()._start_workers(worker_group)

    def _monitor_workers(self, worker_group: Any) -> RunResult:
        """Ten times a second."""
        self._stop.reach_all()
        processes = self._processes()
        codes = {local: process.poll() for local, process in processes.items()}
        failed = {local: code for local, code in codes.items() if code}
        running = {local: processes[local] for local, code in codes.items() if code is None}
        pids = {local: process.pid for local, process in running.items()}
        if self._machines:
            self._machines.post(lambda: self._watch.looks(pids))
        hang = self._watch.look(pids, self._machines.others if self._machines else list)
        if hang is not None and any(process.poll() is not None for process in running.values()):
            hang = None  # one ended just now, and perhaps of what the others wait for: the next look sees it among the dead
        if hang is None and running and (not failed or self._others_follow(failed)):
            return RunResult(state=WorkerState.HEALTHY)  # torch's own look may end some: with SIGTERM, and 30 s to obey
        _kill(running.values())
        result: RunResult = super()._monitor_workers(worker_group)
        if hang is None and not result.is_failed():
            return result
        ranks = {worker_group.workers[local].global_rank: local for local in failed}
        self._judge({r: f for r, f in result.failures.items() if r in ranks}, ranks, hang)
        return RunResult(state=WorkerState.FAILED, failures=result.failures)

    def _stop_workers(self, worker_group: Any) -> None:
        """Before they are started anew: where a machine joins they save first, and else they wait for a dead one."""
        if self._machines and self._pcontext is not None:
            news = self._meeting.rendezvous.news
            if news == "joins" or self._machines.regroups():
                self._machines.regroup()
                tell("another machine joins: saving, then starting again with it")
                self._let_save()
            elif news == "left" and any(process.poll() is None for process in self._processes().values()):
                tell("a machine has left, or starts its workers again: starting again from the last checkpoint")
            _kill([process for process in self._processes().values() if process.poll() is None])
        super()._stop_workers(worker_group)

    def _processes(self) -> dict[int, subprocess.Popen[bytes]]:
        """By local rank."""
        assert self._pcontext is not None
        return {local: handler.proc for local, handler in self._pcontext.subprocess_handlers.items()}  # type: ignore[attr-defined]

    def _let_save(self) -> None:
        """Ask the workers to stop, and wait until they have, or until one does not come further."""
        for process in self._processes().values():
            if process.poll() is None:
                process.terminate()
        while running := {local: p.pid for local, p in self._processes().items() if p.poll() is None}:
            codes = {process.poll() for process in self._processes().values()}
            if codes - {None, 0, EXIT_REQUEUE} or self._watch.look(running) is not None:
                return
            time.sleep(0.1)

    def _others_follow(self, failed: Mapping[int, int]) -> bool:
        """Whether those that still run are about to end by themselves, in order or with a better reason."""
        if set(failed.values()) == {EXIT_REQUEUE}:
            return True
        if set(failed.values()) != {EXIT_LOST_PEER}:
            return False
        self._lost_since = self._lost_since or time.monotonic()
        return time.monotonic() - self._lost_since < CAUSE_SECONDS

    def _judge(self, failures: Mapping[int, Any], ranks: Mapping[int, int], hang: Hang | None) -> None:
        """
        Start again or not; record it and say it.

        failures: of those that ended by themselves, by rank; ranks: their local ranks.
        """
        codes = {failure.exitcode for failure in failures.values()}
        if codes == {EXIT_REQUEUE} and self._stop.signal is None and self._machines and self._machines.regroups():
            self._remaining_restarts += 1  # they saved since a machine joins: no failure
            return
        self.asked = self._stop.signal is not None or EXIT_REQUEUE in codes
        if hang is None:
            rank, failure = first_death(failures)
            how, sign = how_it_died(failure.exitcode), self._watch.sign(ranks[rank])
            self.asked = self.asked or failure.exitcode in ASKING
            if self.asked or EXIT_BAD_INPUT in codes:
                self._remaining_restarts = 0
                return
            step = max(sign.step, self._run_folder.last_step())
            where = f"in {sign.phase} of step {sign.step}" if sign.step else f"after step {step}"
            if self._machines and codes == {EXIT_LOST_PEER}:
                self.why = f"lost a worker on another machine {where}"
            else:
                self.why = f"worker {rank} {how} {where}"
                self._record("crashed", rank=rank, how=how, step=step, phase=sign.phase)
        else:
            step = max(hang.step, self._run_folder.last_step())
            self.why = str(hang)
            if self._machines is None or self._machines.first_to("hang"):
                self._record("hang", rank=hang.rank, step=hang.step, phase=hang.phase, why=self.why)
        if self._crashes.add(step):
            self.why += f"; that makes {self._crashes.count} crashes without a step beyond {self._crashes.step}"
            self._remaining_restarts = 0
        elif self.asked:
            self._remaining_restarts = 0
        elif self._remaining_restarts > 0:
            left = "" if self._launch.max_restarts is None else f" ({self._remaining_restarts - 1} restarts left)"
            tell(f"{self.why}; starting again from the last checkpoint{left}")

    def _say_lost(self) -> None:
        tell(
            f"nothing answers at {self._launch.rendezvous} any more: the run goes on, but no machine can join it, and "
            "workers that die cannot be started again until something does"
        )

    def _record(self, event: str, **facts: object) -> None:
        """A line in the run's events."""
        events = Events(self._run_folder.events_file)
        events.say(event, **facts)
        events.close()


def run_workers(config: Config, argv: Sequence[str], stop: PassOn) -> int:
    """Run `shoal ARGV` in the workers of this machine until the run ends; the exit code, see `launch`."""
    lost = ""
    while True:
        try:
            meeting = Meeting.open(config, tell)
        except LaunchError:
            if not lost:
                raise
            tell(f"the run stopped: {lost}. What was saved stands; the same command goes on from there")
            return 1
        agent = Agent(_workers(config, argv, meeting), config, stop, meeting)
        try:
            result = agent.run()
        except AskedToStop:
            tell("stopped while other machines were waited for; the same command goes on")
            return EXIT_REQUEUE
        except LaunchError as error:
            meeting.end(EXIT_BAD_INPUT, str(error))
            raise
        except RendezvousClosedError:
            result = None
        except RendezvousTimeoutError:
            needed = config.launch.min_nodes or config.launch.nodes
            tell(
                f"{needed} machines did not come to {config.launch.rendezvous} within {config.launch.timeout_seconds:.0f} s"
            )
            return 1
        except (RendezvousError, DistError):
            if config.launch.rendezvous is None:
                raise
            lost = f"nothing answers at {config.launch.rendezvous} any more"
            tell(f"{lost}; waiting for it")
            continue
        finally:
            agent.close()
        ended = meeting.ended() if result is None else None
        if result is None:
            tell(f"the run has ended on another machine{f': {ended.why}' if ended and ended.why else ''}")
            return ended.code if ended else 1
        code = _outcome(agent, result)
        meeting.end(code, agent.why)
        return code


def _workers(config: Config, argv: Sequence[str], meeting: Meeting) -> WorkerSpec:
    """`launch.processes` workers of `shoal ARGV`."""
    restarts = config.launch.max_restarts
    return WorkerSpec(
        role="shoal",
        local_world_size=config.launch.processes or 1,
        entrypoint=sys.executable,
        args=("-m", "shoal", *argv),
        rdzv_handler=meeting.rendezvous,
        max_restarts=NO_LIMIT if restarts is None else restarts,
        monitor_interval=0.1,
        local_addr=meeting.address,
    )


def _outcome(agent: Agent, result: RunResult) -> int:
    """The exit code of a run that is over, and a line where it did not finish."""
    if not result.is_failed():
        return 0
    codes = [failure.exitcode for failure in result.failures.values()]
    if EXIT_BAD_INPUT in codes:
        said = [f.message for f in result.failures.values() if f.exitcode == EXIT_BAD_INPUT]
        for message in dict.fromkeys(said):  # most often all ranks found the same
            tell(message)
        agent.why = agent.why or "\n".join(dict.fromkeys(said))
        return EXIT_BAD_INPUT
    if set(codes) == {EXIT_REQUEUE}:
        return EXIT_REQUEUE
    if agent.asked:
        cause = f" ({agent.why})" if agent.why else ""
        tell(f"stopped without saving{cause}; the same command goes on from the last checkpoint, if there is one")
        return EXIT_REQUEUE
    tell(f"the run stopped: {agent.why}. What was saved stands; the same command goes on from there")
    return 1


def _kill(processes: Any) -> None:
    """
    End them now: they wait for one that is dead, and would not listen to SIGTERM before a collective's timeout.

    SIGKILL reaches stopped ones too. One in state D dies when its device answers; it is not waited for.
    """
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # each leads a session of its own
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2.0)
