"""`shoal launch began`, `watch`, `ended`, `status`, `stop` and `requeue`: the jobs of a run."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.commands.flags import Override
from shoal.errors import EXIT_REQUEUE, LaunchError
from shoal.system.output import on_one_line, say_error

if TYPE_CHECKING:
    from shoal.launch.job_table import Table
    from shoal.launch.jobs import JobId, RunJobs


def began(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.launch.chain import begin
    from shoal.launch.jobs import JobId, RunJobs
    from shoal.launch.meeting_place import meeting_place

    here, nodes = JobId.here(), os.environ.get("SLURM_JOB_NODELIST", "")
    print(f"=== job {here.job}, restart {here.restart}, on {nodes}", file=sys.stderr, flush=True)
    jobs = RunJobs(Path(args.target).absolute())
    several = int(os.environ.get("SLURM_JOB_NUM_NODES", os.environ.get("SLURM_NNODES", "1"))) > 1
    place = meeting_place() if several else ""
    begin(jobs, here, args.max_requeues, say_error, nodes=nodes, **({"rendezvous": place} if place else {}))
    if place:
        print(place)
    return 0


def watch(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.launch.chain import end_idle_srun
    from shoal.launch.jobs import RunJobs

    end_idle_srun(RunJobs(Path(args.target).absolute()), args.srun, say_error)
    return 0


def ended(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.launch.chain import end
    from shoal.launch.jobs import JobId, RunJobs

    jobs, here = RunJobs(Path(args.target).absolute()), JobId.here()
    if args.code not in (0, EXIT_REQUEUE) and args.signal == "none":  # after SIGTERM there is little time
        _explain(jobs, here)
    return end(
        jobs,
        here,
        code=args.code,
        signal=args.signal,
        most=args.max_requeues,
        requeue=args.requeue,
        say=say_error,
    )


def _explain(jobs: RunJobs, here: JobId) -> None:
    """Print which process of the job failed first, and why. Tolerates any error: the run must still be requeued."""
    from shoal.report.causes.cause import cause_of
    from shoal.run.folder import RunFolder

    try:
        cause = cause_of(RunFolder(jobs.run), here.job, here.restart)
    except Exception:
        traceback.print_exc()
        return
    for line in cause.lines() if cause else ():
        say_error(line)


def status(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    jobs = _named(args)
    table = _table(jobs)
    if args.json:
        print(json.dumps(table.as_json(), indent=2))
        return 0
    for line in table.lines():
        print(line)
    return 0


def stop(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.launch import scheduler

    jobs = _named(args)
    jobs.write_stop("it was stopped with shoal launch stop")
    live = _live(jobs)
    if not live:
        print("no job of this run is in the queue; later ones would end at once")
    for job in live:
        if job.state == "RUNNING":
            scheduler.signal_script(job.job, "USR2")
            print(
                f"job {job.array or job.job} saves and ends; shoal launch status {on_one_line(args.target)} shows when"
            )
        else:
            scheduler.cancel(job.array or job.job)
            print(f"cancelled job {job.array or job.job}, which was {job.state.lower()}")
    return 0


def requeue(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.launch import scheduler

    jobs = _named(args)
    live = _live(jobs)
    stopping = bool(jobs.stop_reason())
    if jobs.has_finished():
        raise LaunchError(
            "the run has taken all its steps; to train further, raise train.steps with shoal launch slurm --submit"
        )
    running = [job for job in live if job.state == "RUNNING"]
    if live and not running:
        jobs.allow()
        print(
            f"job {live[0].array or live[0].job} already waits in the queue ({live[0].state.lower()}, {live[0].reason})"
        )
        return 0
    jobs.allow()
    if running:
        job = running[0].array or running[0].job
        jobs.add("requeued", job=running[0].job, by="user")
        if not stopping:
            scheduler.signal_script(running[0].job, "USR2")
        print(f"job {job} saves, ends and starts again")
        return 0
    array = next((str(r["array"]) for r in reversed(jobs.records()) if r.get("array")), "")
    index = [f"--array={array.rpartition('_')[2]}"] if array else []
    if not jobs.script.is_file():
        raise LaunchError(f"{on_one_line(jobs.script)} is gone; submit the run again with shoal launch slurm --submit")
    job = scheduler.submit(jobs.script, index)
    jobs.add("submitted", job=job, by="user", **({"array": f"{job}_{array.rpartition('_')[2]}"} if array else {}))
    print(f"submitted job {job}, which continues the run from step {jobs.step()}")
    return 0


def _named(args: argparse.Namespace) -> RunJobs:
    """Return the jobs of the run that the command line names. Raises `LaunchError` if it has none."""
    from shoal.launch.jobs import RunJobs

    for path in (Path(args.target), Path(args.runs) / args.target):
        jobs = RunJobs(path.absolute())
        if jobs.script.is_file() or jobs.records():
            return jobs
    runs = Path(args.runs)
    others = sorted(path.parent.parent.name for path in runs.glob(f"*/jobs/{jobs.script.name}"))
    known = f"; there are {', '.join(map(on_one_line, others[:8]))}" if others else "; or name their folder with --runs"
    raise LaunchError(
        f"{on_one_line(args.target)} has no jobs in {on_one_line(runs)}{known}. shoal launch slurm RECIPE --submit starts a run"
    )


def _live(jobs: RunJobs) -> list[Any]:
    """Return the run's jobs that are in Slurm's queue."""
    from shoal.launch import scheduler
    from shoal.launch.job_table import ids_of

    ids = ids_of(jobs.records())
    return [job for job in scheduler.queue() if job.is_one_of(ids) and job.state != "COMPLETING"]


def _table(jobs: RunJobs) -> Table:
    from shoal.launch import scheduler
    from shoal.launch.job_table import Table
    from shoal.launch.scheduler import SlurmError

    try:
        queue, problem = scheduler.queue(), ""
    except SlurmError as error:
        queue, problem = [], str(error)
    return Table.of(jobs, queue, problem)
