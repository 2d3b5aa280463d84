"""First causes of jobs that fail on a real Slurm, and of processes that fail for lack of memory or network."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.elastic.kernel_log import keep_kernel_lines
from shoal.report.causes.cause import first_cause
from shoal.report.causes.failure import FirstCause
from shoal.run.folder import RunFolder
from tests.cluster.bed import OVER, Bed, lacking
from tests.cluster.training import SHOAL, Training
from tests.report.causes.ranks import FOLLOWER, run_ranks

SPACE = "import ctypes, subprocess; assert ctypes.CDLL(None).unshare({}) == 0\n"  # in a Linux namespace of its own
NETWORK, MOUNTS = 0x40000000, 0x00020000
NO_ROUTE = SPACE.format(NETWORK) + "import socket; socket.create_connection(('10.77.0.1', 29400))"
NO_SPACE = SPACE.format(MOUNTS) + (
    "subprocess.run('mount --make-rprivate / && mount -t tmpfs -o size=100k tmpfs /dev/shm', shell=True, check=True)\n"
    "import torch; torch.ones(1 << 20).share_memory_()"
)
# Uses more memory than its control group allows, in either version of control groups.
TOO_MUCH = """
import os, pathlib
group = pathlib.Path("{group}")
group.mkdir()
limit = next(file for name in ("memory.max", "memory.limit_in_bytes") if (file := group / name).exists())
limit.write_text(str(64 << 20))
(group / "cgroup.procs").write_text(str(os.getpid()))
while True: bytes_ = bytearray(256 << 20); bytes_[::4096] = b"1" * len(bytes_[::4096])
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    if why := lacking():
        pytest.skip(why)
    return RunFolder(tmp_path / "run")


def kind(cause: FirstCause | None) -> tuple[int | None, str]:
    assert cause is not None
    return cause.first.rank, cause.first.finding.signature.name


def test_no_route_to_another_node(folder: RunFolder) -> None:
    run_ranks(folder, [FOLLOWER, NO_ROUTE])
    assert kind(first_cause(folder)) == (1, "no route")


def test_shared_memory_is_full(folder: RunFolder) -> None:
    run_ranks(folder, [FOLLOWER, NO_SPACE])
    assert kind(first_cause(folder)) == (1, "shared memory")


def test_the_kernel_killed_a_process_for_its_memory(folder: RunFolder) -> None:
    if not os.access("/dev/kmsg", os.R_OK):
        pytest.skip("the kernel's log cannot be read here")
    memory = Path("/sys/fs/cgroup/memory")
    group = (memory if memory.is_dir() else memory.parent) / f"causes-{os.getpid()}"
    began = time.time()
    try:
        run_ranks(folder, [FOLLOWER, TOO_MUCH.format(group=group)])
    finally:
        if group.is_dir():
            group.rmdir()
    [logs] = folder.logs.iterdir()
    assert kind(first_cause(folder)) == (1, "killed")
    keep_kernel_lines(logs, began)
    assert kind(first_cause(folder)) == (1, "kernel out of memory")


def failed_job(
    bed: Bed, folder: Path, step: str, *options: str, then: Callable[[str], object] | None = None
) -> FirstCause:
    """Run a job of two nodes until it has ended; return why. then: called with the job's number when its step runs."""
    jobs = folder / "jobs"
    jobs.mkdir(parents=True)
    job = bed.submit(f"#!/bin/bash\nsrun {step}\n", "--nodes=2", "--no-requeue", f"--output={jobs}/%j.log", *options)
    if then is not None:
        bed.until(lambda: bool(list(folder.glob("began-*"))) or bed.state(job) in OVER)
        then(job)
    bed.until(lambda: bed.state(job) in OVER, 300)
    cause = first_cause(RunFolder(folder))
    assert cause is not None, (jobs / f"{job}.log").read_text()
    return cause


def waits(folder: Path) -> str:
    """Return a step that runs until it is ended."""
    return f"bash -c 'touch {folder}/began-$SLURM_PROCID; exec sleep 1000'"


def test_a_job_was_cancelled(bed: Bed, tmp_path: Path) -> None:
    folder = bed.shared / tmp_path.name
    cause = failed_job(bed, folder, waits(folder), then=lambda job: str(bed.run("scancel", job)))
    assert cause.first.finding.signature.name == "cancelled"


@pytest.mark.slow
def test_a_node_lost_its_power(bed: Bed, tmp_path: Path) -> None:
    folder = bed.shared / tmp_path.name
    cause = failed_job(bed, folder, waits(folder), then=lambda job: bed.power_off("n2"))
    assert cause.first.finding.signature.name == "node failure"


@pytest.mark.slow
def test_a_job_reached_its_time_limit(bed: Bed, tmp_path: Path) -> None:
    folder = bed.shared / tmp_path.name
    cause = failed_job(bed, folder, waits(folder), "--time=1")
    assert cause.first.finding.signature.name == "time limit"


def test_a_task_was_killed_or_did_not_start(bed: Bed, tmp_path: Path) -> None:
    folder = bed.shared / tmp_path.name
    killed = failed_job(bed, folder / "killed", "bash -c 'kill -KILL $$'")
    absent = failed_job(bed, folder / "absent", "a_program_that_does_not_exist")
    assert killed.first.finding.signature.name == "killed"
    assert absent.first.finding.signature.name == "program not found"


def test_a_worker_on_the_second_node_failed(bed: Bed, tmp_path: Path) -> None:
    training = Training(bed, bed.shared / tmp_path.name)
    jobs = training.run.path / "jobs"
    jobs.mkdir(parents=True)
    fault = '[{"step": 7, "phase": "forward", "rank": 1, "fault": "exception", "life": 0}]'
    options = "--launch.nodes=2 --launch.rendezvous=$first:29400 --launch.max_crashes=1 --launch.hang_seconds=300"
    job = training.submit(
        f"#!/bin/bash\nfirst=$(scontrol show hostnames \"$SLURM_JOB_NODELIST\" | head -n 1)\nexport SHOAL_FAULTS='{fault}'\n"
        f"srun --ntasks-per-node=1 --kill-on-bad-exit=0 {SHOAL} train recipe.yaml --name run {options}\n",
        "--nodes=2", f"--output={jobs}/%j.log",
    )  # fmt: skip
    log = jobs / f"{job}.log"
    try:
        bed.until(lambda: bed.state(job) in OVER)
    except AssertionError as error:
        raise AssertionError(f"{error}\n--- the job's output\n{log.read_text()}") from None
    cause = first_cause(training.run, log)
    assert kind(cause) == (1, "python exception")
    assert cause is not None
    assert cause.attempt.startswith(f"{job}-0-")
    assert cause.first.host == bed.run("scontrol", "show", "hostnames", bed.job(job)["NodeList"]).split()[1]
    assert cause.first.where == "in forward of step 7"
