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
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

from shoal.config.options import Config
from shoal.elastic.crashes import FOLLOWS, Crashes, first_death, how_it_died
from shoal.elastic.machines import Machines, shared_settings
from shoal.elastic.oom import kernel_kills
from shoal.elastic.rendezvous import Meeting
from shoal.elastic.stops import SignalForwarder
from shoal.elastic.watch import Hang, Watch
from shoal.errors import EXIT_BAD_INPUT, EXIT_LOST_PEER, EXIT_REQUEUE
from shoal.plan.fit import what_would_fit
from shoal.run.console import Console
from shoal.run.events import Events
from shoal.run.folder import RunFolder
from shoal.run.narrator import Narrator
from shoal.system.output import say_error

NO_LIMIT: Final = 1_000_000  # restarts: torch counts them down
CAUSE_SECONDS: Final = 2.0  # a worker that lost a peer may be seen to end before that peer
SLOW_SECONDS: Final = 3.0  # who waits longer for other machines says so
_STARTS: Final = {"start": "starting the workers"}  # phases whose names say too little to a person
# A worker that these killed had not come so far as to listen to them.
ASKING: Final = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGUSR1)


class Agent(LocalElasticAgent):
    """`why` says, after a run that failed, what it failed of; `asked` whether somebody asked it to stop."""

    def __init__(
        self, spec: WorkerSpec, config: Config, stop: SignalForwarder, meeting: Meeting, crashes: Crashes
    ) -> None:
        """crashes: of this launcher, also before it came to this meeting."""
        self._folder = Path(tempfile.mkdtemp(prefix="shoal-"))  # the workers' pages, and what torch keeps of them
        logs = DefaultLogsSpecs(log_dir=str(self._folder))
        super().__init__(spec=spec, logs_specs=logs, start_method="spawn", exit_barrier_timeout=30)
        self.why = ""
        self.asked = False
        self.too_large = False  # for the memory there is
        self.alone_at_fault = False  # it is this machine whose workers die
        self.ended_early = False  # by us, before a step was taken
        self._config = config
        self._launch, self._stop, self._meeting = config.launch, stop, meeting
        self._run_folder = RunFolder.of(config)
        self._watch = Watch(self._run_folder.path / "stacks", self._folder)
        self._narrator = Narrator(Console().note)
        self._crashes, self._elsewhere = crashes, Crashes(3 * crashes.most)
        self._lost_since: float | None = None
        self._kernel_kills = 0  # before these workers were started
        self._world_size = 1
        self._machines: Machines | None = None  # where there are several
        meeting.rendezvous.on_lost = self._say_lost

    def close(self) -> None:
        self._narrator.close()
        self._watch.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def others_can_go_on(self) -> bool:
        """Whether there are enough machines without this one."""
        return self._machines is not None and len(self._machines.hosts) > self._launch.fewest_nodes

    @property
    def met(self) -> bool:
        """Whether it has taken part in a round with others."""
        return self._machines is not None

    def _rendezvous(self, worker_group: Any) -> None:
        """Meet the other machines; a signal ends the wait. Raises `LaunchError` where this one cannot work with them."""
        timer = threading.Timer(SLOW_SECONDS, self._say_what_it_waits_for)
        with self._stop.may_raise():
            if self._launch.nodes > 1:
                timer.start()
            try:
                _in_thread(lambda: super(Agent, self)._rendezvous(worker_group))
                while self._launch.nodes > 1 and not self._greet(worker_group):
                    _in_thread(lambda: super(Agent, self)._rendezvous(worker_group))
            finally:
                timer.cancel()
        self._meeting.rendezvous.machines = worker_group.group_world_size

    def _greet(self, worker_group: Any) -> bool:
        """Whether all can work together; else some leave. Raises `LaunchError` where it is this one that has to."""
        before = self._machines
        machines = Machines(worker_group.store, worker_group.group_rank, worker_group.group_world_size)
        stays = machines.greet(socket.gethostname(), shared_settings(self._config), stays=before is not None)
        if not stays:
            say_error(f"{machines.others_differ}: meeting without what differs")
            time.sleep(1.0)  # until those have left
            return False
        self._machines = machines
        say_error(machines.describe(before.hosts if before else None, worker_group.workers[0].world_size))
        if worker_group.group_rank == 0:
            self._record("machines", hosts=machines.hosts, processes=worker_group.workers[0].world_size)
        return True

    def _say_what_it_waits_for(self) -> None:
        needed, place = self._launch.fewest_nodes, self._launch.rendezvous
        if self._meeting.rendezvous.is_full:
            say_error(f"all {self._launch.nodes} machines are there: waiting at {place} until one is missing")
        else:
            say_error(
                f"waiting at {place} for {needed} machine{'s' * (needed > 1)} or more that run this command in the same folder "
                f"of runs, {self._run_folder.path.parent.resolve()}"
            )

    def _start_workers(self, worker_group: Any) -> Any:
        self._lost_since, self._kernel_kills = None, kernel_kills()
        self._world_size = worker_group.workers[0].world_size
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
        if worker_group.group_rank == 0:
            self._narrate()
        if running and self._stop.grace_is_over and not self._watch.taken(processes):
            return self._end_early(worker_group, running.values())
        if self._machines:
            self._machines.post(lambda: self._watch.statuses(pids))
        hang = self._watch.find_hang(pids, self._machines.others if self._machines else list)
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

    def _narrate(self) -> None:
        """Say what the first worker does, where that is no step like those before it and takes long."""
        sign = self._watch.sign(0)
        if not sign.step and not sign.taken:
            phase: str | None = _STARTS.get(sign.phase, sign.phase)
        elif not sign.taken and sign.in_step:
            phase = "first step, compiling" if self._config.train.compile else "first step"
        else:
            phase = None if sign.in_step else sign.phase
        self._narrator.begin(phase, tell=phase != "end")  # the last words are on the screen by then, with all that time
        self._narrator.look()

    def _end_early(self, worker_group: Any, running: Iterable[Any]) -> RunResult:
        """They were asked to stop before the first step, and there is nothing that they would save."""
        _kill(running)
        self.asked = self.ended_early = True
        self._remaining_restarts = 0
        return RunResult(state=WorkerState.FAILED, failures=super()._monitor_workers(worker_group).failures)

    def _stop_workers(self, worker_group: Any) -> None:
        """Before they are started anew: where a machine joins they save first, and else they wait for a dead one."""
        if self._machines and self._pcontext is not None:
            news = self._meeting.rendezvous.news
            if news == "joins" or self._machines.is_regrouping():
                self._machines.request_regroup()
                say_error("another machine joins: saving, then starting again with it")
                self._let_save()
            elif news == "left" and any(process.poll() is None for process in self._processes().values()):
                say_error(
                    f"a machine has left, or starts its workers again: starting again from {self._last_checkpoint()}"
                )
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
            if codes - {None, 0, EXIT_REQUEUE} or self._watch.find_hang(running) is not None:
                return
            time.sleep(0.1)

    def _others_follow(self, failed: Mapping[int, int]) -> bool:
        """Whether those that still run are about to end by themselves, in order or with a better reason."""
        if set(failed.values()) == {EXIT_REQUEUE}:
            return True
        if not FOLLOWS.keys() >= set(failed.values()):
            return False
        self._lost_since = self._lost_since or time.monotonic()
        return time.monotonic() - self._lost_since < CAUSE_SECONDS

    def _judge(self, failures: Mapping[int, Any], ranks: Mapping[int, int], hang: Hang | None) -> None:
        """
        Start again or not; record it and say it.

        failures: of those that ended by themselves, by rank; ranks: their local ranks.
        """
        codes = {failure.exitcode for failure in failures.values()}
        if codes == {EXIT_REQUEUE} and self._stop.signal is None and self._machines and self._machines.is_regrouping():
            self._remaining_restarts += 1  # they saved since a machine joins: no failure
            return
        self.asked = self._stop.signal is not None or EXIT_REQUEUE in codes
        step = self._judge_deaths(failures, ranks) if hang is None else self._judge_hang(hang)
        if step is None:
            return
        if self._crashes.add(step):
            self.why += f"; that makes {self._crashes.count} crashes without a step beyond {self._crashes.step}"
            self._remaining_restarts = 0
            self.alone_at_fault = hang is None or not hang.host
        elif self.asked:
            self._remaining_restarts = 0
        elif self._remaining_restarts > 0:
            left = "" if self._launch.max_restarts is None else f" ({self._remaining_restarts - 1} restarts left)"
            say_error(f"{self.why}; starting again from {self._last_checkpoint()}{left}")

    def _judge_hang(self, hang: Hang) -> int:
        """Record it; the step at which it counts as a crash."""
        self.why = str(hang)
        if self._machines is None or self._machines.announce("hang"):
            self._record("hang", rank=hang.rank, step=hang.step, phase=hang.phase, why=self.why)
        return max(hang.step, self._run_folder.last_step())

    def _judge_deaths(self, failures: Mapping[int, Any], ranks: Mapping[int, int]) -> int | None:
        """Find what the workers died of; the step at which it counts as a crash, None if that is decided otherwise."""
        codes = {failure.exitcode for failure in failures.values()}
        rank, failure = first_death(failures)
        sign = self._watch.sign(ranks[rank])
        self.asked = self.asked or failure.exitcode in ASKING
        if self.asked or EXIT_BAD_INPUT in codes:
            self._remaining_restarts = 0
            return None
        step = max(sign.step, self._run_folder.last_step())
        where = f"in {sign.phase} of step {sign.step}" if sign.step else f"after step {step}"
        if self._machines and self._followed_another_machine(codes):
            self._follow(step, where)
            return None
        no_memory = failure.exitcode == -signal.SIGKILL and kernel_kills() > self._kernel_kills
        how = "was killed by the kernel (out of memory)" if no_memory else how_it_died(failure.exitcode)
        self.why = f"worker {rank} {how} {where}"
        self._record("crashed", rank=rank, how=how, step=step, phase=sign.phase)
        if no_memory and sign.taken <= 1:  # nor would it fit the next time
            self.too_large = True
            self._remaining_restarts = 0
            self.why += f". {what_would_fit(self._run_folder.settled(self._config), self._world_size)}"
            return None
        return step

    def _follow(self, step: int, where: str) -> None:
        """Start again after a crash on another machine, whose launcher counts it too, and gives up sooner."""
        self.why = f"lost a worker on another machine {where}"
        if self._elsewhere.add(step):
            self.why += f"; that makes {self._elsewhere.count} times without a step beyond {step}"
            self._remaining_restarts = 0
        else:
            say_error(f"{self.why}; starting again from {self._last_checkpoint()}")

    @property
    def has_checkpoint(self) -> bool:
        """On disk, or in memory as a worker told."""
        return self._run_folder.has_checkpoint() or self._watch.saved() > 0

    def _last_checkpoint(self) -> str:
        return "the last checkpoint" if self.has_checkpoint else "the beginning: there is no checkpoint yet"

    def _followed_another_machine(self, codes: set[int]) -> bool:
        """Whether those here ended since one elsewhere had: an abort may be a crash of its own, unless another was there before."""
        assert self._machines is not None
        if codes == {EXIT_LOST_PEER}:
            return True
        end = time.monotonic() + CAUSE_SECONDS
        while FOLLOWS.keys() >= codes and time.monotonic() < end:
            if self._machines.was_announced("crash"):
                return True
            time.sleep(0.1)
        self._machines.announce("crash")
        return False

    def _say_lost(self) -> None:
        say_error(
            f"nothing answers at {self._launch.rendezvous} any more: the run goes on, but no machine can join it, and "
            "workers that die cannot be started again until something does"
        )

    def _record(self, event: str, **facts: object) -> None:
        """A line in the run's events."""
        events = Events(self._run_folder.events_file)
        events.say(event, **facts)
        events.close()


def _in_thread(do: Callable[[], None]) -> None:
    """What waits in C++ does not see a signal: it waits in a thread, and this one here, which does."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            do()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="rendezvous", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if errors:
        raise errors[0]


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
