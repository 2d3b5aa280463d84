"""Workers that somebody else starts, and what they leave for the launcher."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from shoal.config import Config
from shoal.errors import LaunchError
from shoal.launch.place import LOCKED_BY, Place, is_worker, read_place, report_to_launcher
from shoal.launch.torchrun import count_cores, fit_to_place

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID",
             "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NNODES", "SLURM_NTASKS_PER_NODE",
             "SLURM_TASKS_PER_NODE", "SLURM_STEP_TASKS_PER_NODE", "TORCHELASTIC_ERROR_FILE", LOCKED_BY)  # fmt: skip


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's worker; what a test sets, directly or not, is gone after it."""
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
    monkeypatch.setenv("SLURM_PROCID", "5")  # inside an allocation, but nobody said where to meet
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
        ({"TASKS_PER_NODE": "8(x2)", "NTASKS": "4", "NNODES": "2", "NODEID": "1"}, 2),  # the job's list, not the step's
        ({"TASKS_PER_NODE": "3,1", "NTASKS_PER_NODE": "3", "NTASKS": "4", "NODEID": "1"}, 1),  # a limit, not a count
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


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("launch", {"processes": 2}, "launch.processes is 2, but 4 were started on this machine"),
        ("parallel", {"dp_replicate": 2}, "parallel.dp_replicate 2 needs 2 processes, launch.processes is 8"),
        ("train", {"global_batch": 40, "micro_batch": 8}, "5 micro-batches, fewer than the 8 data-parallel processes"),
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
    assert not report_to_launcher("words")  # torchrun sets it too, and nobody would print it
    monkeypatch.setenv(LOCKED_BY, str(os.getppid()))
    assert report_to_launcher("words")
    assert json.loads(file.read_text())["message"] == "words"
