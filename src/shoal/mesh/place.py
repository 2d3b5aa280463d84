"""The rank of this process in its run. The only module that reads RANK and WORLD_SIZE. No torch."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from dataclasses import dataclass

from shoal.errors import LaunchError
from shoal.mesh.slurm_step import count_tasks_of_step, in_step, tasks_here, why_not_alone, why_not_torchrun
from shoal.system.network import LOOPBACK, is_loopback
from shoal.system.output import on_one_line

LOCKED_BY = "SHOAL_LOCKED_BY"  # process id of the shoal launcher, which holds the run's lock for its workers
_NEEDED = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LEAST = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 1,
          "SLURM_PROCID": 0, "SLURM_NTASKS": 1, "SLURM_LOCALID": 0, "SLURM_NODEID": 0, "SLURM_NNODES": 1,
          "SLURM_NTASKS_PER_NODE": 1, "SLURM_STEP_NUM_TASKS": 1, "SLURM_JOB_NUM_NODES": 1, "SLURM_STEP_NUM_NODES": 1}  # fmt: skip
_MOST = {"MASTER_PORT": 65535}
_OF_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # numbers of processes, from Open MPI and from MPICH


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
    elif in_step() and env["SLURM_PROCID"] == env["RANK"]:
        launcher, names = "srun", "SLURM_PROCID, SLURM_NTASKS"
    return (
        f"started by {launcher}: rank {place.rank} of {place.world_size} ({names}), {place.local_world_size} on this node, "
        f"rendezvous at {on_one_line(env['MASTER_ADDR'])}:{env['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)"
    )


def unused_claims(nodes: int, fewest: int | None = None) -> list[str]:
    """
    Return a note on the launcher variables that are set but unused because this process is not a worker; [] if none are.

    nodes: `launch.nodes`. fewest: the minimum number of nodes; None: `nodes`. Raises `LaunchError` if the variables announce
    several processes or nodes, of which each would train alone or wait for others that never start.
    """
    env = os.environ
    if env.get("WORLD_SIZE", "1") != "1":
        raise LaunchError(
            f"WORLD_SIZE is {env['WORLD_SIZE']!r} but RANK is not set; start with shoal train, torchrun or srun, or unset "
            "WORLD_SIZE"
        )
    tasks = _slurm_tasks()
    if tasks > 1 and in_step() and nodes == 1:
        raise LaunchError(
            f"srun started {tasks} tasks (SLURM_NTASKS) but MASTER_ADDR is not set, so each would train alone; set MASTER_ADDR "
            "to the host of the first task, or start one task per node with launch.nodes and launch.rendezvous"
        )
    if tasks > 1 and "MASTER_ADDR" in env and not in_step():
        raise LaunchError(
            f"SLURM_NTASKS is {tasks} and MASTER_ADDR is set, but this process is the batch script, not a task; put srun "
            "before shoal, or unset MASTER_ADDR to let shoal start its own processes on this node"
        )
    if "SLURM_JOB_ID" in env and (why := why_not_alone(nodes, fewest or nodes)):
        raise LaunchError(why)
    if nodes == 1 and not in_step():
        _reject_other_launchers()
    unused = [name for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE") if name in env]
    if not unused:
        return []
    return [f"{', '.join(unused)} set without RANK, so ignored: shoal starts its own processes"]


def _reject_other_launchers() -> None:
    """Raise `LaunchError` if MPI's launcher started several of this process: each would train alone."""
    for name in _OF_MPI:
        if (count := os.environ.get(name, "1")) != "1":
            raise LaunchError(
                f"mpirun started {on_one_line(count)} processes ({name}) but RANK and MASTER_ADDR are not set, so each would train "
                "alone; start with shoal train, torchrun or srun, or one process per node with launch.nodes and launch.rendezvous"
            )


def check_world() -> None:
    """
    Raise `LaunchError` if this worker of another launcher would be in a world of its own, or could never reach rank 0.

    That is so under torchrun on several Slurm nodes without --nnodes, and if MASTER_ADDR is a loopback address although
    the world has several nodes. Does nothing in a worker of shoal's own launcher.
    """
    place, env = read_place(), os.environ
    if is_launched():
        return
    is_whole = place.local_world_size == place.world_size and "LOCAL_WORLD_SIZE" in env
    if (
        is_whole
        and "TORCHELASTIC_RUN_ID" in env
        and "SLURM_JOB_ID" in env
        and (why := why_not_torchrun(place.world_size))
    ):
        raise LaunchError(why)
    if place.world_size == 1 or is_whole:
        return
    host = env["MASTER_ADDR"]
    several = place.world_size > place.local_world_size
    if is_loopback(host) and (several or host not in (*LOOPBACK, "localhost")):
        where = "which other nodes cannot reach" if several else "which other nodes, if there are any, cannot reach"
        here = "" if several else ", or to 127.0.0.1 if all ranks are on this node"
        raise LaunchError(
            f"MASTER_ADDR {on_one_line(host)} is a loopback address on {socket.gethostname()}, {where}; set MASTER_ADDR to "
            f"the network address of rank 0's node{here}"
        )


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
    return "RANK" not in os.environ and "MASTER_ADDR" in os.environ and in_step()


def _slurm_tasks() -> int:
    """Return the number of tasks that Slurm reports, 1 outside Slurm."""
    _numbers()
    count_tasks_of_step()
    env = os.environ
    return int(env.get("SLURM_NTASKS", "1")) if "SLURM_PROCID" in env else 1


def _check_slurm() -> None:
    """Raise `LaunchError` if srun's variables are incomplete, or if variables set by the user contradict them."""
    env = os.environ
    count_tasks_of_step()
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
    env.setdefault("LOCAL_WORLD_SIZE", str(tasks_here()))
    env.setdefault("MASTER_PORT", "29500")
