"""A run over several jobs: what a job's batch script calls at its start and at its end. No torch."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import psutil

from shoal.errors import EXIT_REQUEUE, LaunchError
from shoal.launch import scheduler
from shoal.launch.jobs import Ending, JobId, Record, RunJobs, Verdict, decide, may_begin
from shoal.launch.scheduler import SlurmError
from shoal.run.folder import RunFolder
from shoal.system.output import on_one_line

# States of a job that Slurm itself puts back into the queue.
_REQUEUED_BY_SLURM: Final = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
# A launcher whose peers are gone waits for them for `launch.timeout_seconds`, 600 by default.
LOCK_SECONDS: Final = 900.0
LOCK_POLL_SECONDS: Final = 1.0
IDLE_SECONDS: Final = 60.0  # launchers that end together do so within seconds
AFTER: Final = (
    "--kill-on-invalid-dep=yes",
)  # options of a job that continues another: it goes if that one finishes the run


def begin(jobs: RunJobs, here: JobId, most: int, say: Callable[[str], None] = print, **facts: Any) -> None:
    """
    Record the start of a job. Raises `LaunchError` if the run is not to continue, or if its folder cannot be written.

    Waits while another process trains the run: after Slurm has lost a node, that node's launcher may live for a while.

    most: how often the run may start again. facts: further facts to record.
    """
    _await_lock(jobs, say)
    records, step = jobs.records(), jobs.step()
    if why := jobs.stop_reason():
        raise LaunchError(
            f"this job does not train: {why}; shoal launch requeue {on_one_line(jobs.run)} starts the run again"
        )
    if why := may_begin(records, step, most):
        jobs.write_stop(why)
        raise LaunchError(
            f"this job does not train: {why}; shoal launch requeue {on_one_line(jobs.run)} starts the run again"
        )
    jobs.add("began", **here.facts(), step=step, **facts)


def _await_lock(jobs: RunJobs, say: Callable[[str], None]) -> None:
    """Wait until the run's lock is free. After `LOCK_SECONDS` the launchers say who holds it."""
    folder, begun, told = RunFolder(jobs.run), time.monotonic(), False
    while folder.is_locked() and time.monotonic() - begun < LOCK_SECONDS:
        if not told:
            holder = folder.holder()
            say(
                f"waiting up to {LOCK_SECONDS:.0f} s for process {holder.get('pid')} on {on_one_line(holder.get('host'))}, which "
                "trains this run, perhaps for a job that Slurm has ended"
            )
            told = True
        time.sleep(LOCK_POLL_SECONDS)


def end_idle_srun(
    jobs: RunJobs,
    srun: int,
    say: Callable[[str], None],
    *,
    seconds: float = IDLE_SECONDS,
    poll: float = LOCK_POLL_SECONDS,
) -> None:
    """
    Kill the process `srun` once no launcher has held the run for `seconds`, after some had; return when it has ended.

    A node that fails and comes back before Slurm has missed it has lost its launcher, but srun waits for that forever.
    """
    folder, free_since, was_held = RunFolder(jobs.run), math.inf, False
    while psutil.pid_exists(srun):
        time.sleep(poll)
        if folder.is_locked():
            was_held, free_since = True, math.inf
        elif was_held:
            free_since = min(free_since, time.monotonic())
        if time.monotonic() - free_since > seconds:
            say(f"srun waits for a node, but no launcher has trained the run for {seconds:.0f} s; ending it")
            with contextlib.suppress(ProcessLookupError):
                os.kill(srun, signal.SIGKILL)
            return


def end(
    jobs: RunJobs, here: JobId, *, code: int, signal: str, most: int, requeue: bool, say: Callable[[str], None]
) -> int:
    """
    Record the end of a job, and let the run continue in another job if it should; return the exit code of the batch script.

    code: of srun. signal: that the batch script received: USR2, TERM or none. most: how often the run may start again. requeue:
    whether to put this job back into the queue; if not, or if Slurm does not allow it, another job continues the run.
    """
    state = _state(here.job)
    ending = Ending(
        code=code,
        signal=signal,
        cancelled=signal == "TERM" and not _is_requeued(state, here) and _is_cancelled(state),
        finished=jobs.has_finished(),
        stop=jobs.stop_reason(),
    )
    step = jobs.step()
    verdict = decide(jobs.records(), ending, step, most)
    _record(jobs, here, code, signal, step, verdict, say)
    if verdict.kind == "again":
        _continue(jobs, here, state, verdict.why, requeue=requeue, say=say)
        return EXIT_REQUEUE
    if verdict.kind == "finished":
        jobs.mark_finished()
        say(f"{verdict.why}; no further job is needed")
        return 0
    jobs.write_stop(verdict.why)
    _cancel_successors(jobs.records(), here, say)
    say(f"the run does not continue: {verdict.why}; shoal launch requeue {on_one_line(jobs.run)} starts it again")
    return code


