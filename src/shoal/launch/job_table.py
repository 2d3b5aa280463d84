"""The jobs of a run as a table: what `shoal launch status` shows. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shoal.launch.jobs import Record, RunJobs
from shoal.launch.scheduler import Queued

# Slurm's reasons why a job waits -> what that means, and what to do.
REASONS: Final = {
    "Resources": "waits for free nodes",
    "Priority": "waits behind jobs of higher priority",
    "Dependency": "waits for another job",
    "DependencyNeverSatisfied": "waits for a job that ended otherwise; scancel removes it",
    "BeginTime": "starts about two minutes after its requeue",
    "JobHeldUser": "was held; scontrol release JOB lets it start",
    "JobHeldAdmin": "was held by an administrator",
    "JobHoldMaxRequeue": "was held: its script failed to start too often; scontrol release JOB lets it start",
    "PartitionTimeLimit": "asks for more time than its partition allows; submit it with a shorter --time",
    "PartitionNodeLimit": "asks for more nodes than its partition allows; submit it with a smaller --nodes",
    "PartitionConfig": "asks for more than its partition has or allows: nodes, cores or time",
    "PartitionDown": "waits: its partition is down",
    "PartitionInactive": "waits: its partition is inactive",
    "ReqNodeNotAvail": "waits for nodes that are down, drained or reserved",
    "Reservation": "waits for its reservation",
    "Licenses": "waits for a license",
    "NodeDown": "a node it needs is down",
    "BadConstraints": "no nodes have what it asks for; change --constraint",
    "AccountNotAllowed": "its account may not use this partition; set --account or --partition",
    "QOSNotAllowed": "its QOS may not use this partition; set --qos or --partition",
}  # fmt: skip
_LIMITS: Final = ("Assoc", "QOS", "MaxCpu", "MaxGRES", "MaxNode", "MaxJobs")  # beginnings of reasons that are limits


@dataclass(frozen=True, kw_only=True)
class Row:
    """One start of a job, or a job that has not started. Times are in seconds since 1970."""

    job: str
    restart: int | None  # None before the first start
    state: str  # Slurm's, or finished, again, stopped, or "lost" if the job is gone and did not record its end
    why: str
    nodes: str = ""
    first_step: int | None = None
    last_step: int | None = None
    code: int | None = None
    began: float | None = None
    ended: float | None = None


@dataclass(frozen=True)
class Table:
    """The rows of a run, oldest first. problem: why Slurm's queue is unknown, or ""."""

    rows: Sequence[Row]
    step: int  # from which the run would resume
    stop: str
    finished: bool
    problem: str = ""

    @classmethod
    def of(cls, jobs: RunJobs, queue: Sequence[Queued], problem: str = "") -> Table:
        records = jobs.records()
        return cls(
            list(_rows(records, queue, bool(problem))), jobs.step(), jobs.stop_reason(), jobs.has_finished(), problem
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "step": self.step, "finished": self.finished, "stop": self.stop or None, "problem": self.problem or None,
            "jobs": [dataclasses.asdict(row) for row in self.rows],
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        """Yield the lines for a terminal."""
        if self.finished:
            yield "the run has taken all its steps"
        elif self.stop:
            yield f"the run would resume from step {self.step}, but does not continue: {self.stop}"
        else:
            yield f"the run would resume from step {self.step}"
        if self.problem:
            yield f"what Slurm does with its jobs is unknown: {self.problem}"
        cells = [("job", "restart", "state", "nodes", "steps", "")]
        cells += [
            (r.job, "" if r.restart is None else str(r.restart), r.state, r.nodes, _steps(r), r.why) for r in self.rows
        ]
        widths = [max(len(row[n]) for row in cells) for n in range(5)]
        for row in cells if self.rows else ():
            yield "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[5]]).rstrip()


def ids_of(records: Sequence[Record]) -> list[str]:
    """Return the ids of a run's jobs, also those of tasks of an array, oldest first."""
    found = [str(r[name]) for r in records for name in ("job", "array") if r.get(name)]
    return list(dict.fromkeys(found))


def explain(reason: str) -> str:
    """Return what one of Slurm's reasons means, or the reason itself."""
    name = reason.partition(",")[0].partition(" ")[0].strip("()")
    if name in REASONS:
        return REASONS[name]
    return f"waits: a limit of your account or QOS is reached ({name})" if name.startswith(_LIMITS) else reason


def _rows(records: Sequence[Record], queue: Sequence[Queued], unknown: bool) -> Iterator[Row]:
    """Yield a row for each start, then one for each job that waits. unknown: whether the queue could not be read."""
    ends = {(r.get("job"), r.get("restart")): r for r in records if r.get("event") == "ended"}
    starts = [r for r in records if r.get("event") == "began"]
    latest = {str(r["job"]): r.get("restart") for r in starts}
    for start in starts:
        job, restart = str(start["job"]), start.get("restart")
        end = ends.get((start.get("job"), restart))
        live = next((q for q in queue if q.job == job), None) if latest[job] == restart else None
        state, why = _state(end, live, unknown, is_latest=latest[job] == restart)
        yield Row(
            job=str(start.get("array") or job), restart=restart, state=state, why=why, nodes=str(start.get("nodes", "")),
            first_step=start.get("step"), last_step=end.get("step") if end else None, code=end.get("code") if end else None,
            began=start.get("time"), ended=end.get("time") if end else None,
        )  # fmt: skip
    ids = ids_of(records)
    for each in queue:
        if each.is_one_of(ids) and each.state in ("PENDING", "CONFIGURING", "REQUEUED", "SUSPENDED", "REQUEUE_HOLD"):
            yield Row(job=each.array or each.job, restart=None, state=each.state, why=explain(each.reason))


def _state(end: Record | None, live: Queued | None, unknown: bool, *, is_latest: bool) -> tuple[str, str]:
    """Return the state of one start of a job, and a remark."""
    if end is not None:
        return str(end.get("verdict", "ended")), str(end.get("why", ""))
    if live is not None and live.state not in ("PENDING", "CONFIGURING"):
        return live.state, f"since {live.elapsed}, limit {live.limit}"
    if unknown and is_latest:
        return "unknown", ""
    return "lost", "the job ended without recording it: a failed node, or ended by Slurm"


def _steps(row: Row) -> str:
    if row.first_step is None:
        return ""
    return f"{row.first_step} to {row.last_step}" if row.last_step is not None else f"from {row.first_step}"
