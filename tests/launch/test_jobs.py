"""Whether a run continues after a job: requeue, chain or stop, and their bounds."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import LaunchError
from shoal.launch.chain import begin, end, end_idle_srun
from shoal.launch.jobs import PATIENCE, Ending, JobId, RunJobs, decide, may_begin
from shoal.run.folder import RunFolder
from tests.launch.fake_slurm import FakeSlurm, event, save

HERE = JobId("100", 0)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path, monkeypatch)


@pytest.fixture
def jobs(slurm: FakeSlurm) -> RunJobs:
    jobs = RunJobs(slurm.folder / "runs" / "a")
    jobs.folder.mkdir(parents=True)
    jobs.script.write_text("#!/bin/bash\n")
    return jobs


def starts(*steps: int) -> list[dict[str, Any]]:
    """Return the records of a submitted run whose jobs began at these steps."""
    began = [{"event": "began", "job": str(n), "restart": 0, "step": step} for n, step in enumerate(steps)]
    return [{"event": "submitted", "job": "0", "by": "user"}, *began]


@pytest.mark.parametrize(
    ("ending", "step", "kind"),
    [
        (Ending(code=0), 40, "finished"),
        (Ending(code=137, finished=True), 40, "finished"),  # a node died after the run's last step
        (Ending(code=85, signal="USR2"), 7, "again"),
        (Ending(code=143, signal="TERM"), 7, "again"),  # preempted, or beyond its limit
        (Ending(code=0, signal="TERM"), 7, "again"),  # srun that was ended
        (Ending(code=137), 5, "again"),  # a launcher was killed before it saved
        (Ending(code=1), 7, "again"),  # workers died too often, but later than in the job before
        (Ending(code=1), 5, "stopped"),
        (Ending(code=2), 7, "stopped"),
        (Ending(code=130), 7, "stopped"),
        (Ending(code=143, signal="TERM", cancelled=True), 7, "stopped"),
        (Ending(code=85, signal="USR2", stop="asked"), 7, "stopped"),
        (Ending(code=0, stop="asked"), 40, "finished"),
    ],
)
def test_a_job_that_began_at_step_5(ending: Ending, step: int, kind: str) -> None:
    assert decide(starts(0, 5), ending, step, most=50).kind == kind


def test_a_run_without_progress_is_not_started_again() -> None:
    ending = Ending(code=85, signal="USR2")
    assert [decide(starts(3, *[5] * n), ending, 5, most=50).kind for n in (1, 2, 3)] == ["again", "again", "stopped"]
    assert decide(starts(3, *[5] * PATIENCE), ending, 6, most=50).kind == "again"
    assert may_begin(starts(*[5] * (PATIENCE - 1)), 5, most=50) == ""
    assert "3 jobs in a row ended at step 5" in may_begin(starts(*[5] * PATIENCE), 5, most=50)


def test_restarts_have_a_bound_that_counts_from_the_users_last_request() -> None:
    ending = Ending(code=85, signal="USR2")
    assert decide(starts(1, 2, 3), ending, 4, most=3).kind == "again"
    assert decide(starts(1, 2, 3, 4), ending, 5, most=3).kind == "stopped"
    assert "started again 3 times, and --max-requeues is 3" in may_begin(starts(1, 2, 3, 4), 5, most=3)
    assert may_begin([*starts(1, 2, 3, 4), *starts(5)], 6, most=3) == ""


def test_a_signaled_job_is_requeued_and_recorded_first(slurm: FakeSlurm, jobs: RunJobs) -> None:
    slurm.command("scontrol", f'[ "$1" = requeue ] && cp {jobs.run}/jobs.jsonl {slurm.folder}/then; exit 0')
    begin(jobs, HERE, 50, nodes="n[1-2]")
    save(jobs.run, 7)
    said: list[str] = []
    assert end(jobs, HERE, code=85, signal="USR2", most=50, requeue=True, say=said.append) == 85
    assert slurm.calls("scontrol requeue") == ["scontrol requeue 100"]
    assert '"verdict":"again"' in (slurm.folder / "then").read_text()  # Slurm ends the caller: the record comes first
    assert said == ["the job was signaled before its limit after step 7; requeuing job 100"]
    assert [(r["event"], r["step"]) for r in jobs.records()] == [("began", 0), ("ended", 7)]


@pytest.mark.parametrize("how", ["forbidden", "no scontrol", "--no-requeue"])
def test_a_chain_continues_where_requeue_is_impossible(
    slurm: FakeSlurm, jobs: RunJobs, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "forbidden":
        slurm.command("scontrol", '[ "$1" = show ] || { echo "Access/permission denied" >&2; exit 1; }')
    elif how == "no scontrol":
        slurm.remove("scontrol")
        monkeypatch.setenv("PATH", str(slurm.bin) + ":/bin")
        monkeypatch.setattr("shutil.which", lambda name: str(p) if (p := slurm.bin / name).is_file() else None)
        monkeypatch.setattr("shoal.launch.scheduler.show", lambda job: {})
    begin(jobs, HERE, 50)
    save(jobs.run, 7)
    said: list[str] = []
    assert end(jobs, HERE, code=85, signal="USR2", most=50, requeue=how != "--no-requeue", say=said.append) == 85
    options = "--parsable --dependency=afternotok:100 --kill-on-invalid-dep=yes"
    assert slurm.calls("sbatch") == [f"sbatch {options} {jobs.script}"]
    assert said[-1] == "the job was signaled before its limit after step 7; job 100 continues the run"
    assert jobs.records()[-1] | {"time": 0} == {
        "time": 0,
        "event": "submitted",
        "job": "100",
        "after": "100",
        "by": "chain",
    }


def test_a_job_submitted_ahead_continues_the_run(slurm: FakeSlurm, jobs: RunJobs) -> None:
    jobs.add("submitted", job="101", after="100", by="chain")
    slurm.answer("queue", "101|101_N/A|PENDING|Dependency|0:00|5:00|\n")
    begin(jobs, HERE, 50)
    save(jobs.run, 7)
    said: list[str] = []
    end(jobs, HERE, code=85, signal="USR2", most=50, requeue=False, say=said.append)
    assert said == ["the job was signaled before its limit after step 7; job 101 continues the run"]
    assert slurm.calls("sbatch") == []


def test_a_run_that_cannot_continue_takes_its_waiting_jobs_with_it(slurm: FakeSlurm, jobs: RunJobs) -> None:
    jobs.add("submitted", job="101", after="100", by="chain")
    jobs.add("submitted", job="102", after="101", by="chain")
    begin(jobs, HERE, 50)
    said: list[str] = []
    assert end(jobs, HERE, code=2, signal="none", most=50, requeue=False, say=said.append) == 2
    assert slurm.calls("scancel") == ["scancel 101", "scancel 102"]
    assert "code 2, a problem to fix" in jobs.stop_reason()
    with pytest.raises(LaunchError, match="does not train: a launcher ended with code 2"):
        begin(jobs, JobId("103", 0), 50)


def test_a_finished_run_needs_no_job(slurm: FakeSlurm, jobs: RunJobs) -> None:
    begin(jobs, HERE, 50)
    event(jobs.run, "started")
    event(jobs.run, "finished")
    assert (
        end(jobs, HERE, code=85, signal="none", most=50, requeue=True, say=lambda text: None) == 0
    )  # a spare node was signaled
    assert (jobs.run / "finished").is_file()
    assert not slurm.calls("scontrol requeue") + slurm.calls("sbatch")


@pytest.mark.parametrize(
    ("record", "again"),
    [
        ("JobState=COMPLETING Reason=None", False),  # scancel
        ("JobState=CANCELLED Reason=None", False),
        ("JobState=COMPLETING Reason=TimeLimit", True),
        ("JobState=COMPLETING Reason=None PreemptTime=2026-11-29T10:00:00", True),
        ("JobState=COMPLETING Reason=NodeDown", True),
        ("JobState=RUNNING Reason=None", True),
    ],
)
def test_only_a_cancelled_job_is_not_requeued_after_sigterm(
    slurm: FakeSlurm, jobs: RunJobs, record: str, again: bool
) -> None:
    slurm.answer("job", f"JobId=100 {record} BatchFlag=1\n")
    begin(jobs, HERE, 50)
    end(jobs, HERE, code=143, signal="TERM", most=50, requeue=True, say=lambda text: None)
    assert bool(slurm.calls("scontrol requeue")) == again


@pytest.mark.parametrize(
    "record",
    [
        "JobState=PENDING Reason=BeginTime Restarts=1",
        "JobState=COMPLETING Reason=None Restarts=1",  # as seen after a node failure
    ],
)
def test_slurm_may_have_requeued_the_job_itself(slurm: FakeSlurm, jobs: RunJobs, record: str) -> None:
    slurm.answer("job", f"JobId=100 {record} BatchFlag=1\n")
    begin(jobs, HERE, 50)
    said: list[str] = []
    end(jobs, HERE, code=143, signal="TERM", most=50, requeue=True, say=said.append)
    assert not slurm.calls("scontrol requeue") + slurm.calls("sbatch")
    assert said == ["the job ended with code 143 after step 0; Slurm has requeued it"]


def test_slurm_may_requeue_the_job_at_the_same_moment(slurm: FakeSlurm, jobs: RunJobs) -> None:
    pending = "JobId=100 JobState=PENDING Restarts=1"
    message = "Job is pending execution for job 100"
    slurm.command(
        "scontrol",
        f'[ "$1" = show ] && cat "$here/job" || {{ echo "{pending}" > "$here/job"; echo "{message}" >&2; exit 1; }}',
    )
    begin(jobs, HERE, 50)
    end(jobs, HERE, code=137, signal="none", most=50, requeue=True, say=lambda text: None)
    assert slurm.calls("scontrol requeue")
    assert not slurm.calls("sbatch")


def test_the_end_waits_for_a_controller_that_restarts(
    slurm: FakeSlurm, jobs: RunJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.launch.scheduler.RETRY_SECONDS", 0.0)
    away = "Unable to contact slurm controller (connect failure)"
    count = f'n=$(wc -l < "{slurm.folder}/calls"); [ "$n" -gt 3 ] || {{ echo "scontrol: error: {away}" >&2; exit 1; }}'
    slurm.command("scontrol", count)
    begin(jobs, HERE, 50)
    said: list[str] = []
    end(jobs, HERE, code=85, signal="USR2", most=50, requeue=True, say=said.append)
    assert slurm.calls("scontrol requeue") == ["scontrol requeue 100"] * 3
    assert said[1:] == [f"waiting for Slurm's controller: scontrol: {away}"]


def test_a_shell_of_salloc_cannot_be_requeued(slurm: FakeSlurm, jobs: RunJobs) -> None:
    slurm.answer("job", "JobId=100 JobState=RUNNING Reason=None BatchFlag=0\n")
    begin(jobs, HERE, 50)
    said: list[str] = []
    assert end(jobs, HERE, code=85, signal="none", most=50, requeue=True, say=said.append) == 85
    assert said == [
        "the job ended with code 85 after step 0; run the script again to continue, in this allocation or another"
    ]


def test_the_task_of_an_array_continues_alone(slurm: FakeSlurm, jobs: RunJobs) -> None:
    here = JobId.here(
        {"SLURM_JOB_ID": "13", "SLURM_RESTART_COUNT": "2", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    )
    assert here == JobId("13", 2, "12_3")
    begin(jobs, here, 50)
    end(jobs, here, code=85, signal="USR2", most=50, requeue=False, say=lambda text: None)
    assert "--dependency=afternotok:13 --kill-on-invalid-dep=yes --array=3" in slurm.calls("sbatch")[0]


def test_a_job_waits_for_a_launcher_that_outlived_its_node(
    slurm: FakeSlurm, jobs: RunJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.launch.chain.LOCK_POLL_SECONDS", 0.0)
    old = RunFolder(jobs.run)
    old.lock()
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        old.release()

    begin(jobs, HERE, 50, say)
    assert len(said) == 1
    assert f"waiting up to 900 s for process {os.getpid()} on " in said[0]
    assert jobs.records()[-1]["event"] == "began"


def test_srun_is_ended_when_nothing_trains_the_run_any_more(jobs: RunJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    held = iter([False, True, False, True])  # before the launchers, then between two rounds
    monkeypatch.setattr(RunFolder, "is_locked", lambda _: next(held, False))
    srun = subprocess.Popen(["sleep", "100"])
    said: list[str] = []
    end_idle_srun(jobs, srun.pid, said.append, seconds=0.02, poll=0.001)
    assert srun.wait() == -signal.SIGKILL
    assert next(held, None) is None
    assert len(said) == 1
    end_idle_srun(jobs, srun.pid, said.append)  # it has ended: nothing to wait for
    assert len(said) == 1


def test_a_folder_that_cannot_be_written_stops_a_job_at_its_start(slurm: FakeSlurm, jobs: RunJobs) -> None:
    (jobs.run / "jobs.jsonl").mkdir()  # root may write to any folder
    with pytest.raises(LaunchError, match=r"jobs\.jsonl cannot be written"):
        begin(jobs, HERE, 50)
