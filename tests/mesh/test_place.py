"""Workers started by other launchers, and errors left for shoal's launcher."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from shoal.config.options import Config
from shoal.errors import LaunchError
from shoal.launch.torchrun import fit_to_place
from shoal.mesh.place import (
    LOCKED_BY,
    Place,
    describe_place,
    is_worker,
    read_place,
    report_to_launcher,
    unused_claims,
)
from shoal.system.cpu import count_cores

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID",
             "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NNODES", "SLURM_NTASKS_PER_NODE",
             "SLURM_TASKS_PER_NODE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS",
             "SLURM_SRUN_COMM_HOST", "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_RUN_ID", LOCKED_BY)  # fmt: skip


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove all launcher variables, and restore the environment after the test."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in (
        "OMP_NUM_THREADS",
        "MALLOC_MMAP_THRESHOLD_",
        "MALLOC_TRIM_THRESHOLD_",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
    ):
        monkeypatch.setenv(name, os.environ.get(name, "1"))


def test_alone_under_torchrun_and_under_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_worker()
    assert read_place() == Place(0, 1, 0, 1)
    monkeypatch.setenv("SLURM_PROCID", "5")  # inside an allocation, but without a rendezvous address
    assert not is_worker()
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "4")
    assert is_worker()
    assert read_place() == Place(5, 8, 1, 4)
    assert os.environ["RANK"] == "5"


@pytest.mark.parametrize(
    ("given", "here"),
    [
        ({"TASKS_PER_NODE": "2(x3),1", "NTASKS": "7", "NODEID": "2"}, 2),
        ({"TASKS_PER_NODE": "2(x3),1", "NTASKS": "7", "NODEID": "3"}, 1),
        ({"TASKS_PER_NODE": "8", "NTASKS": "8", "NODEID": "0"}, 8),
        ({"TASKS_PER_NODE": "4(x2)", "STEP_TASKS_PER_NODE": "1(x2)", "NTASKS": "2", "NODEID": "1"}, 1),
        # TASKS_PER_NODE lists the job's tasks, not the step's
        ({"TASKS_PER_NODE": "8(x2)", "NTASKS": "4", "NNODES": "2", "NODEID": "1"}, 2),
        # NTASKS_PER_NODE is a limit, not a count
        ({"TASKS_PER_NODE": "3,1", "NTASKS_PER_NODE": "3", "NTASKS": "4", "NODEID": "1"}, 1),
        ({"NTASKS": "8", "NNODES": "2"}, 4),
        ({"NTASKS": "3"}, 3),
    ],
    ids=str,
)
def test_srun_without_ntasks_per_node_says_how_many_are_here(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], here: int
) -> None:
    for name, value in ({"PROCID": "0", "LOCALID": "0", "STEP_ID": "0"} | given).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("MASTER_ADDR", "node1")
    assert read_place().local_world_size == here


def test_half_a_launchers_variables_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(LaunchError, match="RANK is set but WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not"):
        read_place()


TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "n0",
    "MASTER_PORT": "29500",
}
SRUN = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "MASTER_ADDR": "n0"}
BATCH = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "MASTER_ADDR": "n0"}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (TORCHRUN | {"RANK": "4"}, ["RANK", "WORLD_SIZE"]),
        (TORCHRUN | {"RANK": "-1"}, ["RANK"]),
        (TORCHRUN | {"RANK": ""}, ["RANK"]),
        (TORCHRUN | {"WORLD_SIZE": "two", "MASTER_PORT": "x"}, ["WORLD_SIZE", "MASTER_PORT"]),
        (TORCHRUN | {"LOCAL_RANK": "2"}, ["LOCAL_RANK", "LOCAL_WORLD_SIZE"]),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}, ["LOCAL_WORLD_SIZE", "WORLD_SIZE"]),
        (TORCHRUN | {"MASTER_ADDR": " "}, ["MASTER_ADDR"]),
        (TORCHRUN | {"MASTER_PORT": "0"}, ["MASTER_PORT"]),
        (TORCHRUN | {"MASTER_PORT": "65536"}, ["MASTER_PORT", "65535"]),
        ({k: v for k, v in SRUN.items() if k != "SLURM_NTASKS"}, ["SLURM_NTASKS", "--ntasks"]),
        (SRUN | {"SLURM_NNODES": "0", "SLURM_NODEID": "first"}, ["SLURM_NNODES", "SLURM_NODEID"]),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "2x"}, ["SLURM_STEP_NUM_TASKS"]),
        (SRUN | {"SLURM_PROCID": "2"}, ["SLURM_PROCID", "SLURM_NTASKS"]),
        (SRUN | {"SLURM_NTASKS": "many"}, ["SLURM_NTASKS"]),
        (SRUN | {"WORLD_SIZE": "3"}, ["WORLD_SIZE", "SLURM_NTASKS"]),
    ],
    ids=str,
)
def test_a_launchers_variables_are_judged_as_a_whole(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], named: list[str]
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert is_worker()
    with pytest.raises(LaunchError) as refused:
        read_place()
    assert all(name in str(refused.value) for name in named)


@pytest.mark.parametrize(
    ("given", "nodes", "named"),
    [
        (BATCH, 1, ["SLURM_NTASKS", "MASTER_ADDR", "srun"]),  # started once instead of as two tasks
        ({k: v for k, v in SRUN.items() if k != "MASTER_ADDR"}, 1, ["SLURM_NTASKS", "MASTER_ADDR"]),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "n0"}, 1, ["WORLD_SIZE", "RANK"]),
    ],
    ids=str,
)
def test_variables_that_make_no_worker_and_claim_several_are_refused(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], nodes: int, named: list[str]
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert not is_worker()
    with pytest.raises(LaunchError) as refused:
        unused_claims(nodes)
    assert all(name in str(refused.value) for name in named)


def test_a_shell_that_salloc_started_is_a_step_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell keeps the job's SLURM_NTASKS."""
    given = BATCH | {"SLURM_NTASKS": "4", "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR")
    assert unused_claims(1) == []
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("MASTER_ADDR", "n0")
    assert read_place().world_size == 1


