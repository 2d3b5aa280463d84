"""The bed is a real Slurm of four nodes, and each of its faults happens: Slurm's own commands, or the nodes, see it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cluster.bed import GPUS, NODES, OVER, Bed

HELLO = """#!/bin/bash
srun --ntasks-per-node=1 sh -c 'echo "$(hostname) $(getent hosts $(hostname) | cut -d" " -f1)"'
"""
# waits for a file; prints which start of the job this is
WAITS = """#!/bin/bash
#SBATCH --open-mode=append
echo "start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST"
until [ -e go ]; do sleep 0.1; done
"""


@pytest.fixture
def place(bed: Bed, tmp_path: Path) -> Path:
    """Return a new folder on the shared disk."""
    folder = bed.shared / tmp_path.name
    folder.mkdir()
    return folder


def printed(place: Path, job: str) -> str:
    path = place / f"slurm-{job}.out"
    return path.read_text() if path.exists() else ""


def test_a_job_of_two_nodes_prints_their_names_and_addresses(bed: Bed, place: Path) -> None:
    job = bed.submit(HELLO, "--nodes=2", f"--gres=gpu:{len(GPUS)}", cwd=place)
    bed.until(lambda: bed.state(job) in OVER)
    assert bed.state(job) == "COMPLETED"
    assert sorted(printed(place, job).splitlines()) == [f"{n} {bed.hosts[n].address}" for n in ("n1", "n2")]
    bed.tell_names("n1", wrong=True)
    job = bed.submit(HELLO, "--nodes=2", cwd=place)
    bed.until(lambda: bed.state(job) in OVER)
    assert sorted(printed(place, job).splitlines()) == ["n1 127.0.1.1", f"n2 {bed.hosts['n2'].address}"]


def test_more_gpus_than_there_are_is_no_job(bed: Bed) -> None:
    code, output = bed.attempt("sbatch", f"--gres=gpu:{len(GPUS) + 1}", "--wrap=true")
    assert code == 1
    assert "Requested node configuration is not available" in output


@pytest.mark.slow
def test_a_job_is_requeued_and_started_again_by_a_controller_that_died_meanwhile(bed: Bed, place: Path) -> None:
    job = bed.submit(WAITS, "--nodes=2", cwd=place)
    bed.until(lambda: "start 0" in printed(place, job))
    bed.run("scontrol", "requeue", job)
    bed.stop_controller()
    assert "Unable to contact" in bed.attempt("squeue")[1]
    bed.start_controller()
    bed.until(lambda: "start 1" in printed(place, job))
    bed.restart_controller()
    assert bed.job(job)["Restarts"] == "1"
    (place / "go").touch()
    bed.until(lambda: bed.state(job) == "COMPLETED")


@pytest.mark.slow
def test_a_node_that_loses_power_takes_its_processes_and_its_job_starts_again_elsewhere(bed: Bed, place: Path) -> None:
    job = bed.submit(WAITS, "--nodes=2", "--nodelist=n1,n2", cwd=place)
    bed.until(lambda: "start 0 on n[1-2]" in printed(place, job))
    bed.power_off("n2")
    # the controller finds a silent node down after NODE_SECONDS; the job names its nodes, so another must do
    bed.until(lambda: bed.node_states()["n2"].startswith("down"))
    bed.run("scontrol", "update", f"JobId={job}", "ReqNodeList=")
    bed.until(lambda: "start 1" in printed(place, job))
    assert "n2" not in bed.run("scontrol", "show", "hostnames", bed.job(job)["NodeList"]).split()
    bed.power_on("n2")
    bed.until(lambda: bed.node_states()["n2"] == "idle")


def test_a_slurmd_dies_and_the_step_runs_on(bed: Bed, place: Path) -> None:
    job = bed.submit(WAITS, cwd=place)
    bed.until(lambda: "start 0 on n1" in printed(place, job))
    bed.kill_slurmd("n1")
    bed.start_slurmd("n1")
    (place / "go").touch()
    bed.until(lambda: bed.state(job) == "COMPLETED")
    assert "start 1" not in printed(place, job)


def test_a_drained_node_gets_no_job(bed: Bed) -> None:
    bed.drain("n1")
    assert bed.node_states()["n1"] == "drain"
    code, output = bed.attempt("srun", "--nodes=1", "hostname")
    assert (code, output.strip()) == (0, "n2")
    bed.resume("n1")
    bed.until(lambda: bed.node_states()["n1"] == "idle")


def test_a_cable_or_a_route_is_cut(bed: Bed) -> None:
    def reaches(node: str, other: str) -> bool:
        """Return whether slurmd on `other` can be reached from `node`."""
        address = bed.hosts[other].address
        return bed.hosts[node].attempt("timeout", "1", "bash", "-c", f": < /dev/tcp/{address}/6818")[0] == 0

    assert reaches("n1", "n2")
    bed.hosts["n1"].part_from(bed.hosts["n2"])
    assert (reaches("n1", "n2"), reaches("n2", "n1"), reaches("n1", "n3")) == (False, False, True)
    bed.hosts["n1"].rejoin()
    assert reaches("n1", "n2")
    bed.hosts["n1"].link("down")
    assert not reaches("n3", "n1")
    bed.hosts["n1"].link("up")
    assert reaches("n3", "n1")


def test_the_shared_disk_is_full_on_all_nodes(bed: Bed, place: Path) -> None:
    bed.fill_disk()
    code, output = bed.hosts["n3"].attempt("dd", "if=/dev/zero", f"of={place}/file", "bs=1M", "count=1")
    assert code == 1
    assert "No space left on device" in output
    bed.empty_disk()
    bed.hosts["n3"].run("dd", "if=/dev/zero", f"of={place}/file", "bs=1M", "count=1")


def test_memory_and_local_disks_belong_to_one_node(bed: Bed) -> None:
    for folder in ("/dev/shm", "/mnt"):
        bed.hosts["n1"].run("touch", f"{folder}/shoal-bed-file")
        assert bed.hosts["n2"].attempt("ls", f"{folder}/shoal-bed-file")[0] == 2
        assert not Path(folder, "shoal-bed-file").exists()


def test_nothing_is_left_of_a_host_that_is_off(bed: Bed) -> None:
    process = bed.hosts["n4"].start("sh", "-c", "trap '' TERM; setsid sleep 1000 & echo here; sleep 1000")
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    bed.power_off("n4")
    assert process.stdout.read() == ""  # the pipe is closed: no process holds it
    assert process.wait(10) != 0
    assert subprocess.run(["pgrep", "-f", "^sleep 1000"], check=False, capture_output=True).stdout == b""
    assert set(NODES) == set(bed.node_states())