def _record(
    jobs: RunJobs, here: JobId, code: int, signal: str, step: int, verdict: Verdict, say: Callable[[str], None]
) -> None:
    """Record a job's end. A full disk is only reported: the next job cannot record its start, and so does not train."""
    try:
        jobs.add("ended", **here.facts(), code=code, signal=signal, step=step, verdict=verdict.kind, why=verdict.why)
    except LaunchError as error:
        say(str(error))


def _state(job: str) -> dict[str, str]:
    """Return Slurm's record of the job; empty if it cannot be had."""
    try:
        return scheduler.show(job)
    except SlurmError:
        return {}


def _is_requeued(state: Record, here: JobId) -> bool:
    """Return whether Slurm itself starts the job again: after a node failure it counts a restart while the job still ends."""
    restarts = str(state.get("Restarts", "0"))
    return state.get("JobState") in _REQUEUED_BY_SLURM or (restarts.isdigit() and int(restarts) > here.restart)


def _is_cancelled(state: Record) -> bool:
    """Return whether a user has cancelled the job, rather than its limit, a preemption or a failed node ending it."""
    if state.get("JobState") not in ("CANCELLED", "COMPLETING"):
        return False
    preempted = state.get("PreemptTime", "None") not in ("None", "N/A", "Unknown")
    return state.get("Reason", "None") not in ("TimeLimit", "NodeDown") and not preempted


def _continue(
    jobs: RunJobs, here: JobId, state: Record, why: str, *, requeue: bool, say: Callable[[str], None]
) -> None:
    """Requeue this job, or else let another job continue the run; say which. Raises `LaunchError` if neither is possible."""
    if state.get("BatchFlag") == "0":
        say(f"{why}; run the script again to continue, in this allocation or another")
        return
    if _is_requeued(state, here):
        say(f"{why}; Slurm has requeued it")
        return
    if requeue and scheduler.has("scontrol"):
        try:
            say(f"{why}; requeuing job {here.job}")
            scheduler.patiently(lambda: scheduler.requeue(here.job), say)
            return
        except SlurmError as error:
            if _is_requeued(_state(here.job), here):
                say(f"{why}; Slurm has requeued it")
                return
            say(f"the job cannot be requeued ({error}); another job continues the run")
    if successor := _successor(jobs.records(), here):
        say(f"{why}; job {successor} continues the run")
        return
    if not scheduler.has("sbatch"):
        raise LaunchError(
            f"{why}; neither scontrol nor sbatch is on PATH here: submit {on_one_line(jobs.script)} again to continue"
        )
    submitted: list[str] = []
    scheduler.patiently(lambda: submitted.append(_submit_after(jobs, here)), say)
    jobs.add("submitted", job=submitted[0], after=here.job, by="chain")
    say(f"{why}; job {submitted[0]} continues the run")


def _submit_after(jobs: RunJobs, here: JobId) -> str:
    """Submit the script again, to start if this job ends with an error code; return the new job's id."""
    index = [f"--array={here.array.rpartition('_')[2]}"] if here.array else []
    return scheduler.submit(jobs.script, [f"--dependency=afternotok:{here.job}", *AFTER, *index])


def _successor(records: Sequence[Record], here: JobId) -> str | None:
    """Return the job that was submitted to continue this one, if it still waits."""
    ids = [str(r["job"]) for r in records if r.get("event") == "submitted" and r.get("after") == here.job]
    if not ids:
        return None
    try:
        return next((job for job in ids if any(q.is_one_of([job]) for q in scheduler.queue())), None)
    except SlurmError:
        return ids[-1]  # a node without squeue: the chain was submitted elsewhere


def _cancel_successors(records: Sequence[Record], here: JobId, say: Callable[[str], None]) -> None:
    """Remove the jobs that were to continue the run. They would also end at once, because of `stop`."""
    waiting: set[str] = {here.job}
    for record in records:
        if record.get("event") == "submitted" and record.get("after") in waiting:
            waiting.add(str(record["job"]))
    for job in sorted(waiting - {here.job}):
        with contextlib.suppress(SlurmError):
            scheduler.cancel(job)
            say(f"cancelled job {job}, which was to continue the run")
