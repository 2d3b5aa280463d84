"""The Slurm job and step that this process is in, read from their environment variables. No torch."""

from __future__ import annotations

import os
import re
from typing import Final

# srun sets these in the tasks it starts. A batch script has SLURM_PROCID=0 and SLURM_NTASKS, but none of these.
_OF_A_STEP: Final = ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_SRUN_COMM_HOST")
_INTERACTIVE: Final = "4294967290"  # SLURM_STEP_ID of the shell that salloc starts on a node


def in_step() -> bool:
    """Return whether srun started this process, rather than it being a batch script, whose SLURM_PROCID is always 0."""
    env = os.environ
    return "SLURM_PROCID" in env and (env["SLURM_PROCID"] != "0" or any(name in env for name in _OF_A_STEP))


def count_tasks_of_step() -> None:
    """Prefer the step's own task count: a shell under salloc is a step of one task but keeps the job's SLURM_NTASKS."""
    env = os.environ
    if "SLURM_STEP_NUM_TASKS" in env and in_step():
        env["SLURM_NTASKS"] = env["SLURM_STEP_NUM_TASKS"]


def tasks_here() -> int:
    """
    Return how many of the step's tasks run on this node.

    SLURM_NTASKS_PER_NODE is set only with --ntasks-per-node, and is a limit, not a count. SLURM_TASKS_PER_NODE lists all
    nodes, "2(x3),1", in the order of SLURM_NODEID; a list with another sum describes the job, not this step.
    """
    env = os.environ
    tasks = int(env["SLURM_NTASKS"])
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        counts: list[int] = []
        for count, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", env.get(name, "")):
            counts += [int(count)] * int(times or 1)
        node = int(env.get("SLURM_NODEID", "0"))
        if sum(counts) == tasks and node < len(counts):
            return counts[node]
    if "SLURM_NTASKS_PER_NODE" in env:
        return min(tasks, int(env["SLURM_NTASKS_PER_NODE"]))
    return -(-tasks // int(env.get("SLURM_NNODES", "1")))


def nodes_of_job() -> int:
    """Return the number of nodes of the Slurm job; 1 outside a job."""
    return int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))


def nodes_of_step() -> int:
    """Return the number of nodes on which srun started this process; 1 if srun did not start it."""
    env = os.environ
    return int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES") or 1) if _is_task() else 1


def why_not_alone(nodes: int, fewest: int) -> str | None:
    """
    Return why a launcher of shoal must not start here as one of `nodes` launchers, of which at least `fewest` run; None if
    it may.

    It must not if it would train alone although the job has several nodes, or wait for launchers that never start.
    """
    jobs_nodes = nodes_of_job()
    if nodes == 1:
        return _alone(jobs_nodes)
    if "SLURM_JOB_NUM_NODES" in os.environ and jobs_nodes < fewest:
        return (
            f"this Slurm job has {_count(jobs_nodes, 'node')} (SLURM_JOB_NUM_NODES), but the run needs {fewest}; ask Slurm for "
            f"--nodes {nodes}, set launch.nodes to {jobs_nodes}, or unset SLURM_JOB_NUM_NODES if nodes of other jobs join"
        )
    if not _is_task():
        return _no_srun(jobs_nodes)
    if "SLURM_NTASKS" not in os.environ:
        return None
    if (here := tasks_here()) > 1:
        return (
            f"srun started {here} tasks on this node, but with launch.nodes each node needs one launcher, which starts "
            f"launch.processes processes; pass --ntasks {nodes_of_step()} --ntasks-per-node 1 to srun"
        )
    tasks = int(os.environ["SLURM_NTASKS"])
    if 1 < tasks < fewest:
        return (
            f"srun started {tasks} tasks (SLURM_NTASKS), but the run needs {fewest} nodes; pass --nodes {nodes} "
            "--ntasks-per-node 1 to srun"
        )
    return None


def why_not_torchrun(world_size: int) -> str | None:
    """
    Return why torchrun's world of `world_size` processes on this node alone is an error; None if it is not.

    It is an error if the job or the step has several nodes: each node would then train alone, or all but this one would be idle.
    """
    nodes = nodes_of_step() if _is_task() else nodes_of_job()
    if nodes == 1:
        return None
    return (
        f"torchrun started {_count(world_size, 'process', 'es')} on this node alone, but Slurm gave {nodes} nodes, so each "
        f"would train alone or be idle; put srun --ntasks-per-node 1 before torchrun, and pass it --nnodes {nodes}, "
        "--rdzv-backend c10d and --rdzv-endpoint"
    )


def _alone(jobs_nodes: int) -> str | None:
    if _is_task() or jobs_nodes == 1:  # srun with one task: the user has chosen one node
        return None
    return (
        f"launch.nodes is 1, but this Slurm job has {jobs_nodes} nodes (SLURM_JOB_NUM_NODES), of which all but one would be "
        f"idle; set launch.nodes to {jobs_nodes} and start with srun --ntasks-per-node 1 shoal train, or use one node with "
        "srun --nodes 1 --ntasks 1 shoal train"
    )


def _no_srun(jobs_nodes: int) -> str | None:
    if jobs_nodes == 1:
        return None
    return (
        f"this process is the batch script, not a task of srun, so shoal would start on one of the job's {jobs_nodes} nodes "
        "only and wait for the others; put srun --ntasks-per-node 1 before shoal"
    )


def _is_task() -> bool:
    """Return whether srun started this process as a task, other than the shell of salloc."""
    return in_step() and os.environ.get("SLURM_STEP_ID") != _INTERACTIVE


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{plural if number != 1 else ''}"
