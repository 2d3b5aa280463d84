"""CPU threads: how many a process gets, how many a resumed run keeps, and how idle threads wait."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from shoal.config.options import Config
from shoal.launch import torchrun
from shoal.launch.torchrun import choose_threads, fit_to_place, plan_processes, worker_environment
from shoal.mesh.place import Place


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend to have eight free cores, and restore the environment after the test."""
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
    ("fixed", "processes", "free", "threads", "passive"),
    [
        (None, 1, 8.0, 8, False),
        (None, 1, 7.6, 8, False),
        (None, 1, 2.3, 2, True),
        (None, 1, 0.0, 1, True),
        (None, 2, 8.0, 4, False),
        (None, 2, 5.0, 3, True),
        (None, 2, 0.0, 1, True),
        (None, 8, 0.0, 1, False),  # a single thread waits for no other
        (None, 16, 8.0, 1, False),
        (1, 1, 0.0, 1, False),
        (4, 2, 8.0, 4, False),
        (4, 2, 3.0, 4, True),  # `fixed` was set by the user, or by the run's first start
        (8, 2, 8.0, 8, True),  # more threads than cores
    ],
)
def test_threads_are_the_cores_that_others_leave_free(
    fixed: int | None, processes: int, free: float, threads: int, passive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchrun, "free_cores", lambda: free)
    said: list[str] = []
    assert choose_threads(fixed, processes, say=said.append) == threads
    assert len(said) == passive
    assert all(("other programs" in line) == (free < 8) for line in said)
    assert (os.environ.get("OMP_WAIT_POLICY") == "PASSIVE") == passive


@pytest.mark.parametrize(
    ("asked", "before", "threads"),
    [
        (config(2), None, 4),
        (config(2), config(2, 3), 3),  # the run's threads, whatever the load is now
        (config(2, 4), config(2, 3), 4),  # set by the user
        (config(2), config(2, 6), 4),  # the machine has fewer cores than before
        (config(4), config(2, 1), 2),  # another process count changes the bits anyway
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
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setattr(torchrun, "free_cores", lambda: 0.0)
    choose_threads(None, say=lambda text: None)
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


GENERATE = ["generate", "a-run", "--prompt", "a"]
BUSY = """
import sys
from shoal.commands.models import set_threads
from shoal.commands.parser import build_parser
from shoal.launch import torchrun
torchrun.count_cores, torchrun.free_cores = lambda: 8, lambda: 3.0
set_threads(build_parser(sys.argv[1]).parse_args(sys.argv[1:]))
import torch
"""


@pytest.mark.skipif(sys.platform != "linux", reason="torch comes with LLVM's OpenMP there")
@pytest.mark.parametrize(
    ("arguments", "own", "threads", "spins"),
    [
        ([*GENERATE, "--threads", "5"], {}, "5", "0"),
        pytest.param(["eval", "a-run", "--threads", "5"], {}, "5", "0", marks=pytest.mark.ci),
        pytest.param(GENERATE, {}, "3", "0", marks=pytest.mark.ci),
        pytest.param(GENERATE, {"OMP_NUM_THREADS": "6"}, "6", "300000", marks=pytest.mark.ci),
    ],
)
def test_generate_and_eval_set_what_openmp_reads(
    arguments: list[str], own: dict[str, str], threads: str, spins: str
) -> None:
    """The variables are set before torch is imported; OpenMP prints the values that it read."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", BUSY, *arguments],
        env=environment | own | {"OMP_DISPLAY_ENV": "VERBOSE"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert f"OMP_NUM_THREADS = '{threads}'" in done.stderr
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr
