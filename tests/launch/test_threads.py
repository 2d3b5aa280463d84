"""CPU threads: how many a process has, what a run keeps, and how those without work wait."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from shoal.config import Config
from shoal.launch import torchrun
from shoal.launch.place import Place
from shoal.launch.torchrun import choose_threads, fit_to_place, plan_processes, worker_environment


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight cores, all free; what is set in the environment is gone after the test."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    for name in worker_environment(1):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(torchrun, "count_cores", lambda: 8)
    monkeypatch.setattr(torchrun, "free_cores", lambda: 8.0)


def config(processes: int | None = None, threads: int | None = None, repro: str = "fast") -> Config:
    found = Config().replace("launch", processes=processes, threads=threads)
    return found.replace("train", steps=1, device="cpu", repro=repro)


@pytest.mark.parametrize(
    ("processes", "free", "threads"),
    [
        (1, 8.0, 8),
        (1, 7.6, 8),
        (1, 2.3, 2),
        (1, 0.0, 1),
        (2, 8.0, 4),
        (2, 5.0, 3),
        (2, 0.0, 1),
        (8, 0.0, 1),
        (16, 8.0, 1),
    ],
)
def test_threads_are_the_cores_that_others_leave_free(
    processes: int, free: float, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchrun, "free_cores", lambda: free)
    said: list[str] = []
    assert choose_threads(processes, say=said.append) == threads
    is_fewer = threads < 8 // processes
    assert len(said) == is_fewer
    assert (os.environ.get("OMP_WAIT_POLICY") == "PASSIVE") == is_fewer


@pytest.mark.parametrize(
    ("asked", "before", "threads"),
    [
        (config(2), None, 4),
        (config(2), config(2, 3), 3),  # whatever the machine does now
        (config(2, 4), config(2, 3), 4),  # typed
        (config(2), config(2, 6), 4),  # the machine has fewer cores than it had
        (config(4), config(2, 1), 2),  # other processes: other bits in any case
        (config(2, repro="bitwise"), config(2, 3), 1),
    ],
)
def test_a_run_keeps_its_threads(asked: Config, before: Config | None, threads: int) -> None:
    assert plan_processes(asked, 0, before=before).launch.threads == threads


def test_a_worker_of_another_launcher_keeps_the_runs_threads() -> None:
    assert fit_to_place(config(), Place(0, 2, 0, 2), before=config(None, 3)).launch.threads == 3
    assert fit_to_place(config(), Place(0, 2, 0, 2)).launch.threads == 4


def test_one_core_is_one_process_of_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchrun, "count_cores", lambda: 1)
    planned = plan_processes(config(), 0).launch
    assert (planned.processes, planned.threads) == (1, 1)


def test_a_policy_of_ones_own_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"GOMP_SPINCOUNT", "KMP_BLOCKTIME"} <= set(worker_environment(2))
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert not {"GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY"} & set(worker_environment(2))


@pytest.mark.skipif(sys.platform != "linux", reason="torch comes with LLVM's OpenMP there")
@pytest.mark.parametrize("arguments", [["--threads", "3"], pytest.param([], marks=pytest.mark.ci)])
def test_generate_sets_what_openmp_reads(arguments: list[str]) -> None:
    """Before torch is imported: OpenMP says itself what it has read. The command then ends, since there is no such run."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")}
    if not arguments:
        environment |= {"OMP_NUM_THREADS": "5", "OMP_WAIT_POLICY": "PASSIVE"}  # what a person set
    done = subprocess.run(
        [sys.executable, "-m", "shoal", "generate", "no-such-run", "--prompt", "a", *arguments],
        env=environment | {"OMP_DISPLAY_ENV": "VERBOSE"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    threads, spins = ("3", "10000") if arguments else ("5", "0")
    assert f"OMP_NUM_THREADS = '{threads}'" in done.stderr
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr
