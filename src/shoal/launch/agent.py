"""
torch's elastic agent, which starts the workers of this machine and starts them anew, with what shoal knows of its own.

It finds workers that hang, ends at once those that wait for a dead one, does not restart what was asked to stop or will
fail again, and says in one line what it does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Final

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, create_handler

from shoal.config import Config
from shoal.errors import EXIT_BAD_INPUT, EXIT_LOST_PEER, EXIT_REQUEUE
from shoal.launch.crashes import Crashes, first_death, how_it_died
from shoal.launch.listen import listen
from shoal.launch.stops import PassOn, tell
from shoal.launch.watch import Hang, Watch
from shoal.metrics.trackers import Events
from shoal.runs import RunFolder

NO_LIMIT: Final = 1_000_000  # restarts: torch counts them down
CAUSE_SECONDS: Final = 2.0  # a worker that lost a peer may be seen to end before that peer
# A worker that these killed had not come so far as to listen to them.
ASKING: Final = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGUSR1)


class Agent(LocalElasticAgent):
    """`why` says, after a run that failed, what it failed of; `asked` whether somebody asked it to stop."""

    def __init__(self, spec: WorkerSpec, config: Config, stop: PassOn) -> None:
        super().__init__(spec=spec, logs_specs=DefaultLogsSpecs(), start_method="spawn", shutdown_timeout=30)
        self.why = ""
        self.asked = False
        self._launch, self._stop = config.launch, stop
        self._run_folder = RunFolder.of(config)
        self._watch = Watch(self._run_folder.path / "stacks")
        self._crashes = Crashes(config.launch.max_crashes)
        self._lost_since: float | None = None

    def close(self) -> None:
        self._watch.close()

    def _start_workers(self, worker_group: Any) -> Any:
        self._lost_since = None
        self._watch.start([w.global_rank for w in worker_group.workers], self._launch.timeout_seconds)
        return super()._start_workers(worker_group)

    def _monitor_workers(self, worker_group: Any) -> RunResult:
        """Ten times a second."""
        self._stop.reach_all()
        assert self._pcontext is not None
        processes = {local: handler.proc for local, handler in self._pcontext.subprocess_handlers.items()}  # type: ignore[attr-defined]
        codes = {local: process.poll() for local, process in processes.items()}
        failed = {local: code for local, code in codes.items() if code}
        running = {local: processes[local] for local, code in codes.items() if code is None}
        hang = self._watch.look({local: process.pid for local, process in running.items()})
        if hang is None and running and (not failed or self._others_follow(failed)):
            return RunResult(state=WorkerState.HEALTHY)  # torch's own look may end some: with SIGTERM, and 30 s to obey
        _kill(running.values())
        result: RunResult = super()._monitor_workers(worker_group)
        if hang is None and not result.is_failed():
            return result
        ranks = {worker_group.workers[local].global_rank: local for local in failed}
        self._judge({r: f for r, f in result.failures.items() if r in ranks}, ranks, hang)
        return RunResult(state=WorkerState.FAILED, failures=result.failures)

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
        self.asked = self._stop.signal is not None or EXIT_REQUEUE in codes
        if hang is None:
            rank, failure = first_death(failures)
            how, sign = how_it_died(failure.exitcode), self._watch.sign(ranks[rank])
            self.asked = self.asked or failure.exitcode in ASKING
            if self.asked or EXIT_BAD_INPUT in codes:
                self._remaining_restarts = 0
                return
            step = max(sign.step, self._run_folder.last_step())
            self.why = f"worker {rank} {how} " + (
                f"in {sign.phase} of step {sign.step}" if sign.step else f"after step {step}"
            )
            self._record("crashed", rank=rank, how=how, step=step, phase=sign.phase)
        else:
            step = max(hang.step, self._run_folder.last_step())
            self.why = str(hang)
            self._record("hang", rank=hang.rank, step=hang.step, phase=hang.phase, why=self.why)
        if self._crashes.add(step):
            self.why += f"; that makes {self._crashes.count} crashes without a step beyond {self._crashes.step}"
            self._remaining_restarts = 0
        elif self.asked:
            self._remaining_restarts = 0
        elif self._remaining_restarts > 0:
            left = "" if self._launch.max_restarts is None else f" ({self._remaining_restarts - 1} restarts left)"
            tell(f"{self.why}; starting again from the last checkpoint{left}")

    def _record(self, event: str, **facts: object) -> None:
        """A line in the run's events."""
        events = Events(self._run_folder.events_file)
        events.say(event, **facts)
        events.close()


def make_agent(config: Config, argv: Sequence[str], stop: PassOn) -> Agent:
    """An agent that runs `shoal ARGV` in `launch.processes` workers on this machine."""
    restarts = config.launch.max_restarts
    spec = WorkerSpec(
        role="shoal",
        local_world_size=config.launch.processes or 1,
        entrypoint=sys.executable,
        args=("-m", "shoal", *argv),
        rdzv_handler=_rendezvous(config.launch.port),
        max_restarts=NO_LIMIT if restarts is None else restarts,
        monitor_interval=0.1,
        local_addr="127.0.0.1",
    )
    return Agent(spec, config, stop)


def _rendezvous(port: int) -> DynamicRendezvousHandler:
    """Where the agent and its workers meet: a store that listens on loopback alone. torch's own listens everywhere."""
    listener = listen("127.0.0.1", port)
    host, port = listener.getsockname()
    store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    run_id = uuid.uuid4().hex
    parameters = RendezvousParameters("c10d", f"{host}:{port}", run_id, min_nodes=1, max_nodes=1, local_addr=host)
    return create_handler(store, C10dRendezvousBackend(store, run_id), parameters)


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
