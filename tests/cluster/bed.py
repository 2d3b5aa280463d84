"""
A real Slurm of four nodes on this machine: a controller and slurmd, each on a host of its own (`host.py`), and one shared disk.

    with Bed(folder) as bed:
        job = bed.submit("hello.sh", "--nodes=2")
        bed.until(lambda: bed.state(job) == "COMPLETED")
        bed.power_off("n2"); bed.drain("n3"); bed.restart_controller(); ...

Generic resources are counted only: a node claims GPUs that do not exist. Needs root, namespaces, Slurm and munge
(`scripts/install_slurm.sh`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

from tests.cluster.host import PATIENCE_SECONDS, Host, Switch, environment
from tests.cluster.host import lacking as cannot_make_hosts

NODES: Final = ("n1", "n2", "n3", "n4")
HEAD: Final = "head"  # the controller's host, which also serves as the login node
GPUS: Final = (
    "/dev/null",
    "/dev/zero",
)  # devices that each node takes for GPUs: Slurm 22.05 counts none without a file
CORES: Final = 4  # that each node claims
DISK: Final = "300m"  # size of the shared disk
LIMIT_SECONDS: Final = PATIENCE_SECONDS  # time limit of every wait
NODE_SECONDS: Final = 10  # a slurmd that is silent for this long is down
REQUEUE_SECONDS: Final = 5  # life of a credential; a requeued job waits for its end, by default for two minutes
PROGRAMS: Final = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "munged", "ip", "nsenter", "setpriv")
OVER: Final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")

_CONFIG = """
ClusterName=bed
SlurmctldHost={head}({head_address})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={requeue_seconds}
CryptoType=crypto/munge
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
EnforcePartLimits=ALL
KillWait=10
SlurmdTimeout={node_seconds}
SlurmctldTimeout=10
MessageTimeout=10
InactiveLimit=0
MinJobAge=3600
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=100000
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/%n/spool
SlurmdPidFile={folder}/%n/slurmd.pid
SlurmdLogFile={folder}/%n/slurmd.log
{nodes}
PartitionName=main Nodes={names} Default=YES MaxTime=60 GraceTime=10 State=UP
PartitionName=short Nodes={names} MaxTime=1 State=UP
PartitionName=urgent Nodes={names} MaxTime=60 PriorityTier=10 State=UP
"""


def lacking() -> str:
    """Return why a bed cannot be made here, "" if it can."""
    path = environment()["PATH"]
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"a real Slurm needs {', '.join(missing)}: run scripts/install_slurm.sh"
    return cannot_make_hosts()


class Bed:
    """The cluster. `shared` is the disk that all hosts share; each has a small disk of its own at `host.LOCAL`."""

    def __init__(self, folder: Path) -> None:
        """Prepare a bed in `folder`, which is empty and has a short path, since it holds a socket."""
        self.folder, self.shared = folder, folder / "shared"
        self.hosts: dict[str, Host] = {}
        self._munged: subprocess.Popen[bytes] | None = None
        self._rate: str | None = None

    def __enter__(self) -> Self:
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self) -> None:
        (self.folder / "state").mkdir()
        self.shared.mkdir()
        disk = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(self.shared)]
        subprocess.run(disk, check=True)  # before the hosts, whose mounts are copies
        self._start_munge()
        self.hosts[HEAD] = switch = Switch(HEAD, self.folder)
        for number, name in enumerate(NODES):
            self.hosts[name] = Host(name, self.folder, switch, 11 + number)
        for name in self.hosts:
            self.tell_names(name)
            self.hosts[name].variables["SLURM_CONF"] = str(self.folder / "slurm.conf")
        self._configure()
        self.start_controller()
        for name in NODES:
            self.start_slurmd(name)
        self.until(lambda: set(self.node_states().values()) == {"idle"})

    def _start_munge(self) -> None:
        """Start the daemon that signs messages. Its socket is a file, so one daemon serves all hosts."""
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(64))
        key.chmod(0o400)
        files = [f"--{what}-file={self.folder}/munge.{what}" for what in ("key", "log", "pid", "seed")]
        self._munged = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "munged", "--foreground", "--force", *files,
             f"--socket={self.folder}/munge.socket"],
            env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self.until((self.folder / "munge.socket").exists)

    def _configure(self) -> None:
        """Write the configuration of Slurm."""
        nodes = [
            f"NodeName={n} NodeHostname={n} NodeAddr={self.hosts[n].address} CPUs={CORES} RealMemory=4000 Gres=gpu:{len(GPUS)}"
            for n in NODES
        ]
        text = _CONFIG.format(
            folder=self.folder, head=HEAD, head_address=self.hosts[HEAD].address, nodes="\n".join(nodes),
            names=",".join(NODES), node_seconds=NODE_SECONDS, requeue_seconds=REQUEUE_SECONDS,
        )  # fmt: skip
        (self.folder / "slurm.conf").write_text(text, encoding="utf-8")
        gpus = f"NodeName={','.join(NODES)} Name=gpu File={','.join(GPUS)}\n"
        (self.folder / "gres.conf").write_text(gpus, encoding="utf-8")

    def close(self) -> None:
        """End all processes and unmount the disk; the folder's logs remain."""
        for host in self.hosts.values():
            host.power_off()
        if self._munged is not None:
            self._munged.kill()
            self._munged.wait()
        subprocess.run(["umount", "--lazy", str(self.shared)], check=False, capture_output=True)

    # ---- the login node ----

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """Run a command on the login node, in the shared folder; return its output. Raises AssertionError if it fails."""
        return self.hosts[HEAD].run(*command, cwd=cwd or self.shared)

    def attempt(self, *command: str, cwd: Path | None = None) -> tuple[int, str]:
        """Run a command on the login node; return (exit code, output)."""
        return self.hosts[HEAD].attempt(*command, cwd=cwd or self.shared)

    def submit(self, script: str, *options: str, cwd: Path | None = None) -> str:
        """Submit a batch script, given as its text or its path; return the job's number."""
        if script.startswith("#!"):
            path = (cwd or self.shared) / f"job-{time.monotonic_ns()}.sh"
            path.write_text(script, encoding="utf-8")
            script = str(path)
        return self.run("sbatch", "--parsable", *options, script, cwd=cwd).split(";")[0].strip()

    def job(self, job: str) -> dict[str, str]:
        """Return what the controller knows of a job: JobState, Restarts, NodeList, Reason, ExitCode, ..."""
        text = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(pair.split("=", 1) for pair in text.split() if "=" in pair)

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def node_states(self) -> dict[str, str]:
        """Return the state of each node as sinfo has it: "idle", "alloc", "drain", "down*", ..."""
        lines = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %t").split("\n")
        return dict(line.split() for line in lines if line)

    def start_now(self, job: str) -> None:
        """Lift the delay before a requeued job starts."""
        self.attempt("scontrol", "update", f"JobId={job}", "StartTime=now")

    def until(self, true: Callable[[], bool], seconds: float = LIMIT_SECONDS) -> None:
        """Wait until `true()`. Raises AssertionError with the ends of Slurm's logs after `seconds`."""
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                raise AssertionError(f"this did not happen within {seconds:.0f} s\n{self.logs()}")
            time.sleep(0.1)

    def logs(self, lines: int = 20) -> str:
        """Return the last lines of each log of Slurm, without its search for MPI libraries."""
        paths = [self.folder / "slurmctld.log", *(self.folder / n / "slurmd.log" for n in NODES)]
        found = {path: path.read_text("utf-8", "replace").splitlines() for path in paths if path.exists()}
        return "\n".join(
            f"--- {path}\n" + "\n".join([line for line in text if "mpi" not in line.lower()][-lines:])
            for path, text in found.items()
        )

    # ---- what an operator or fate does ----

    def start_controller(self) -> None:
        self.run("slurmctld", cwd=self.folder)
        self.until(lambda: self.attempt("scontrol", "ping")[1].endswith("is UP\n"))

    def stop_controller(self) -> None:
        """
        Stop the controller. Jobs run on, but nothing can be asked or submitted.

        SIGKILL would make it forget the last seconds, a job's start for instance, which Slurm then starts a second time.
        """
        _end(self.hosts[HEAD], self.folder / "slurmctld.pid", "TERM")

    def restart_controller(self) -> None:
        self.stop_controller()
        self.start_controller()

    def start_slurmd(self, node: str) -> None:
        (self.folder / node / "spool").mkdir(exist_ok=True)
        self.hosts[node].run("slurmd", "-N", node)

    def kill_slurmd(self, node: str) -> None:
        """Kill a node's slurmd; the steps of its jobs run on."""
        _end(self.hosts[node], self.folder / node / "slurmd.pid", "KILL")

    def power_off(self, node: str) -> None:
        """End a node with all its processes."""
        self.hosts[node].power_off()

    def power_on(self, node: str) -> None:
        self.hosts[node].power_on()
        self.set_rate(self._rate)
        self.start_slurmd(node)

    def drain(self, node: str) -> None:
        """Let the node's jobs end, and give it no more."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")

    def down(self, node: str) -> None:
        """Declare a node down, as Slurm does after `NODE_SECONDS` without a sign of it: its jobs are requeued."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def resume(self, node: str) -> None:
        self.attempt("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def tell_names(self, node: str, *, wrong: bool = False) -> None:
        """Let a node know all hosts' addresses. wrong: its own name is 127.0.1.1 there, as Debian installs it."""
        names = {name: host.address for name, host in self.hosts.items()}
        self.hosts[node].know(names | ({node: "127.0.1.1"} if wrong else {}))

    def set_rate(self, rate: str | None) -> None:
        """
        Limit what each node sends, to "8mbit" for example; None: no limit.

        A small model's steps then take a known time, mostly idle, so that a fault can meet a certain step.
        """
        self._rate = rate
        for node in (self.hosts[name] for name in NODES if self.hosts[name].is_on):
            node.slow_down(rate) if rate else node.speed_up()

    def fill_disk(self) -> None:
        """Leave no free byte on the shared disk."""
        free = shutil.disk_usage(self.shared).free
        with (self.shared / "filler").open("wb") as file, contextlib.suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, free)

    def empty_disk(self) -> None:
        (self.shared / "filler").unlink(missing_ok=True)

    def heal(self) -> None:
        """Undo everything above, cancel all jobs, and wait until all nodes are idle."""
        self.empty_disk()
        self._rate = None
        if not self.attempt("scontrol", "ping")[1].endswith("is UP\n"):
            self.start_controller()
        for name in NODES:
            self._heal_node(name)
        self.attempt("scancel", "--user=root")
        self.until(lambda: not self.run("squeue", "--noheader").strip())
        for name in NODES:
            self.resume(name)
        self.until(lambda: set(self.node_states().values()) == {"idle"})

    def _heal_node(self, name: str) -> None:
        host = self.hosts[name]
        if not host.is_on:
            self.power_on(name)
        self.tell_names(name)
        host.link("up")
        host.rejoin()
        host.speed_up()
        if not _lives(host, self.folder / name / "slurmd.pid"):
            self.start_slurmd(name)


def _end(host: Host, pid_file: Path, how: str) -> None:
    """Send a signal to a daemon, whose file has its number inside the host, and wait until it has ended."""
    script = 'p=$(cat "$0"); kill -s "$1" "$p"; while [ -d "/proc/$p" ]; do sleep 0.05; done'
    host.run("sh", "-c", script, str(pid_file), how)


def _lives(host: Host, pid_file: Path) -> bool:
    """Return whether the daemon of this file runs; another process may have its number by now."""
    script = '[ "$(cat "/proc/$(cat "$0")/comm")" = "$1" ]'
    return host.attempt("sh", "-c", script, str(pid_file), pid_file.stem)[0] == 0
