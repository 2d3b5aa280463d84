"""The Slurm job that the doctor runs in: its nodes, its limits, and its share of each node. No torch."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from shoal.doctor.command import run_quietly
from shoal.doctor.findings import Finding
from shoal.doctor.judge_node import Wanted
from shoal.errors import LaunchError
from shoal.fault.limit import ENDS, FLOOR_SECONDS

SLURM_SECONDS: Final = 10.0  # time limit of a question to the controller, which may be restarting


@dataclass(frozen=True)
class Job:
    """
    A Slurm job and its nodes.

    ends: seconds since 1970; None without a limit. requeue: None if unknown. gpus: on each node, None if none were asked for.
    """

    number: str
    nodes: tuple[str, ...]
    ends: float | None = None
    requeue: bool | None = None
    gpus: int | None = None
    cores: int | None = None
    unknown: str = field(default="", compare=False)  # why `scontrol` did not tell more


def this_job(environment: Mapping[str, str] = os.environ) -> Job | None:
    """
    Return the Slurm job that this process runs in, or None.

    Raises `LaunchError` if the names of its nodes cannot be read.
    """
    number = environment.get("SLURM_JOB_ID")
    listed = environment.get("SLURM_JOB_NODELIST")
    if not number or not listed:
        return None
    text, why = run_quietly(["scontrol", "show", "hostnames", listed], SLURM_SECONDS)
    nodes = tuple(text.split()) or expand(listed)
    if not nodes:
        raise LaunchError(f"the nodes of this job, {listed}, cannot be read ({why}); name them with --hosts")
    shown, why = run_quietly(["scontrol", "show", "job", "--oneliner", number], SLURM_SECONDS)
    facts = dict(re.findall(r"(\S+?)=(\S*)", shown))
    ends = environment.get(ENDS)
    return Job(
        number, nodes, ends=float(ends) if ends else None,
        requeue=facts["Requeue"] == "1" if "Requeue" in facts else None,
        gpus=_integer(environment.get("SLURM_GPUS_ON_NODE")), unknown=why,
        cores=_integer(environment.get("SLURM_CPUS_PER_TASK")),
    )  # fmt: skip


def expand(listed: str) -> tuple[str, ...]:
    """Return the names in a list of nodes such as "n[1-3,07],login", for machines without scontrol; () if it is none."""
    names = []
    for part in re.split(r",(?![^\[]*\])", listed):  # at commas outside brackets
        found = re.fullmatch(r"([\w.-]*)(?:\[([\d,-]+)\]([\w.-]*))?", part)
        if found is None or not part:
            return ()
        if found[2] is None:
            names.append(found[1])
            continue
        for piece in found[2].split(","):
            first, _, last = piece.partition("-")
            names += [f"{found[1]}{n:0{len(first)}}{found[3]}" for n in range(int(first), int(last or first) + 1)]
    return tuple(names)


def _integer(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


def judge_job(
    job: Job, *, nodes: int | None, save_seconds: float | None, now: float | None = None
) -> Iterator[Finding]:
    """
    Yield what is wrong with the job.

    nodes: how many were asked for. save_seconds: the slowest save of the run. now: seconds since 1970; the time of the call by
    default.
    """
    if nodes is not None and len(job.nodes) < nodes:
        yield Finding("allocation", (), f"job {job.number} has {len(job.nodes)} nodes, {nodes} were asked for")
    left = None if job.ends is None else job.ends - (time.time() if now is None else now)
    needed = 2 * (save_seconds or 0.0) + FLOOR_SECONDS
    if left is not None and left < needed:
        why = f"two saves take {2 * save_seconds:.0f} s" if save_seconds else "ending all processes takes a moment"
        yield Finding(
            "time-limit", (),
            f"job {job.number} ends in {max(0.0, left):.0f} s, but {why} and {needed:.0f} s are needed; ask for more --time",
        )  # fmt: skip
    if job.requeue is False:
        yield Finding(
            "no-requeue",
            (),
            f"job {job.number} may not be requeued (Requeue=0); submit it with --requeue, or as a chain of jobs",
            is_warning=True,
        )


def wanted_of(job: Job | None, gpus_per_node: int | None) -> Wanted:
    """Return what each node should have: as the command line says, else as the job was promised."""
    if job is None:
        return Wanted(gpus=gpus_per_node)
    return Wanted(gpus=job.gpus if gpus_per_node is None else gpus_per_node, cores=job.cores)
