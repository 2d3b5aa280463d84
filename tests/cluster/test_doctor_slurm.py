"""The doctor inside a job of a real Slurm: it reaches the job's nodes by srun, and compares them with what the job asked for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from shoal.doctor.slurm import expand
from tests.cluster.bed import GPUS, OVER, Bed


def test_a_job_is_examined(bed: Bed, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    command = f"{sys.executable} -m shoal doctor --quick --json --nodes 3 --shared {tmp_path}"
    script = f"#!/bin/bash\n{command} >{out}\necho $? >{tmp_path}/code\n"
    job = bed.submit(script, "--nodes=2", f"--gres=gpu:{len(GPUS)}", "--no-requeue")
    bed.until(lambda: bed.state(job) in OVER, seconds=60.0)
    assert (tmp_path / "code").read_text() == "1\n", (bed.shared / f"slurm-{job}.out").read_text()
    report = json.loads(out.read_text())
    nodes = bed.run("scontrol", "show", "hostnames", bed.job(job)["NodeList"]).split()
    assert report["nodes"] == nodes
    # the bed's GPUs are only counted, so that none answers nvidia-smi
    found = {(f["fault"], tuple(f["nodes"])) for f in report["findings"] if not f["warning"]}
    assert found == {("allocation", ()), *(("gpu-count", (n,)) for n in nodes)}
    assert [f["fault"] for f in report["findings"] if f["warning"]] == ["no-requeue"]
    assert report["unchecked"] == []


@pytest.mark.parametrize("listed", ["n1", "n[1-3]", "n[08-11],login", "gpu-a[1,3-4],b", "a.b-c[001-002,010]"])
def test_lists_of_nodes_are_read_as_slurm_does(bed: Bed, listed: str) -> None:
    assert list(expand(listed)) == bed.run("scontrol", "show", "hostnames", listed).split()
