"""
torch's elastic agent, which starts and restarts the workers of this node, with shoal's own rules.

It finds hung workers, kills workers that wait for a dead one, and lets workers save when a node joins. It does not restart a
run that was asked to stop or that would fail again. Each decision is printed as one line.
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

from shoal.config.layout import find_layout
from shoal.config.options import Config
from shoal.elastic.agreement import shared_settings
from shoal.elastic.crashes import FOLLOWS, Crashes, first_death, how_it_died
from shoal.elastic.machines import Machines
from shoal.elastic.oom import kernel_kills
from shoal.elastic.rank_logs import RankLogs, wants_logs
from shoal.elastic.rendezvous import Meeting
from shoal.elastic.stops import SignalForwarder
from shoal.elastic.watch import Hang, Watch
from shoal.errors import EXIT_BAD_INPUT, EXIT_LOST_PEER, EXIT_REQUEUE
from shoal.plan.fit import what_would_fit
from shoal.plan.topology import layout_table
from shoal.run.console import Console
from shoal.run.events import Events
from shoal.run.folder import RunFolder
from shoal.run.narrator import Narrator
from shoal.system.output import say_error

CAUSE_SECONDS: Final = 2.0  # a worker that lost a peer may end before that peer's death is seen
SLOW_SECONDS: Final = 3.0  # print a line after waiting this long for other nodes
_STARTS: Final = {"start": "starting the workers"}  # clearer words for some phases
# Exit codes of a worker killed by a stop signal before it could install its handlers.
ASKING: Final = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGUSR1)


class Agent(LocalElasticAgent):
    """Runs this node's workers. `why`: the cause of a failure. `asked`: whether the run was asked to stop."""

    def __init__(
        self, spec: WorkerSpec, config: Config, stop: SignalForwarder, meeting: Meeting, crashes: Crashes
    ) -> None:
        """crashes: the launcher's count of crashes, kept from one rendezvous to the next."""
        self._folder = Path(tempfile.mkdtemp(prefix="shoal-"))  # for the workers' pages, and torch's own files
        self._run_folder = RunFolder.of(config)
        self._logs = RankLogs(self._run_folder.logs, self._folder, on=wants_logs(config.launch))
        super().__init__(spec=spec, logs_specs=self._logs, start_method="spawn", exit_barrier_timeout=30)
        self.why = ""
        self.asked = False
        self.too_large = False  # the model does not fit in memory
        self.alone_at_fault = False  # only this node's workers crash
        self.ended_early = False  # the workers were killed by this agent before the first step
        self._config = config
        self._launch, self._stop, self._meeting = config.launch, stop, meeting
        self._watch = Watch(self._run_folder.path / "stacks", self._folder)
        self._narrator = Narrator(Console().note)
        self._crashes, self._elsewhere = crashes, Crashes(3 * crashes.most)
        self._lost_since: float | None = None
        self._kernel_kills = 0  # kernel_kills() when these workers started
        self._world_size = 1
        self._machines: Machines | None = None  # None on one node
        meeting.rendezvous.on_lost = self._say_lost

    def close(self) -> None:
        """Remove the agent's files; may be called twice."""
        self._narrator.close()
        self._watch.close()
        self._logs.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def others_can_go_on(self) -> bool:
        """Whether enough nodes remain without this one."""
        return self._machines is not None and len(self._machines.hosts) > self._launch.fewest_nodes

    @property
    def met(self) -> bool:
        """Whether this agent has taken part in a round with other nodes."""
        return self._machines is not None

    def _rendezvous(self, worker_group: Any) -> None:
        """Meet the other nodes; a signal ends the wait. Raises `LaunchError` if this node's config does not match."""
        timer = threading.Timer(SLOW_SECONDS, self._say_what_it_waits_for)
        with self._stop.may_raise():
            if self._launch.nodes > 1:
                timer.start()
            try:
                self._meet(worker_group)
                while self._launch.nodes > 1 and not self._greet(worker_group):
                    self._meet(worker_group)
            finally:
                timer.cancel()
        self._meeting.rendezvous.machines = worker_group.group_world_size

    def _meet(self, worker_group: Any) -> None:
        """Join the next round. Raises `LaunchError` as soon as the roll call shows that there can be none with this node."""
        roll = self._meeting.roll
        _in_thread(lambda: super(Agent, self)._rendezvous(worker_group), roll.look if roll else lambda: None)

    def _greet(self, worker_group: Any) -> bool:
        """Return whether all configs match; if not, the nodes that differ leave. Raises `LaunchError` if this node must leave."""
        before = self._machines
        machines = Machines(worker_group.store, worker_group.group_rank, worker_group.group_world_size)
        if not machines.greet(socket.gethostname(), shared_settings(self._config), stays=before is not None):
            hosts = ", ".join(machines.differing)
            say_error(f"the config of {hosts} differs: meeting again without {hosts}")
            for host, how in machines.differing.items():
                if self._meeting.roll is not None:
                    self._meeting.roll.differs(host, how)
            time.sleep(1.0)  # until they have left
            return False
        self._machines = machines
        if self._meeting.roll is not None:
            self._meeting.roll.has_met = True
        say_error(machines.describe(before.hosts if before else None, worker_group.workers[0].world_size))
        if worker_group.group_rank == 0:
            self._record("machines", hosts=machines.hosts, processes=worker_group.workers[0].world_size)
            self._show_layout(machines.hosts, worker_group.workers[0].world_size)
        return True

    def _show_layout(self, hosts: Sequence[str], world_size: int) -> None:
        """Print the layout's ranks by node and device."""
        layout = find_layout(self._config.parallel, world_size)
        if not isinstance(layout, str):
            for line in layout_table(layout, world_size // len(hosts), hosts):
                say_error(line)

    def _say_what_it_waits_for(self) -> None:
        needed, place = self._launch.fewest_nodes, self._launch.rendezvous
        if self._meeting.rendezvous.is_full:
            say_error(f"all {self._launch.nodes} nodes are present: waiting at {place} as a spare until one leaves")
        else:
            say_error(
                f"waiting at {place} for at least {needed} node{'s' * (needed > 1)} running this command with the same "
                f"launch.runs folder, {self._run_folder.path.parent.resolve()}"
            )

    def _start_workers(self, worker_group: Any) -> Any:
        self._lost_since, self._kernel_kills = None, kernel_kills()
        self._world_size = worker_group.workers[0].world_size
        self._watch.start([w.global_rank for w in worker_group.workers], self._launch.timeout_seconds)
        ranks = {w.local_rank: w.global_rank for w in worker_group.workers}
        self._logs.begin(worker_group.store, ranks, worker_group.group_rank)
        ids = super()._start_workers(worker_group)
        self._logs.started({local: process.pid for local, process in self._processes().items()}, self._world_size)
        return ids

    def _monitor_workers(self, worker_group: Any) -> RunResult:
        """Check the workers; called ten times a second."""
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
            if self._meeting.roll is not None:
                self._meeting.roll.beat()
        hang = self._watch.find_hang(pids, self._machines.others if self._machines else list)
        if hang is not None and any(process.poll() is not None for process in running.values()):
            hang = None  # a worker ended just now, and may be the cause: the next check sees it as dead
        if hang is None and running and (not failed or self._others_follow(failed)):
            # do not call torch's own check yet: it would end workers by SIGTERM, with 30 s to obey
            return RunResult(state=WorkerState.HEALTHY)
        _kill(running.values())
        self._logs.ended({local: code for local, code in codes.items() if code is not None}, running)
        result: RunResult = super()._monitor_workers(worker_group)
        if hang is None and not result.is_failed():
            return result
        ranks = {worker_group.workers[local].global_rank: local for local in failed}
        for rank, failure in result.failures.items():
            if rank in ranks and failure.exitcode == EXIT_BAD_INPUT:
                self._logs.report(ranks[rank], failure.message)
        self._judge({r: f for r, f in result.failures.items() if r in ranks}, ranks, hang)
        return RunResult(state=WorkerState.FAILED, failures=result.failures)

    def _narrate(self) -> None:
        """Print the phase of the first worker if it takes long, except in steps after the first."""
        sign = self._watch.sign(0)
        if not sign.step and not sign.taken:
            phase: str | None = _STARTS.get(sign.phase, sign.phase)
        elif not sign.taken and sign.in_step:
            phase = "first step, compiling" if self._config.train.compile else "first step"
        else:
            phase = None if sign.in_step else sign.phase
        self._narrator.begin(phase, tell=phase != "end")  # the run's closing line already reports that time
        self._narrator.look()

    def _end_early(self, worker_group: Any, running: Iterable[Any]) -> RunResult:
        """Kill workers that were asked to stop before the first step: they have nothing to save."""
        _kill(running)
        self.asked = self.ended_early = True
        self._remaining_restarts = 0
        return RunResult(state=WorkerState.FAILED, failures=super()._monitor_workers(worker_group).failures)

    def _stop_workers(self, worker_group: Any) -> None:
        """Stop the workers before a restart: let them save if a node joins, else kill them, since they wait for a dead worker."""
        if self._machines and self._pcontext is not None:
            news = self._meeting.rendezvous.news
            if news == "joins" or self._machines.is_regrouping():
                self._machines.request_regroup()
                say_error("another node joins: saving, then starting again with it")
                self._let_save()
            elif news == "left" and any(process.poll() is None for process in self._processes().values()):
                say_error(f"a node left or restarted its workers: starting again from {self._last_checkpoint()}")
            running = {local: process for local, process in self._processes().items() if process.poll() is None}
            _kill(running.values())
            self._logs.ended({}, running)
        super()._stop_workers(worker_group)

    def _processes(self) -> dict[int, subprocess.Popen[bytes]]:
        """Return the worker processes by local rank."""
        assert self._pcontext is not None
        return {local: handler.proc for local, handler in self._pcontext.subprocess_handlers.items()}  # type: ignore[attr-defined]

    def _let_save(self) -> None:
        """Ask the workers to stop, and wait until they have, or until one fails or hangs."""
        for process in self._processes().values():
            if process.poll() is None:
                process.terminate()
        while running := {local: p.pid for local, p in self._processes().items() if p.poll() is None}:
            codes = {process.poll() for process in self._processes().values()}
            if codes - {None, 0, EXIT_REQUEUE} or self._watch.find_hang(running) is not None:
                return
            time.sleep(0.1)

    def _others_follow(self, failed: Mapping[int, int]) -> bool:
        """Return whether the running workers should soon end by themselves, perhaps with a clearer cause."""
        if set(failed.values()) == {EXIT_REQUEUE}:
            return True
        if not FOLLOWS.keys() >= set(failed.values()):
            return False
        self._lost_since = self._lost_since or time.monotonic()
        return time.monotonic() - self._lost_since < CAUSE_SECONDS

    def _judge(self, failures: Mapping[int, Any], ranks: Mapping[int, int], hang: Hang | None) -> None:
        """
        Decide whether to restart; record and print the cause.

        failures: failures of workers that ended by themselves, by rank. ranks: their local ranks, by rank.
        """
        codes = {failure.exitcode for failure in failures.values()}
        if codes == {EXIT_REQUEUE} and self._stop.signal is None and self._machines and self._machines.is_regrouping():
            self._remaining_restarts += 1  # they saved because a node joins: not a failure
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
        """Record the hang; return the step at which it counts as a crash."""
        self.why = str(hang)
        if self._machines is None or self._machines.announce("hang"):
            self._record("hang", rank=hang.rank, step=hang.step, phase=hang.phase, why=self.why)
        return max(hang.step, self._run_folder.last_step())

    def _judge_deaths(self, failures: Mapping[int, Any], ranks: Mapping[int, int]) -> int | None:
        """Find why the workers died; return the step at which this counts as a crash, None if restarting is already decided."""
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
        if no_memory and sign.taken <= 1:  # it would not fit after a restart either
            self.too_large = True
            self._remaining_restarts = 0
            self.why += f". {what_would_fit(self._run_folder.with_earlier_choices(self._config), self._world_size)}"
            return None
        return step

    def _follow(self, step: int, where: str) -> None:
        """Count a crash on another node; restart or give up. The launcher there counts the crash too, and gives up earlier."""
        self.why = f"lost a worker on another node {where}"
        if self._elsewhere.add(step):
            self.why += f"; that makes {self._elsewhere.count} times without a step beyond {step}"
            self._remaining_restarts = 0
        else:
            say_error(f"{self.why}; starting again from {self._last_checkpoint()}")

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint on disk, or one in memory that a worker reported."""
        return self._run_folder.has_checkpoint() or self._watch.saved() > 0

    def _last_checkpoint(self) -> str:
        return "the last checkpoint" if self.has_checkpoint else "the beginning: there is no checkpoint yet"

    def _followed_another_machine(self, codes: set[int]) -> bool:
        """
        Return whether workers here died because of a worker on another node.

        An abort counts only if another node crashed first.
        """
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
            f"the rendezvous at {self._launch.rendezvous} no longer answers: the run continues, but until it is back no node "
            "can join and dead workers cannot be restarted"
        )

    def _record(self, event: str, **facts: object) -> None:
        """Append a line to the run's events."""
        events = Events(self._run_folder.events_file)
        events.say(event, **facts)
        events.close()


def _in_thread(do: Callable[[], None], meanwhile: Callable[[], None]) -> None:
    """
    Call `do` in a thread and wait for it: a wait in C++ would block signals, this one does not.

    meanwhile: called several times a second; an error that it raises ends the wait.
    """
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
        meanwhile()
    if errors:
        raise errors[0]


def _kill(processes: Any) -> None:
    """
    Kill workers that wait for a dead worker: they would not handle SIGTERM before a collective's timeout.

    SIGKILL also reaches stopped processes. A process in state D dies only when its device answers, so the wait for it is limited.
    """
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # each leads its own session
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2.0)
