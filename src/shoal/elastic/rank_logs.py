"""A log for each rank in `RUN/logs`, on several nodes and under Slurm: what torch's agent needs to know about it."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import LogsDest

from shoal.config.run_options import Launch
from shoal.elastic.crashes import how_it_died
from shoal.elastic.kernel_log import keep_kernel_lines
from shoal.elastic.pump import Pump, job_of, new_attempt
from shoal.run.log_lines import ERR, OUT, REPORTED, STOPPED


def wants_logs(launch: Launch) -> bool:
    """Return whether to write a log for each rank: on several nodes, no terminal shows them all; under Slurm, there is none."""
    return launch.nodes > 1 or job_of() is not None


class RankLogs(DefaultLogsSpecs):
    """
    Tells torch's agent where the workers' output goes: to a pump for each attempt if `on`, else where the launcher's goes.

    For each attempt: call `begin`, let the agent start the workers, then call `started`, and at the end `ended`.
    """

    def __init__(self, logs: Path, files: Path, *, on: bool) -> None:
        """
        Remember the folders.

        logs: the run's folder of logs. files: an existing folder of this launcher, for pipes and torch's own files.
        """
        super().__init__(log_dir=str(files))
        self._logs, self._files, self._on = logs, files, on
        self._pump: Pump | None = None
        self._folder = logs
        self._began = 0.0

    def begin(self, store: Any, ranks: Mapping[int, int], node: int) -> None:
        """
        Open the logs of an attempt; node 0 names their folder.

        store: the store of this round of the rendezvous. ranks: local rank -> rank. node: this node's number.
        """
        self.close()
        if not self._on:
            return
        if node == 0:
            store.set("logs", new_attempt(self._logs))
        self._folder = self._logs / store.get("logs").decode()
        self._began = time.time()
        self._pump = Pump(self._folder, self._files, ranks)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Return torch's description of where the workers' output goes."""
        to = super().reify(envs)
        if self._pump is not None:
            to.stdouts = {local: self._pump.path(local, OUT) for local in envs}
            to.stderrs = {local: self._pump.path(local, ERR) for local in envs}
        return to

    def started(self, pids: Mapping[int, int], world_size: int) -> None:
        """Begin to copy the output of the workers, which have started. pids: local rank -> process id."""
        if self._pump is not None:
            self._pump.start(pids, world_size)

    def ended(self, codes: Mapping[int, int], stopped: Collection[int]) -> None:
        """
        Complete the logs of workers that have ended: the rest of their output, how they ended, and the kernel's lines.

        codes: local rank -> exit code of those that ended by themselves. stopped: local ranks of those that the launcher killed.
        """
        if self._pump is None:
            return
        self._pump.settle()
        for local, code in codes.items():
            self._pump.ended(local, how_it_died(code))
        for local in stopped:
            self._pump.ended(local, STOPPED)
        if any(codes.values()):
            self._keep_kernel_lines(self._pump)

    def report(self, local: int, message: str) -> None:
        """Add the message that a worker left, which the launcher prints once for all workers."""
        if self._pump is not None:
            for line in message.splitlines():
                self._pump.note(local, f"{REPORTED}{line}")

    def close(self) -> None:
        """Close the logs of the last attempt. May be called twice."""
        if self._pump is not None:
            self._pump.close()

    def _keep_kernel_lines(self, pump: Pump) -> None:
        try:
            keep_kernel_lines(self._folder, self._began)
        except OSError as error:
            pump.note(0, f"the kernel's lines could not be written: {error.strerror}")
