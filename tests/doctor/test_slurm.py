"""The Slurm job that the doctor runs in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shoal.doctor.judge_node import Wanted
from shoal.doctor.slurm import Job, expand, judge_job, this_job, wanted_of


def test_lists_without_slurm() -> None:
    assert expand("n[08-11],login") == ("n08", "n09", "n10", "n11", "login")
    assert expand("a[1-2]b") == ("a1b", "a2b")
    assert expand("a[1-2") == ()
    assert expand("a b") == ()


def test_the_job_is_read_from_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        "#!/bin/sh\n"
        'case "$2" in hostnames) echo n1; echo n2;;\n'
        " job) echo 'JobId=17 JobName=x UserId=a(1) Requeue=0 Restarts=2 NumNodes=2 Command=/a b';; esac\n"
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = this_job({
        "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_END_TIME": "1000", "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "16",
    })  # fmt: skip
    assert found == Job("17", ("n1", "n2"), ends=1000.0, requeue=False, gpus=8, cores=16)
    assert this_job({}) is None
    assert wanted_of(found, None) == Wanted(gpus=8, cores=16)
    assert wanted_of(found, 4) == Wanted(gpus=4, cores=16)
    assert wanted_of(None, 4) == Wanted(gpus=4)


def faults(job: Job, nodes: int | None = None, save_seconds: float | None = None) -> list[tuple[str, bool]]:
    return [(f.fault, f.is_warning) for f in judge_job(job, nodes=nodes, save_seconds=save_seconds, now=1000.0)]


def test_a_job_is_compared_with_what_was_asked() -> None:
    job = Job("17", ("n1", "n2"), ends=1300.0, requeue=True)
    assert faults(job, nodes=2, save_seconds=60.0) == []
    assert faults(job, nodes=4) == [("allocation", False)]
    assert faults(job, save_seconds=200.0) == [("time-limit", False)]
    assert faults(Job("17", ("n1",), ends=1005.0)) == [("time-limit", False)]
    assert faults(Job("17", ("n1",), requeue=False)) == [("no-requeue", True)]
