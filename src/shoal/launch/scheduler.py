"""Slurm's commands: sbatch, squeue, scontrol and scancel, with clear errors. No torch."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shoal.errors import LaunchError
from shoal.system.output import on_one_line

COMMAND_SECONDS: Final = 120.0  # Slurm's commands retry by themselves for a while if the controller is down
CONTROLLER_SECONDS: Final = 600.0  # to wait for a controller that is being restarted
RETRY_SECONDS: Final = 5.0
_AWAY: Final = re.compile(
    r"unable to contact slurm controller|connection refused|socket timed out|zero bytes were transmitted|connection reset"
    r"|communication connection failure|slurm backup controller in standby",
    re.IGNORECASE,
)
# A part of sbatch's message -> what to set. The message itself is printed too.
_ADVICE: Final = {
    "invalid partition": "set --partition, or partition in cluster.yaml; sinfo --format=%P lists them",
    "invalid account": "set --account, or account in cluster.yaml; sacctmgr show associations user=$USER lists yours",
    "invalid qos": "set --qos, or qos in cluster.yaml; sacctmgr show associations user=$USER format=qos lists yours",
    "time limit": "set a shorter --time; sinfo --format='%P %l' shows the limit of each partition",
    "requested node configuration": "ask for fewer GPUs, cores or less memory of each node; sinfo --format='%P %c %m %G' shows what nodes have",
    "more processors": "ask for fewer nodes or cores",
    "too many nodes": "set a smaller --nodes",
    "node count": "set a smaller --nodes, or fewer --spare-nodes",
    "invalid feature": "set --constraint, or constraint in cluster.yaml; sinfo --format=%f lists the features",
    "invalid generic resource": "the cluster has no GPUs of that name; see gpu_type in cluster.yaml, and sinfo --format=%G",
    "reservation": "set reservation in cluster.yaml; scontrol show reservation lists them",
    "dependency": "set --dependency to jobs that exist, such as afterok:1234",
    "job array": "set --array to indexes such as 0-3, below the cluster's MaxArraySize",
}  # fmt: skip


class SlurmError(LaunchError):
    """A command of Slurm that is missing or failed. away: whether the controller did not answer, so that a retry may help."""

    def __init__(self, text: str, *, away: bool = False) -> None:
        super().__init__(text)
        self.away = away


@dataclass(frozen=True)
class Queued:
    """A job in Slurm's queue, as squeue lists it."""

    job: str  # id, unique for each task of an array
    array: str  # ARRAYJOB_INDEX of a task of an array, else ""
    state: str  # RUNNING, PENDING, ...
    reason: str  # why it waits
    elapsed: str
    limit: str
    nodes: str  # names, or "" while it waits

    def is_one_of(self, jobs: Iterable[str]) -> bool:
        """Return whether this is one of `jobs`, which name tasks of arrays either way."""
        return not {self.job, self.array}.isdisjoint(jobs)


def submit(file: Path, options: Sequence[str] = ()) -> str:
    """Submit a batch script; return the job's id. Raises `SlurmError` with sbatch's message and what to set."""
    answer = _run(["sbatch", "--parsable", *options, str(file)])
    return answer.strip().splitlines()[-1].partition(";")[0]


def queue() -> list[Queued]:
    """Return all jobs in the queue that this user may see."""
    form = "%A|%F_%K|%T|%r|%M|%l|%N"
    lines = [line.split("|") for line in _run(["squeue", "--noheader", "--array", f"--format={form}"]).splitlines()]
    return [
        Queued(job, "" if array.endswith("_N/A") else array, *rest) for job, array, *rest in lines if len(rest) == 5
    ]


def show(job: str) -> dict[str, str]:
    """Return Slurm's record of a job by its names, such as JobState and BatchFlag."""
    text = _run(["scontrol", "show", "job", job, "--oneliner"])
    return dict(re.findall(r"(?:^|\s)([A-Za-z][\w/:]*)=(\S*)", text))


def requeue(job: str) -> None:
    """Put a job back into the queue under the same id. Slurm then ends its processes, also the caller."""
    _run(["scontrol", "requeue", job])


def cancel(job: str) -> None:
    _run(["scancel", job])


def signal_script(job: str, signal: str) -> None:
    """Send a signal to a job's batch script, and to nothing else."""
    _run(["scancel", "--batch", f"--signal={signal}", job])


def has(command: str) -> bool:
    """Return whether a command of Slurm is installed here."""
    return shutil.which(command) is not None


def patiently(do: Callable[[], None], say: Callable[[str], None], seconds: float = CONTROLLER_SECONDS) -> None:
    """Call `do` until the controller answers. Raises the last `SlurmError` after `seconds`, any other at once."""
    begun, told = time.monotonic(), False
    while True:
        try:
            return do()
        except SlurmError as error:
            if not error.away or time.monotonic() - begun > seconds:
                raise
            if not told:
                say(f"waiting for Slurm's controller: {error}")
                told = True
        time.sleep(RETRY_SECONDS)


def _run(words: Sequence[str]) -> str:
    """Return the output of a command. Raises `SlurmError`."""
    name = words[0]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=COMMAND_SECONDS, stdin=subprocess.DEVNULL, check=False
        )
    except FileNotFoundError:
        raise SlurmError(
            f"{name} is not on PATH; run this on a node of a Slurm cluster, such as its login node"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{name} did not answer within {COMMAND_SECONDS:.0f} s; is Slurm's controller up?", away=True
        ) from None
    except OSError as error:
        raise SlurmError(f"{name} cannot be started: {error.strerror}") from None
    if done.returncode == 0:
        return done.stdout
    said = _cleaned(done.stderr or done.stdout) or f"exit code {done.returncode}"
    advice = next((what for part, what in _ADVICE.items() if part in said.lower()), "")
    raise SlurmError(f"{name}: {said}" + f"; {advice}" * bool(advice), away=bool(_AWAY.search(said)))


def _cleaned(text: str) -> str:
    """Return the messages of a command of Slurm on one line, without its name and level before each."""
    lines = [re.sub(r"^(\w+: )?((error|fatal): )?", "", line).strip() for line in text.splitlines()]
    return on_one_line("; ".join(line for line in lines if line))
