"""The rank of this process in its run. The only module that reads RANK and WORLD_SIZE. No torch."""

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

LOCKED_BY = "SHOAL_LOCKED_BY"  # process id of the shoal launcher, which holds the run's lock for its workers
_NEEDED = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LEAST = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 1,
          "SLURM_PROCID": 0, "SLURM_NTASKS": 1, "SLURM_LOCALID": 0, "SLURM_NODEID": 0, "SLURM_NNODES": 1,
          "SLURM_NTASKS_PER_NODE": 1, "SLURM_STEP_NUM_TASKS": 1}  # fmt: skip
_MOST = {"MASTER_PORT": 65535}
# srun sets these in the tasks it starts. A batch script has SLURM_PROCID=0 and SLURM_NTASKS, but none of these.
_OF_A_STEP = ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_SRUN_COMM_HOST")


@dataclass(frozen=True)
class Place:
    """A process's rank in the run and on its node; both count from 0."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def is_worker() -> bool:
    """Return True in a worker started by shoal, by torchrun, or by srun with MASTER_ADDR set."""
    return "RANK" in os.environ or _under_srun()


def is_launched() -> bool:
    """Return True in a worker of shoal's own launcher, which prints the messages that concern all workers."""
    return os.environ.get(LOCKED_BY) == str(os.getppid())


def speaks_first() -> bool:
    """Return True in exactly one process of a run: shoal's launcher, or rank 0 under another launcher."""
    return not is_worker() or (LOCKED_BY not in os.environ and read_place().rank == 0)


def read_place() -> Place:
    """
    Read the rank from the launcher's environment variables; if no launcher set them, return the place of a single process.

    Raises `LaunchError` if variables are missing, invalid or contradictory.
    """
    if _under_srun():
        _check_slurm()
        _adopt_slurm()
    env = os.environ
    if "RANK" not in env:
        return Place()
    if missing := [name for name in _NEEDED if name not in env]:
        raise LaunchError(
            f"RANK is set but {', '.join(missing)} is not; start with shoal train, torchrun or srun, or unset RANK"
        )
    _numbers()
    if not env["MASTER_ADDR"].strip():
        raise LaunchError("MASTER_ADDR is empty; set it to the host of rank 0")
    rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
    place = Place(rank, world_size, int(env.get("LOCAL_RANK", rank)), int(env.get("LOCAL_WORLD_SIZE", world_size)))
    _check_bounds(place)
    return place


def _check_bounds(place: Place) -> None:
    _below("RANK", place.rank, "WORLD_SIZE", place.world_size)
    _below("LOCAL_RANK", place.local_rank, "LOCAL_WORLD_SIZE", place.local_world_size)
    if place.local_world_size > place.world_size:
        raise LaunchError(f"LOCAL_WORLD_SIZE is {place.local_world_size}, more than WORLD_SIZE {place.world_size}")


def describe_place() -> str:
    """Describe this worker's launcher, rank and rendezvous address, and name the variables that they come from."""
    place, env = read_place(), os.environ
    launcher, names = "another launcher", "RANK, WORLD_SIZE"
    if "TORCHELASTIC_RUN_ID" in env:
        launcher = "torchrun"
    elif _in_step() and env["SLURM_PROCID"] == env["RANK"]:
        launcher, names = "srun", "SLURM_PROCID, SLURM_NTASKS"
    return (
        f"started by {launcher}: rank {place.rank} of {place.world_size} ({names}), {place.local_world_size} on this node, "
        f"rendezvous at {on_one_line(env['MASTER_ADDR'])}:{env['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)"
    )


