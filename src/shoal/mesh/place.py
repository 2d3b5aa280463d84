"""Where this process stands among those of its run: the only reader of RANK and WORLD_SIZE. No torch."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

from shoal.errors import LaunchError
from shoal.system.output import on_one_line

LOCKED_BY = "SHOAL_LOCKED_BY"  # the launcher's process id: it holds the run's lock for its workers
_NEEDED = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LEAST = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 1,
          "SLURM_PROCID": 0, "SLURM_NTASKS": 1, "SLURM_LOCALID": 0, "SLURM_NODEID": 0, "SLURM_NNODES": 1,
          "SLURM_NTASKS_PER_NODE": 1, "SLURM_STEP_NUM_TASKS": 1}  # fmt: skip
_MOST = {"MASTER_PORT": 65535}
# srun sets these in the tasks that it starts; a batch script has SLURM_PROCID 0 and SLURM_NTASKS, and none of them.
_OF_A_STEP = ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_SRUN_COMM_HOST")


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


def is_launched() -> bool:
    """True in a worker of our own launcher, which tells what concerns all of them."""
    return os.environ.get(LOCKED_BY) == str(os.getppid())


def speaks_first() -> bool:
    """True in one process of a run: the launcher, or rank 0 where another program started the workers."""
    return not is_worker() or (LOCKED_BY not in os.environ and read_place().rank == 0)


def read_place() -> Place:
    """From the launcher's variables, or alone. Raises `LaunchError` where they are not whole, or contradict each other."""
    if _under_srun():
        _check_slurm()
        _adopt_slurm()
    env = os.environ
    if "RANK" not in env:
        return Place()
    if missing := [name for name in _NEEDED if name not in env]:
        raise LaunchError(
            f"RANK is set but {', '.join(missing)} is not; start through shoal train, torchrun or srun, or unset RANK"
        )
    _numbers()
    if not env["MASTER_ADDR"].strip():
        raise LaunchError("MASTER_ADDR is empty; set it to the host of rank 0")
    rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
    place = Place(rank, world_size, int(env.get("LOCAL_RANK", rank)), int(env.get("LOCAL_WORLD_SIZE", world_size)))
    _below("RANK", place.rank, "WORLD_SIZE", place.world_size)
    _below("LOCAL_RANK", place.local_rank, "LOCAL_WORLD_SIZE", place.local_world_size)
    if place.local_world_size > place.world_size:
        raise LaunchError(f"LOCAL_WORLD_SIZE is {place.local_world_size}, more than WORLD_SIZE {place.world_size}")
    return place


def describe_place() -> str:
    """Where this worker stands, and which variables of its launcher say so."""
    place, env = read_place(), os.environ
    launcher, names = "another launcher", "RANK, WORLD_SIZE"
    if "TORCHELASTIC_RUN_ID" in env:
        launcher = "torchrun"
    elif _in_step() and env["SLURM_PROCID"] == env["RANK"]:
        launcher, names = "srun", "SLURM_PROCID, SLURM_NTASKS"
    return (
        f"started by {launcher}: rank {place.rank} of {place.world_size} ({names}), {place.local_world_size} on this machine, "
        f"meeting at {on_one_line(env['MASTER_ADDR'])}:{env['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)"
    )


