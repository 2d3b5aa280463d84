"""Worlds of one: launchers and workers that believe they are alone, although Slurm, torchrun or MPI gave them several nodes."""

from __future__ import annotations

import os
import socket

import pytest

from shoal.errors import LaunchError
from shoal.mesh.place import LOCKED_BY, check_world, unused_claims

STARTERS = ("SLURM_", "TORCHELASTIC_", "OMPI_", "PMI_", "MASTER_")
PLACES = ("MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", LOCKED_BY)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove all launcher variables, and restore the environment after the test."""
    for name in [*os.environ, *PLACES]:
        if name.startswith(STARTERS) or name in PLACES:
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)


def given(monkeypatch: pytest.MonkeyPatch, **variables: object) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def batch(nodes: int) -> dict[str, object]:
    """Return the variables of a batch script on the first of `nodes` nodes, as Slurm 22.05 sets them."""
    return {
        "SLURM_JOB_ID": 7, "SLURM_JOB_NUM_NODES": nodes, "SLURM_NNODES": nodes, "SLURM_PROCID": 0, "SLURM_LOCALID": 0,
        "SLURM_NODEID": 0, "SLURM_TASKS_PER_NODE": f"1(x{nodes})",
    }  # fmt: skip


def step(nodes: int, per_node: int, *, of: int | None = None) -> dict[str, object]:
    """Return the variables of the first task of `per_node` on each of `nodes` nodes, in a job of `of` nodes."""
    each = f"{per_node}(x{nodes})" if nodes > 1 else str(per_node)
    return batch(of or nodes) | {
        "SLURM_NNODES": nodes, "SLURM_NTASKS": nodes * per_node, "SLURM_STEP_ID": 0, "SLURM_STEP_NUM_NODES": nodes,
        "SLURM_STEP_NUM_TASKS": nodes * per_node, "SLURM_TASKS_PER_NODE": each, "SLURM_STEP_TASKS_PER_NODE": each,
    }  # fmt: skip


INTERACTIVE = step(1, 1, of=2) | {"SLURM_STEP_ID": 4294967290}  # the shell of salloc, on the first node


@pytest.mark.parametrize(
    ("variables", "nodes", "fewest", "named"),
    [
        # one launcher in the batch script or the shell of salloc, the other nodes idle
        (batch(2), 1, 1, ["launch.nodes is 1", "2 nodes", "SLURM_JOB_NUM_NODES", "srun --ntasks-per-node 1"]),
        (INTERACTIVE, 1, 1, ["launch.nodes is 1", "2 nodes", "srun --ntasks-per-node 1"]),
        # a launcher on each node, each alone
        (step(2, 1), 1, 1, ["2 tasks", "each would train alone", "launch.nodes"]),
        # one launcher that would wait for others in vain
        (batch(2), 2, 2, ["batch script", "srun --ntasks-per-node 1 before shoal"]),
        (INTERACTIVE, 2, 2, ["batch script", "srun --ntasks-per-node 1 before shoal"]),
        (batch(1), 2, 2, ["1 node ", "needs 2", "--nodes 2", "launch.nodes to 1"]),
        (step(2, 1), 8, 4, ["2 nodes ", "needs 4", "--nodes 8", "launch.nodes to 2"]),
        (step(2, 1, of=4), 4, 4, ["2 tasks", "needs 4", "--nodes 4"]),
        # several launchers on a node
        (step(2, 8), 2, 2, ["8 tasks on this node", "--ntasks-per-node 1", "launch.processes"]),
    ],
    ids=str,
)
def test_a_launcher_that_is_wrongly_alone_or_waits_in_vain_is_rejected(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, object], nodes: int, fewest: int, named: list[str]
) -> None:
    given(monkeypatch, **variables)
    with pytest.raises(LaunchError) as rejected:
        unused_claims(nodes, fewest)
    assert [words for words in named if words not in str(rejected.value)] == []


@pytest.mark.parametrize(
    ("variables", "nodes", "fewest"),
    [
        (batch(1), 1, 1),
        (step(1, 1), 1, 1),
        (step(1, 1, of=2), 1, 1),  # srun --nodes 1 --ntasks 1: chosen
        (step(2, 1), 2, 2),
        (step(3, 1), 2, 2),  # a spare
        (step(2, 1), 4, 1),  # may grow
        (step(1, 1, of=2), 2, 2),  # a srun of its own for each node
        ({}, 2, 2),
    ],
    ids=str,
)
def test_launchers_that_slurm_started_rightly_start(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, object], nodes: int, fewest: int
) -> None:
    given(monkeypatch, **variables)
    assert unused_claims(nodes, fewest) == []


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_mpirun_starts_no_worlds_of_one(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    given(monkeypatch, **{name: 2})
    with pytest.raises(LaunchError, match=f"mpirun started 2 processes .{name}. .*each would train alone"):
        unused_claims(1)
    assert unused_claims(2) == []  # a launcher on each node
    given(monkeypatch, **{name: 1})
    assert unused_claims(1) == []


def place(rank: int, size: int, here: int | None = None, host: str = "127.0.0.1") -> dict[str, object]:
    known = {} if here is None else {"LOCAL_RANK": rank % here, "LOCAL_WORLD_SIZE": here}
    return {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": host, "MASTER_PORT": 29500, **known}


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}


@pytest.mark.parametrize("slurm", [step(2, 1), batch(2)], ids=["a task on each node", "the batch script"])
def test_torchrun_on_each_of_several_nodes_is_told_of_the_others(
    monkeypatch: pytest.MonkeyPatch, slurm: dict[str, object]
) -> None:
    given(monkeypatch, **slurm, **TORCHRUN, **place(0, 8, 8))
    with pytest.raises(LaunchError, match=r"torchrun started 8 processes on this node alone.*--nnodes 2"):
        check_world()


@pytest.mark.parametrize(
    "variables",
    [
        {**step(2, 1), **TORCHRUN, **place(0, 16, 8, host="192.0.2.1")},
        {**step(1, 1, of=2), **TORCHRUN, **place(0, 8, 8)},
        {**TORCHRUN, **place(0, 8, 8)},
        {**step(1, 8), "MASTER_ADDR": "localhost"},
        place(1, 2),  # by hand, on one machine
        place(0, 1, host="localhost"),
    ],
    ids=str,
)
def test_worlds_that_are_whole_start(monkeypatch: pytest.MonkeyPatch, variables: dict[str, object]) -> None:
    given(monkeypatch, **variables)
    check_world()


@pytest.mark.parametrize(
    "variables",
    [
        {**TORCHRUN, **place(0, 16, 8)},
        {**TORCHRUN, **place(8, 16, 8, host="localhost")},
        {**step(2, 8), "MASTER_ADDR": "127.0.0.1"},
        {**step(2, 8), "SLURM_PROCID": 15, "SLURM_NODEID": 1, "SLURM_LOCALID": 7, "MASTER_ADDR": "localhost"},
    ],
    ids=str,
)
def test_a_head_that_other_nodes_cannot_reach_is_named(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, object]
) -> None:
    given(monkeypatch, **variables)
    with pytest.raises(LaunchError, match=r"MASTER_ADDR \S+ is a loopback address on .*which other nodes cannot reach"):
        check_world()


def test_a_name_that_is_loopback_here_is_named_though_the_nodes_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian resolves a machine's own name to 127.0.1.1."""
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *given, **named: [(socket.AF_INET, 1, 6, "", ("127.0.1.1", 29500))]
    )
    given(monkeypatch, **place(0, 2, host="node0"))
    with pytest.raises(LaunchError, match=r"MASTER_ADDR node0 is a loopback address .*or to 127\.0\.0\.1 if all ranks"):
        check_world()