def unused_claims(nodes: int) -> list[str]:
    """
    Return a note on the launcher variables that are set but unused because this process is not a worker; [] if none are.

    nodes: `launch.nodes`. Raises `LaunchError` if the variables announce several processes: each would train alone.
    """
    env = os.environ
    if env.get("WORLD_SIZE", "1") != "1":
        raise LaunchError(
            f"WORLD_SIZE is {env['WORLD_SIZE']!r} but RANK is not set; start with shoal train, torchrun or srun, or unset "
            "WORLD_SIZE"
        )
    tasks = _slurm_tasks()
    if tasks > 1 and _in_step() and nodes == 1:
        raise LaunchError(
            f"srun started {tasks} tasks (SLURM_NTASKS) but MASTER_ADDR is not set, so each would train alone; set MASTER_ADDR "
            "to the host of the first task, or start one task per node with launch.nodes and launch.rendezvous"
        )
    if tasks > 1 and "MASTER_ADDR" in env and not _in_step():
        raise LaunchError(
            f"SLURM_NTASKS is {tasks} and MASTER_ADDR is set, but this process is the batch script, not a task; put srun "
            "before shoal, or unset MASTER_ADDR to let shoal start its own processes on this node"
        )
    unused = [name for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE") if name in env]
    if not unused:
        return []
    return [f"{', '.join(unused)} set without RANK, so ignored: shoal starts its own processes"]


def report_to_launcher(message: str) -> bool:
    """
    Leave `message` for `shoal train`, which prints it once for all its workers.

    Returns False if shoal did not start this worker. The file and its format are those of torch's elastic agent.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None or not is_launched():
        return False
    # written atomically: the launcher may kill this process at any moment, and the agent fails on half a file
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump({"message": message, "timestamp": int(time.time())}, file)
    os.replace(f"{path}.tmp", path)
    return True


def _under_srun() -> bool:
    return "RANK" not in os.environ and "MASTER_ADDR" in os.environ and _in_step()


def _in_step() -> bool:
    """Return whether srun started this process, rather than it being a batch script, whose SLURM_PROCID is always 0."""
    env = os.environ
    return "SLURM_PROCID" in env and (env["SLURM_PROCID"] != "0" or any(name in env for name in _OF_A_STEP))


def _slurm_tasks() -> int:
    """Return the number of tasks that Slurm reports, 1 outside Slurm."""
    _numbers()
    _count_tasks_of_step()
    env = os.environ
    return int(env.get("SLURM_NTASKS", "1")) if "SLURM_PROCID" in env else 1


def _count_tasks_of_step() -> None:
    """Prefer the step's own task count: a shell under salloc is a step of one task but keeps the job's SLURM_NTASKS."""
    env = os.environ
    if "SLURM_STEP_NUM_TASKS" in env and _in_step():
        env["SLURM_NTASKS"] = env["SLURM_STEP_NUM_TASKS"]


def _check_slurm() -> None:
    """Raise `LaunchError` if srun's variables are incomplete, or if variables set by the user contradict them."""
    env = os.environ
    _count_tasks_of_step()
    if "SLURM_NTASKS" not in env:
        raise LaunchError("SLURM_PROCID and MASTER_ADDR are set but SLURM_NTASKS is not; pass --ntasks to srun")
    _numbers()
    _below("SLURM_PROCID", int(env["SLURM_PROCID"]), "SLURM_NTASKS", int(env["SLURM_NTASKS"]))
    if env.get("WORLD_SIZE", env["SLURM_NTASKS"]) != env["SLURM_NTASKS"]:
        raise LaunchError(
            f"WORLD_SIZE is {env['WORLD_SIZE']} but srun started {env['SLURM_NTASKS']} tasks (SLURM_NTASKS); unset WORLD_SIZE"
        )


def _numbers() -> None:
    """Raise one `LaunchError` that names every variable that is not an integer or is out of range."""
    wrong = [
        f"{name} is {said!r}, not an integer of at least {least}" + f" and at most {_MOST.get(name)}" * (name in _MOST)
        for name, least in _LEAST.items()
        if (said := os.environ.get(name)) is not None
        and not (_is_integer(said) and least <= int(said) <= _MOST.get(name, math.inf))
    ]
    if wrong:
        raise LaunchError("; ".join(wrong) + "; the launcher sets these variables; unset them if you have set them")


def _is_integer(text: str) -> bool:
    return text.isascii() and text.removeprefix("-").isdecimal()


def _below(name: str, value: int, limit_name: str, limit: int) -> None:
    if value >= limit:
        raise LaunchError(
            f"{name} is {value} but must be below {limit_name}, {limit}; the launcher sets both; unset them if you have set them"
        )


def _adopt_slurm() -> None:
    """Copy srun's variables to RANK and WORLD_SIZE, which torch's rendezvous reads."""
    env = os.environ
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
    env.setdefault("LOCAL_RANK", env.get("SLURM_LOCALID", "0"))
    env.setdefault("LOCAL_WORLD_SIZE", str(_tasks_here(env)))
    env.setdefault("MASTER_PORT", "29500")


def _tasks_here(env: Mapping[str, str]) -> int:
    """
    Return how many of a Slurm step's tasks run on this node.

    SLURM_NTASKS_PER_NODE is set only with --ntasks-per-node, and is a limit, not a count. SLURM_TASKS_PER_NODE lists all
    nodes, "2(x3),1", in the order of SLURM_NODEID; a list with another sum describes the job, not this step.
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