def unused_claims(nodes: int) -> list[str]:
    """
    What a launcher's variables say in a process that is no worker by them, for a person to know.

    nodes: launch.nodes. Raises `LaunchError` where they claim several processes, which would not be of one run.
    """
    env = os.environ
    if env.get("WORLD_SIZE", "1") != "1":
        raise LaunchError(
            f"WORLD_SIZE is {env['WORLD_SIZE']!r} but RANK is not set; start through shoal train, torchrun or srun, or unset "
            "WORLD_SIZE"
        )
    tasks = _slurm_tasks()
    if tasks > 1 and _in_step() and nodes == 1:
        raise LaunchError(
            f"srun started {tasks} tasks (SLURM_NTASKS), and MASTER_ADDR is not set, so each would train alone; set MASTER_ADDR "
            "to the host of the first task, or start one task on each node with launch.nodes and launch.rendezvous"
        )
    if tasks > 1 and "MASTER_ADDR" in env and not _in_step():
        raise LaunchError(
            f"SLURM_NTASKS is {tasks} and MASTER_ADDR is set, but this is the batch script and not one of its tasks; put "
            "srun before shoal, or unset MASTER_ADDR to train with shoal's own processes on this node"
        )
    unused = [name for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE") if name in env]
    if not unused:
        return []
    return [f"{', '.join(unused)} set but not RANK: no other launcher started this process, so shoal starts its own"]


def report_to_launcher(message: str) -> bool:
    """
    Leave `message` for `shoal train`, which says it once for all its workers; False where it did not start this one.

    The file and its form are those of torch's elastic agent.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None or not is_launched():
        return False
    # whole or not there: the launcher may end this process at any moment, and the agent fails on half a file
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump({"message": message, "timestamp": int(time.time())}, file)
    os.replace(f"{path}.tmp", path)
    return True


def _under_srun() -> bool:
    return "RANK" not in os.environ and "MASTER_ADDR" in os.environ and _in_step()


def _in_step() -> bool:
    """Whether srun started this process; a batch script is always task 0."""
    env = os.environ
    return "SLURM_PROCID" in env and (env["SLURM_PROCID"] != "0" or any(name in env for name in _OF_A_STEP))


def _slurm_tasks() -> int:
    """How many tasks Slurm says that there are; 1 where it says nothing."""
    _numbers()
    _count_tasks_of_step()
    env = os.environ
    return int(env.get("SLURM_NTASKS", "1")) if "SLURM_PROCID" in env else 1


def _count_tasks_of_step() -> None:
    """A step's own number of tasks wins: a shell that salloc started is a step of one, and keeps the job's SLURM_NTASKS."""
    env = os.environ
    if "SLURM_STEP_NUM_TASKS" in env and _in_step():
        env["SLURM_NTASKS"] = env["SLURM_STEP_NUM_TASKS"]


def _check_slurm() -> None:
    """Raise `LaunchError` where srun's variables are not whole, or the user's own contradict them."""
    env = os.environ
    _count_tasks_of_step()
    if "SLURM_NTASKS" not in env:
        raise LaunchError("SLURM_PROCID and MASTER_ADDR are set but SLURM_NTASKS is not; give srun --ntasks")
    _numbers()
    _below("SLURM_PROCID", int(env["SLURM_PROCID"]), "SLURM_NTASKS", int(env["SLURM_NTASKS"]))
    if env.get("WORLD_SIZE", env["SLURM_NTASKS"]) != env["SLURM_NTASKS"]:
        raise LaunchError(
            f"WORLD_SIZE is {env['WORLD_SIZE']}, and srun started {env['SLURM_NTASKS']} tasks (SLURM_NTASKS); unset WORLD_SIZE"
        )


def _numbers() -> None:
    """Raise `LaunchError` for each variable that is there and no number, or too small or large a one."""
    wrong = [
        f"{name} is {said!r}, not an integer of at least {least}" + f" and at most {_MOST.get(name)}" * (name in _MOST)
        for name, least in _LEAST.items()
        if (said := os.environ.get(name)) is not None
        and not (_is_integer(said) and least <= int(said) <= _MOST.get(name, math.inf))
    ]
    if wrong:
        raise LaunchError("; ".join(wrong) + "; a launcher sets these: leave them to it, or unset them")


def _is_integer(text: str) -> bool:
    return text.isascii() and text.removeprefix("-").isdecimal()


def _below(name: str, value: int, limit_name: str, limit: int) -> None:
    if value >= limit:
        raise LaunchError(f"{name} is {value} and {limit_name} is {limit}; a launcher sets both: leave them to it")


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
