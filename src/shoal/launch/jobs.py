"""
The jobs that train a run: their records in RUN/jobs.jsonl, and whether the run continues in another job. No torch.

    RUN/
      jobs.jsonl          one line for each submission, start and end of a job
      finished            exists once the run has taken all its steps; its jobs then end at once
      jobs/
        job.sbatch        the batch script
        recipe.yaml       the recipe as submitted
        stop              why the run is not to continue; its jobs then end at once
        JOB.log           the output of a job, over its restarts
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from shoal.checkpoint.saved import listed
from shoal.errors import EXIT_BAD_INPUT, LaunchError
from shoal.launch.slurm import FINISHED, SCRIPT
from shoal.run.events import read_json_lines
from shoal.run.jsonl import PatientLines
from shoal.system.output import on_one_line

STOP: Final = "stop"  # in RUN/jobs
# How many jobs in a row may end at the step at which they began. Workers that died too often were already restarted by their
# launcher, so another job is unlikely to help.
WORKERS_DIED: Final = 1  # exit code of a launcher
PATIENCE: Final = 3
INTERRUPTED: Final = 130  # Ctrl-C

Record = Mapping[str, Any]


@dataclass(frozen=True)
class JobId:
    """One start of a job. `array`: ARRAYJOB_INDEX of a task of an array, else ""."""

    job: str
    restart: int
    array: str = ""

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> JobId:
        """Return the job that this process runs in. Raises `LaunchError` outside a job."""
        job = environment.get("SLURM_JOB_ID", "")
        if not job:
            raise LaunchError("SLURM_JOB_ID is not set: this command belongs in a Slurm job, such as job.sbatch")
        restart = environment.get("SLURM_RESTART_COUNT", "0")
        whole, index = environment.get("SLURM_ARRAY_JOB_ID", ""), environment.get("SLURM_ARRAY_TASK_ID", "")
        array = f"{whole}_{index}" if whole and index else ""
        return cls(job, int(restart) if restart.isdigit() else 0, array)

    def facts(self) -> dict[str, Any]:
        return {"job": self.job, "restart": self.restart, **({"array": self.array} if self.array else {})}


@dataclass(frozen=True)
class Verdict:
    """Whether a run continues after a job, and why."""

    kind: Literal["finished", "again", "stopped"]
    why: str


@dataclass(frozen=True)
class Ending:
    """How a job ended, for `decide`."""

    code: int  # of srun: the highest of all launchers
    signal: str = "none"  # that the batch script received: USR2 or TERM
    cancelled: bool = False  # by a user
    finished: bool = False  # the run has taken all its steps
    stop: str = ""  # why the run is not to continue, if that was asked


class RunJobs:
    """The jobs of one run."""

    def __init__(self, run: Path) -> None:
        self.run = run

    @property
    def folder(self) -> Path:
        return self.run / "jobs"

    @property
    def script(self) -> Path:
        return self.folder / SCRIPT

    def records(self) -> list[dict[str, Any]]:
        return read_json_lines(self.run / "jobs.jsonl")

    def add(self, event: str, **facts: Any) -> None:
        """Append a record. Raises `LaunchError` if it cannot be written."""
        lines = PatientLines(self.run / "jobs.jsonl")
        if not lines.offer({"time": round(time.time(), 3), "event": event, **facts}):
            raise LaunchError(lines.problem or "")
        lines.sync()
        lines.close()

    def step(self) -> int:
        """Return the step from which the run would resume: that of its newest complete checkpoint on disk, else 0."""
        return max((saved.step for saved in listed(self.run / "checkpoints")), default=0)

    def has_finished(self) -> bool:
        """Return whether the run's last life took all its steps."""
        lives = [
            r["event"] for r in read_json_lines(self.run / "events.jsonl") if r.get("event") in ("started", "finished")
        ]
        return bool(lives) and lives[-1] == "finished"

    def stop_reason(self) -> str:
        """Return why the run is not to continue; "" if it may."""
        try:
            return (self.folder / STOP).read_text(encoding="utf-8").strip() or "it was asked to stop"
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError):
            return "jobs/stop cannot be read"

    def write_stop(self, why: str) -> None:
        """Keep further jobs of the run from training. Raises `LaunchError` if the file cannot be written."""
        self._write(self.folder / STOP, why)

    def mark_finished(self) -> None:
        self._write(self.run / FINISHED, "the run has taken all its steps; its jobs end at once")

    def allow(self) -> None:
        """Let jobs train again: remove `finished` and `stop`. Raises `LaunchError` if they cannot be removed."""
        for path in (self.run / FINISHED, self.folder / STOP):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise LaunchError(f"{on_one_line(path)} cannot be removed: {error.strerror}") from None

    def _write(self, path: Path, text: str) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n", encoding="utf-8")
        except OSError as error:
            raise LaunchError(f"{on_one_line(path)} cannot be written: {error.strerror}") from None


def since_asked(records: Sequence[Record]) -> list[Record]:
    """Return the records since a user last submitted or requeued the run: bounds count from there."""
    asked = [n for n, r in enumerate(records) if r.get("by") == "user"]
    return list(records[asked[-1] :] if asked else records)


def starts_at(records: Sequence[Record], step: int) -> int:
    """Return how many of the last starts in a row were at `step`."""
    count = 0
    for record in reversed([r for r in since_asked(records) if r.get("event") == "began"]):
        if record.get("step") != step:
            break
        count += 1
    return count


def may_begin(records: Sequence[Record], step: int, most: int) -> str:
    """
    Return why a job may not train the run, or "".

    step: from which the run would resume. most: how often it may start again.
    """
    starts = sum(r.get("event") == "began" for r in since_asked(records))
    if starts > most:
        return f"the run was started again {starts - 1} times, and --max-requeues is {most}"
    if (stuck := starts_at(records, step)) >= PATIENCE:
        return f"{stuck} jobs in a row ended at step {step} without progress"
    return ""


def decide(records: Sequence[Record], ending: Ending, step: int, most: int) -> Verdict:
    """
    Return whether the run continues in another job.

    records: with the start of this job last. step: from which the run would resume. most: how often it may start again.
    """
    if ending.finished or (ending.code == 0 and ending.signal == "none"):  # srun may end with 0 after a signal
        return Verdict("finished", "the run has taken all its steps")
    if ending.stop:
        return Verdict("stopped", ending.stop)
    if ending.cancelled:
        return Verdict("stopped", "the job was cancelled")
    if ending.code == EXIT_BAD_INPUT:
        return Verdict("stopped", "a launcher ended with code 2, a problem to fix: see its message")
    if ending.code == INTERRUPTED:
        return Verdict("stopped", "it was interrupted")
    stuck = starts_at(records, step)
    if ending.code == WORKERS_DIED and ending.signal == "none" and stuck:
        return Verdict("stopped", f"the workers died too often, and the job made no progress beyond step {step}")
    starts = sum(r.get("event") == "began" for r in since_asked(records))
    if starts > most:
        return Verdict("stopped", f"the run was started again {starts - 1} times, and --max-requeues is {most}")
    if stuck >= PATIENCE:
        return Verdict("stopped", f"{stuck} jobs in a row ended at step {step} without progress")
    how = "was signaled before its limit" if ending.signal == "USR2" else f"ended with code {ending.code}"
    return Verdict("again", f"the job {how} after step {step}")
