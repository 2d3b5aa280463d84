"""Where this process stands among those of its run: the only reader of RANK and WORLD_SIZE. No torch."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

from shoal.errors import LaunchError

LOCKED_BY = "SHOAL_LOCKED_BY"  # the launcher's process id: it holds the run's lock for its workers
_NEEDED = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """Ranks count from 0; the local ones within a machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def is_worker() -> bool:
    """True in a process that a launcher (shoal's, torchrun, or srun with MASTER_ADDR set) started."""
    return "RANK" in os.environ or _under_srun()


def speaks_first() -> bool:
    """True in one process of a run: the launcher, or rank 0 where another program started the workers."""
    return not is_worker() or (LOCKED_BY not in os.environ and read_place().rank == 0)


def read_place() -> Place:
    """From the launcher's variables, or alone. Raises `LaunchError` where some are missing."""
    if _under_srun():
        _adopt_slurm()
    env = os.environ
    if "RANK" not in env:
        return Place()
    if missing := [name for name in _NEEDED if name not in env]:
        raise LaunchError(f"RANK is set but {', '.join(missing)} is not; start through shoal train, torchrun or srun")
    rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
    return Place(rank, world_size, int(env.get("LOCAL_RANK", rank)), int(env.get("LOCAL_WORLD_SIZE", world_size)))


def report_to_launcher(message: str) -> bool:
    """
    Leave `message` for `shoal train`, which says it once for all its workers; False where it did not start this one.

    The file and its form are those of torch's elastic agent.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None or os.environ.get(LOCKED_BY) != str(os.getppid()):
        return False
    # whole or not there: the launcher may end this process at any moment, and the agent fails on half a file
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump({"message": message, "timestamp": int(time.time())}, file)
    os.replace(f"{path}.tmp", path)
    return True


def _under_srun() -> bool:
    return "RANK" not in os.environ and "SLURM_PROCID" in os.environ and "MASTER_ADDR" in os.environ


def _adopt_slurm() -> None:
    """torch's rendezvous reads RANK and WORLD_SIZE from the environment; srun calls them otherwise."""
    env = os.environ
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
    env.setdefault("LOCAL_RANK", env.get("SLURM_LOCALID", "0"))
    env.setdefault("LOCAL_WORLD_SIZE", str(_tasks_here(env)))
    env.setdefault("MASTER_PORT", "29500")


def _tasks_here(env: Mapping[str, str]) -> int:
    """
    Return how many of a Slurm step's tasks run on this node.

    SLURM_NTASKS_PER_NODE is there only where --ntasks-per-node was given, and is then a limit. SLURM_TASKS_PER_NODE lists
    all nodes, "2(x3),1", in the order of SLURM_NODEID; a list with another sum belongs to the job, not to this step.
    """
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
