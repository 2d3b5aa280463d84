"""Run a case on the bed and judge it: the job completes with the weights of the undisturbed run, and nothing is left over."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import psutil

from tests.cluster.bed import HEAD, LIMIT_SECONDS, NODES, Bed
from tests.cluster.case import Case, Fault
from tests.cluster.training import RATE, STEPS, Training, Undisturbed, is_train

SLOW_RATE: Final = "1mbit"  # a step then takes more than a second
STILL_SECONDS: Final = 0.3  # of computing on a full disk
PATIENCE_SECONDS: Final = 2 * LIMIT_SECONDS  # for a run to recover from one fault
_DAEMONS: Final = ("slurmd", "slurmctld", "slurmscriptd", "sleep")  # of an idle host, besides its first process


@dataclass(frozen=True)
class Verdict:
    """The judgment of a run. problems: empty if it passed."""

    problems: tuple[str, ...]
    seconds: float
    output: str


class Trial:
    """One run of a case, in a folder of its own on the bed's shared disk."""

    def __init__(self, bed: Bed, case: Case, name: str, undisturbed: Undisturbed) -> None:
        self.bed, self.case, self._undisturbed = bed, case, undisturbed
        self.training = Training(bed, bed.shared / name)
        self.job = ""
        self._story: list[str] = []

    def run(self) -> Verdict:
        """Run the case, heal the bed, and judge."""
        begun = time.monotonic()
        problems: list[str] = []
        try:
            self._train()
        except (AssertionError, OSError, psutil.Error) as error:
            problems.append(f"{self._story[-1] if self._story else 'submitting'}: {error}")
        else:
            problems += self._judge()
        self.bed.heal()
        problems += self._left_over()
        output = "\n".join([*self._story, "--- the job's output", self.training.printed(self.job)])
        return Verdict(tuple(problems), time.monotonic() - begun, output)

    def _train(self) -> None:
        least = [f"--launch.min_nodes={self.case.min_nodes}"] if self.case.min_nodes else []
        spare = [f"--spare-nodes={self.case.spares}"] if self.case.spares else []
        self.job = self.training.launch(f"--nodes={self.case.nodes}", *least, *spare)
        self._tell(f"job {self.job}")
        self._until(lambda: self._steps() > 0)
        for fault in self.case.faults:
            step = self._steps() + fault.after
            self._until(lambda step=step: self._steps() >= step)  # type: ignore[misc]
            self._tell(f"step {self._steps()} on {', '.join(self._nodes())}: {fault}")
            self._happen(fault)
        self._tell("no more faults")
        self._until(lambda: self._steps() >= STEPS)
        self._until(lambda: self.bed.state(self.job) == "COMPLETED")

    def _judge(self) -> list[str]:
        try:
            same = self.training.weights() == self._undisturbed.weights()
        except AssertionError as error:
            return [str(error) or "the record of samples is wrong"]
        return [] if same else ["other weights than without the faults"]

    def _left_over(self) -> list[str]:
        """Describe processes that outlived the run on any host."""
        found: list[str] = []
        for name in (HEAD, *NODES):
            host = self.bed.hosts[name]
            # a rendezvous may stay for some seconds after its last user
            strange = [p for p in host.processes() if p.name() not in _DAEMONS]
            _, alive = psutil.wait_procs(strange, timeout=30)
            found += [f"{name}: process {' '.join(p.cmdline())} is left over" for p in alive]
        return found

    def _tell(self, what: str) -> None:
        self._story.append(f"{time.strftime('%H:%M:%S')} {what}")

    def _steps(self) -> int:
        return self.training.run.last_step()

    def _until(self, true: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> None:
        self.training.until(true, self.job, seconds)

    def _nodes(self) -> list[str]:
        """Return the nodes of the running job, in Slurm's order."""
        self._until(lambda: self.bed.state(self.job) == "RUNNING")
        names = self.bed.job(self.job)["NodeList"]
        return self.bed.run("scontrol", "show", "hostnames", names).split()

    def _launchers(self, node: str) -> list[psutil.Process]:
        """Return the launchers on a node: processes of shoal train that another such process did not start."""
        found = [p for p in self.bed.hosts[node].processes() if is_train(p)]
        return [p for p in found if not is_train(psutil.Process(p.ppid()))]

    # ---- faults ----

    def _happen(self, fault: Fault) -> None:
        """Make a fault happen, repair what an operator would, and wait until the run takes steps again."""
        trains = self.training.events("machines")[-1]["hosts"]  # any of the job's nodes may be the spare
        nodes = [name for name in self._nodes() if not self.case.spares or name in trains]
        node = nodes[fault.node % len(nodes)]
        starts, step = self._starts(), self._steps()
        {
            "slurmd killed": self._kill_slurmd,
            "node off": self._power_off,
            "node drained": self._drain,
            "link down": self._cut,
            "partition": self._part,
            "signal": self._signal,
            "requeue": self._requeue,
            "disk full": self._fill,
            "wrong host name": self._misname,
            "launcher killed": self._kill_launcher,
            "controller restarted": self._restart_controller,
        }[fault.kind](node, fault.long, starts)
        self._until(lambda: self._steps() > step or self._starts() > starts)

    def _starts(self) -> int:
        """Return how often workers have started."""
        return len(self.training.events("started"))

    def _await_start(self, starts: int) -> None:
        """Wait until workers have started once more, and taken a step."""
        self._until(lambda: self._starts() > starts)
        first = self.training.events("started")[-1]["step"]
        self._until(lambda: self._steps() > first)

    def _await_steps(self, starts: int) -> None:
        """Wait until workers have started once more, or have taken more steps without that."""
        step = self._steps()
        self._until(lambda: self._starts() > starts or self._steps() > step + 2)

    def _kill_slurmd(self, node: str, long: bool, starts: int) -> None:
        if long:
            self.bed.set_rate(SLOW_RATE)  # the run does not end before Slurm finds the node down, half a minute later
        self.bed.kill_slurmd(node)
        if long:
            self._until(lambda: self.bed.node_states()[node].startswith("down"))
            self.bed.set_rate(RATE)
        self.bed.start_slurmd(node)
        if long:
            self._await_steps(starts)

    def _power_off(self, node: str, long: bool, starts: int) -> None:
        self.bed.power_off(node)
        if not long:
            self.bed.down(node)
        self._await_start(starts)
        self.bed.power_on(node)
        self.bed.resume(node)

    def _drain(self, node: str, long: bool, starts: int) -> None:
        self.bed.drain(node)
        self._requeue(node, long, starts)
        assert node not in self._nodes(), f"the job runs on {node}, which is drained"
        self.bed.resume(node)

    def _cut(self, node: str, long: bool, starts: int) -> None:
        self.bed.hosts[node].link("down")
        self._await_notice(node, long, starts)
        self.bed.hosts[node].link("up")
        if long:
            self._await_steps(starts)

    def _part(self, node: str, long: bool, starts: int) -> None:
        other = next(name for name in self._nodes() if name != node)
        self.bed.hosts[node].part_from(self.bed.hosts[other])
        self._await_notice(node, long, starts)
        self.bed.hosts[node].rejoin()
        if long:
            self._await_steps(starts)

    def _await_notice(self, node: str, long: bool, starts: int) -> None:
        """Wait until the run or Slurm has noticed a cut; if it is short, only until a connection fails."""
        if not long:
            other = next(name for name in NODES if name != node)
            self.bed.hosts[node].attempt("timeout", "1", "bash", "-c", f": < /dev/tcp/{other}/6818")
            return
        before = len(self.training.printed(self.job))
        self._until(
            lambda: (
                self._starts() > starts
                or len(self.training.printed(self.job)) > before
                or self.bed.state(self.job) != "RUNNING"
            )
        )

    def _signal(self, node: str, long: bool, starts: int) -> None:
        if long:
            self._launchers(node)[0].terminate()
        else:
            self.bed.run("scancel", "--signal=USR2", "--batch", self.job)
        self._await_start(starts)

    def _requeue(self, node: str, long: bool, starts: int) -> None:
        if long:
            self.bed.run("scontrol", "requeue", self.job)
        else:
            self.training.shoal("launch", "requeue", "run")
        self._await_start(starts)

    def _fill(self, node: str, long: bool, starts: int) -> None:
        self.bed.fill_disk()
        if long:
            self.bed.run("scancel", "--signal=USR2", "--batch", self.job)
        launchers = self._launchers(node)
        workers = [w for launcher in launchers for w in launcher.children(recursive=True)]
        used = _cpu_seconds(workers)
        self.bed.until(lambda: not _alive(workers) or _cpu_seconds(workers) > used + STILL_SECONDS)
        self.bed.empty_disk()
        if long:
            self._await_start(starts)

    def _misname(self, node: str, long: bool, starts: int) -> None:
        self.bed.tell_names(node, wrong=True)
        self._requeue(node, long, starts)
        self.bed.tell_names(node)

    def _kill_launcher(self, node: str, long: bool, starts: int) -> None:
        self._launchers(node)[0].kill()
        self._await_start(starts)

    def _restart_controller(self, node: str, long: bool, starts: int) -> None:
        self.bed.stop_controller()
        if long:
            launchers = self._launchers(node)
            launchers[0].terminate()
            psutil.wait_procs(launchers, timeout=PATIENCE_SECONDS)
        self.bed.start_controller()
        if long:
            self._await_start(starts)


def _alive(processes: list[psutil.Process]) -> bool:
    return any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def _cpu_seconds(processes: list[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        try:
            total += sum(process.cpu_times()[:2])
        except psutil.Error:
            continue
    return total