def test_a_batch_script_of_one_task_is_told_what_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unused_claims(1) == []
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert unused_claims(1) == []  # a leftover SLURM_PROCID alone is fine
    monkeypatch.setenv("MASTER_ADDR", "n0")
    assert not is_worker()
    [note] = unused_claims(1)
    assert "MASTER_ADDR" in note
    monkeypatch.delenv("MASTER_ADDR")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert unused_claims(2) == []  # srun starts a launcher on each node


@pytest.mark.parametrize(
    ("given", "said"),
    [(SRUN, ["srun", "rank 1 of 2", "SLURM_PROCID"]), (TORCHRUN, ["rank 1 of 4", "RANK", "n0:29500"])],
)
def test_a_worker_says_which_variables_were_used(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], said: list[str]
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    read_place()
    assert all(words in describe_place() for words in said)


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("launch", {"processes": 2}, "launch.processes is 2, but the launcher started 4 on this node"),
        ("parallel", {"dp_replicate": 2}, "parallel.dp_replicate 2 needs 2 processes, but launch.processes is 8"),
        ("train", {"global_batch": 40, "micro_batch": 8}, "5 micro-batches, fewer than the 8 data-parallel ranks"),
    ],
)
def test_a_worker_is_refused_what_its_launcher_contradicts(section: str, values: dict[str, int], words: str) -> None:
    with pytest.raises(LaunchError, match=words):
        fit_to_place(Config().replace(section, **values), Place(1, 8, 1, 4))


def test_a_worker_gets_its_share_of_the_cores() -> None:
    config = fit_to_place(Config().replace("launch", processes=4), Place(1, 8, 1, 4))
    assert config.launch.threads == max(1, count_cores() // 4)


def test_an_error_is_left_for_our_launcher_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    assert not report_to_launcher("words")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    assert not report_to_launcher("words")  # torchrun sets it too, but does not print the message
    monkeypatch.setenv(LOCKED_BY, str(os.getppid()))
    assert report_to_launcher("words")
    assert json.loads(file.read_text())["message"] == "words"
