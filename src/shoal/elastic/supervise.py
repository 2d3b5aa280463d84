"""The main loop of a launcher: meet the other nodes, run the workers, and report the outcome."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Final

from torch.distributed import DistError, DistStoreError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousTimeoutError,
)

from shoal.config.options import Config
from shoal.elastic.agent import Agent
from shoal.elastic.crashes import Crashes
from shoal.elastic.rendezvous import Meeting
from shoal.elastic.stops import SignalForwarder, StopRequested
from shoal.errors import EXIT_BAD_INPUT, EXIT_REQUEUE, LaunchError
from shoal.run.folder import RunFolder
from shoal.run.starts import Starts
from shoal.system.output import say_error

NO_LIMIT: Final = 1_000_000  # restarts; torch counts down from this number
_STOPPED: Final = "stopped while no workers were running; the same command resumes"


def run_workers(config: Config, argv: Sequence[str], stop: SignalForwarder, *, store_started: bool = False) -> int:
    """
    Run `shoal ARGV` in this node's workers until the run ends; return the exit code, see `launch`.

    store_started: whether the store at `launch.rendezvous` was already started on this node.
    """
    launcher = _Launcher(config, argv, stop, store_started)
    while (code := launcher.meet_and_run()) is None:
        pass
    return code


class _Launcher:
    """The state that a launcher keeps from one rendezvous to the next."""

    def __init__(self, config: Config, argv: Sequence[str], stop: SignalForwarder, store_started: bool) -> None:
        self._config, self._argv, self._stop, self._store_started = config, argv, stop, store_started
        self._crashes = Crashes(config.launch.max_crashes)
        self._folder = RunFolder.of(config)
        self._lock_id = self._folder.lock_id()
        self._starts = Starts(self._folder.launchers_file)
        self._lost = ""  # why the last rendezvous was lost
        self._met = False

    def meet_and_run(self) -> int | None:
        """Meet the other nodes and run the workers; return the exit code, or None if the nodes must meet again."""
        try:
            with self._stop.may_raise():
                meeting = Meeting.open(
                    self._config,
                    self._lock_id,
                    say_error,
                    self._starts,
                    has_met=self._met,
                    started_early=self._store_started,
                )
            self._store_started = False
        except StopRequested:
            say_error(_STOPPED)
            return EXIT_REQUEUE
        except LaunchError as error:
            if not self._lost:
                if self._config.launch.nodes > 1:
                    self._starts.fail(str(error))
                raise
            say_error(f"the run stopped: {self._lost}. {_what_is_kept(self._folder.has_checkpoint())}")
            return EXIT_REQUEUE
        agent = Agent(_workers(self._config, self._argv, meeting), self._config, self._stop, meeting, self._crashes)
        try:
            return self._run(agent, meeting)
        finally:
            self._met = self._met or agent.met
            agent.close()

    def _run(self, agent: Agent, meeting: Meeting) -> int | None:
        try:
            result = agent.run()
        except StopRequested:
            if self._met or agent.met:  # a run was in progress: stop it on all nodes
                meeting.end(EXIT_REQUEUE, "it was asked to stop")
            meeting.rendezvous.leave()
            say_error(_STOPPED)
            return EXIT_REQUEUE
        except LaunchError:
            meeting.rendezvous.leave()
            raise
        except RendezvousClosedError:
            agent.close()
            return _ended_elsewhere(meeting)
        except RendezvousTimeoutError:
            meeting.rendezvous.leave()
            if meeting.rendezvous.is_full:
                return None  # all places were taken again: wait for the next free one
            return self._give_up_waiting(agent)
        except (RendezvousError, DistError) as error:
            meeting.rendezvous.leave()
            if self._config.launch.rendezvous is None:
                raise
            self._say_broken_off(error)
            return None
        agent.close()  # prints its narrator's last line, before the outcome
        code = _outcome(agent, result)
        if code == 1 and agent.alone_at_fault and agent.others_can_go_on:
            meeting.rendezvous.leave()
        else:
            meeting.end(code, agent.why)
        return code

    def _give_up_waiting(self, agent: Agent) -> int:
        launch = self._config.launch
        say_error(
            f"fewer than {launch.fewest_nodes} nodes joined at {launch.rendezvous} within {launch.timeout_seconds:.0f} s"
        )
        return EXIT_REQUEUE if self._met or agent.met else 1

    def _say_broken_off(self, error: Exception) -> None:
        if isinstance(error, DistStoreError):  # another node did not answer: it is gone
            say_error("a node left during the rendezvous; meeting again")
        else:
            self._lost = f"the rendezvous at {self._config.launch.rendezvous} no longer answers"
            say_error(f"{self._lost}; waiting for it")


def _ended_elsewhere(meeting: Meeting) -> int:
    ended = meeting.ended()
    say_error(f"the run has ended on another node{f': {ended.why}' if ended and ended.why else ''}")
    return ended.code if ended else 1


def _workers(config: Config, argv: Sequence[str], meeting: Meeting) -> WorkerSpec:
    """Describe `launch.processes` workers of `shoal ARGV` for torch's agent."""
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


def _distinct(messages: Sequence[str]) -> list[str]:
    """Return each problem once: usually all ranks report the same, perhaps with other numbers, such as their memory."""
    first = {re.sub(r"\d+", "", message): message for message in reversed(messages)}
    return list(reversed(first.values()))


def _outcome(agent: Agent, result: RunResult) -> int:
    """Return the exit code of an ended run; if it did not finish, print the reason."""
    if not result.is_failed():
        return 0
    codes = [failure.exitcode for failure in result.failures.values()]
    if EXIT_BAD_INPUT in codes:
        problems = _distinct([f.message for f in result.failures.values() if f.exitcode == EXIT_BAD_INPUT])
        for message in problems:
            say_error(message)
        agent.why = agent.why or "\n".join(problems)
        return EXIT_BAD_INPUT
    if agent.too_large:
        say_error(agent.why)
        return EXIT_BAD_INPUT
    if set(codes) == {EXIT_REQUEUE}:
        return EXIT_REQUEUE
    if agent.asked:
        cause = f" ({agent.why})" if agent.why else ""
        how = "stopped before the first step" if agent.ended_early else f"stopped without saving{cause}"
        where = "resumes from the last checkpoint" if agent.has_checkpoint else "starts from the beginning"
        say_error(f"{how}; the same command {where}")
        return EXIT_REQUEUE
    say_error(f"the run stopped: {agent.why}. {_what_is_kept(agent.has_checkpoint)}")
    return 1


def _what_is_kept(has_checkpoint: bool) -> str:
    if has_checkpoint:
        return "Saved checkpoints are kept; the same command resumes from the last one"
    return "No checkpoint was saved; the same command starts from the beginning"
