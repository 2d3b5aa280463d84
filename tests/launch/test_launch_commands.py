"""`shoal launch slurm --submit`, `status`, `stop` and `requeue`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from shoal.errors import LaunchError
from shoal.launch.job_table import explain
from shoal.launch.jobs import RunJobs
from shoal.launch.scheduler import SlurmError
from tests.launch.fake_slurm import FakeSlurm, event, save

RUNNING = "100|100_N/A|RUNNING|None|1:02|1:00:00|n[1-2]\n"
PENDING = "100|100_N/A|PENDING|Resources|0:00|1:00:00|\n"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path, monkeypatch)


@pytest.fixture
def jobs(slurm: FakeSlurm) -> RunJobs:
    """Return a run whose job 100 was submitted."""
    assert slurm.run("slurm", "recipe.yaml", "--submit") == 0
    return RunJobs(slurm.folder / "runs" / "recipe")


def test_submitting(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], jobs: RunJobs) -> None:
    said = capsys.readouterr().out
    assert said.splitlines()[0] == "submitted job 100"
    assert slurm.calls("sbatch") == [f"sbatch --parsable {jobs.script}"]
    slurm.answer("queue", PENDING)
    with pytest.raises(LaunchError, match=r"job 100 of .* is pending; stop it with shoal launch stop"):
        slurm.run("slurm", "recipe.yaml", "--submit")
    assert slurm.run("slurm", "recipe.yaml", "--submit", "--dependency", "afterany:100") == 0
    assert slurm.run("slurm", "recipe.yaml", "--submit", "--name", "other") == 0


def test_a_chain_is_submitted_ahead(slurm: FakeSlurm) -> None:
    assert slurm.run("slurm", "recipe.yaml", "--submit", "--chain", "3") == 0
    script = slurm.folder / "runs/recipe/jobs/job.sbatch"
    after = "--kill-on-invalid-dep=yes"
    assert slurm.calls("sbatch") == [
        f"sbatch --parsable {script}",
        f"sbatch --parsable --dependency=afternotok:100 {after} {script}",
        f"sbatch --parsable --dependency=afternotok:101 {after} {script}",
    ]
    assert "#SBATCH --no-requeue" in script.read_text()


def test_an_array_is_several_runs(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert slurm.run("slurm", "recipe.yaml", "--submit", "--array", "1,3", "--seed", "{task}") == 0
    runs = [RunJobs(slurm.folder / "runs" / f"recipe-{n}") for n in (1, 3)]
    assert [[r.get("array") for r in run.records()] for run in runs] == [[None, "100_1"], [None, "100_3"]]
    assert len(slurm.calls("sbatch")) == 1
    slurm.answer("queue", "100|100_1|PENDING|Priority|0:00|1:00|\n107|100_3|RUNNING|None|0:10|1:00|n1\n")
    capsys.readouterr()
    slurm.run("status", "recipe-1")
    assert re.search(r"100_1 +PENDING +waits behind jobs of higher priority", capsys.readouterr().out)
    slurm.run("stop", "recipe-3")
    assert slurm.calls("scancel") == ["scancel --batch --signal=USR2 107"]
    slurm.answer("queue", "")
    slurm.run("requeue", "recipe-3")
    assert slurm.calls("sbatch")[-1] == f"sbatch --parsable --array=3 {runs[1].script}"


def test_the_state_of_each_job(slurm: FakeSlurm, jobs: RunJobs, capsys: pytest.CaptureFixture[str]) -> None:
    for restart, step in enumerate((0, 50, 90)):
        jobs.add("began", job="100", restart=restart, step=step, nodes="n[1-2]")
    jobs.add(
        "ended", job="100", restart=0, code=85, signal="USR2", step=50, verdict="again", why="the job was signaled"
    )
    save(jobs.run, 120)
    slurm.answer("queue", RUNNING)
    capsys.readouterr()
    assert slurm.run("status", "recipe") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "the run would resume from step 120"
    assert [re.split(r"  +", line.strip()) for line in lines[2:]] == [
        ["100", "0", "again", "n[1-2]", "0 to 50", "the job was signaled"],
        [
            "100",
            "1",
            "lost",
            "n[1-2]",
            "from 50",
            "the job ended without recording it: a failed node, or ended by Slurm",
        ],
        ["100", "2", "RUNNING", "n[1-2]", "from 90", "since 1:02, limit 1:00:00"],
    ]
    slurm.run("status", "recipe", "--json")
    found = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in found["jobs"]] == ["again", "lost", "RUNNING"]
    assert found["step"] == 120


def test_the_state_without_slurm(slurm: FakeSlurm, jobs: RunJobs, capsys: pytest.CaptureFixture[str]) -> None:
    jobs.add("began", job="100", restart=0, step=0, nodes="n1")
    slurm.fails("squeue", "Unable to contact slurm controller (connect failure)")
    capsys.readouterr()
    slurm.run("status", "recipe")
    said = capsys.readouterr().out
    assert "what Slurm does with its jobs is unknown: squeue: Unable to contact slurm controller" in said
    assert re.search(r"100 +0 +unknown", said)


def test_stopping(slurm: FakeSlurm, jobs: RunJobs) -> None:
    slurm.answer(
        "queue", RUNNING + "101|101_N/A|PENDING|Dependency|0:00|1:00:00|\n999|999_N/A|RUNNING|None|0:01|1:00|n3\n"
    )
    jobs.add("submitted", job="101", after="100", by="chain")
    assert slurm.run("stop", "recipe") == 0
    assert slurm.calls("scancel") == ["scancel --batch --signal=USR2 100", "scancel 101"]
    assert jobs.stop_reason() == "it was stopped with shoal launch stop"


def test_requeuing(slurm: FakeSlurm, jobs: RunJobs, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.answer("queue", RUNNING)
    assert slurm.run("requeue", "recipe") == 0
    assert slurm.calls("scancel") == ["scancel --batch --signal=USR2 100"]
    slurm.answer("queue", PENDING)
    capsys.readouterr()
    assert slurm.run("requeue", "recipe") == 0
    assert capsys.readouterr().out == "job 100 already waits in the queue (pending, Resources)\n"
    slurm.answer("queue", "")
    jobs.write_stop("it was stopped")
    save(jobs.run, 7)
    assert slurm.run("requeue", "recipe") == 0
    assert capsys.readouterr().out == "submitted job 101, which continues the run from step 7\n"
    assert jobs.stop_reason() == ""
    event(jobs.run, "started")
    event(jobs.run, "finished")
    with pytest.raises(LaunchError, match="has taken all its steps"):
        slurm.run("requeue", "recipe")


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ("invalid partition specified: bih", "set --partition, or partition in cluster.yaml"),
        ("Batch job submission failed: Invalid account or account/partition combination specified", "set --account"),
        (
            "Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)",
            "set a shorter --time",
        ),
        ("Batch job submission failed: Requested node configuration is not available", "ask for fewer GPUs"),
        ("Batch job submission failed: Node count specification invalid", "set a smaller --nodes"),
        ("Batch job submission failed: Invalid feature specification", "set --constraint"),
        (
            "Batch job submission failed: Invalid generic resource (gres) specification",
            "the cluster has no GPUs of that name; see gpu_type",
        ),
        ("Batch job submission failed: Job dependency problem", "set --dependency"),
    ],
)
def test_what_sbatch_rejects(slurm: FakeSlurm, message: str, advice: str) -> None:
    slurm.fails("sbatch", message)
    with pytest.raises(SlurmError) as caught:
        slurm.run("slurm", "recipe.yaml", "--submit")
    assert str(caught.value).startswith(f"sbatch: {message}; {advice}")


def test_a_machine_without_slurm(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LaunchError, match="sbatch is not on PATH; run this on a node of a Slurm cluster"):
        slurm.run("slurm", "recipe.yaml", "--submit")


def test_a_run_without_jobs(slurm: FakeSlurm, jobs: RunJobs) -> None:
    with pytest.raises(LaunchError, match="nope has no jobs in runs; there are recipe"):
        slurm.run("status", "nope")


@pytest.mark.parametrize(
    ("reason", "meaning"),
    [
        ("Priority", "waits behind jobs of higher priority"),
        ("ReqNodeNotAvail, UnavailableNodes:n1", "waits for nodes that are down, drained or reserved"),
        ("AssocGrpGRES", "waits: a limit of your account or QOS is reached (AssocGrpGRES)"),
        ("SomethingNew", "SomethingNew"),
    ],
)
def test_why_a_job_waits(reason: str, meaning: str) -> None:
    assert explain(reason) == meaning
