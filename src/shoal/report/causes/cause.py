"""
Finds the first cause of a failure: who failed first and why, and which failures only followed. No torch.

A process that lost its peers says so in its log, often louder than the one that failed. So a failure that can only be a
consequence never comes first while another explains it, whatever the clocks say.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from shoal.report.causes.failure import CAUSE, CONSEQUENCE, POSSIBLE, UNCLEAR, Failure, FirstCause
from shoal.report.causes.findings import LONGEST, Finding, find, find_outside
from shoal.report.causes.logs import Attempt, Log, attempts, began_at, job_logs, read_log
from shoal.report.causes.signatures import Signature, recognize
from shoal.report.causes.table import ABSENT, HANG, SILENT, TABLE
from shoal.run.events import read_json_lines
from shoal.run.folder import RunFolder
from shoal.run.log_lines import STOPPED

SLACK_SECONDS: Final = 5.0  # between the clock that names an attempt and those of the other nodes
_FINE: Final = ("ended with code 0", "ended with code 85")  # finished, or stopped on request
_MEMORY: Final = ("kernel out of memory", "slurm out of memory")
_OF_JOB: Final = ("time limit", "preempted", "node failure", "requeued", "cancelled")
_OF_GPU: Final = ("gpu off the bus", "gpu error")
# Signature of the kernel or Slurm -> signatures of processes whose failure it explains.
_EXPLAINS: Final[Mapping[str, tuple[str, ...]]] = {
    **dict.fromkeys(_MEMORY, ("killed", "bus error", "aborted", "silent node")),
    **dict.fromkeys(_OF_JOB, ("killed", "terminated", "silent node", "exit code")),
    **dict.fromkeys(
        _OF_GPU,
        ("cuda error", "illegal gpu access", "gpu memory error", "gpu library", "no gpu", "hang", "nccl timeout"),
    ),
    "disk error": ("io error", "shared disk", "read-only disk", "bus error"),
    "hardware error": ("segmentation fault", "bus error", "illegal instruction", "killed", "gpu memory error"),
}


def first_cause(folder: RunFolder, logs: Path | None = None) -> FirstCause | None:
    """
    Return why a job or a run failed; None if its logs tell of no failure.

    logs: the job's log, or its folder of logs, in RUN/jobs; its name begins with the job's number. None: the last job, or the
    last start of a run without Slurm. Logs that cannot be read count as empty.
    """
    job, restart = named_job(logs) if logs is not None else last_job(folder)
    return cause_of(folder, job, restart)


def named_job(logs: Path) -> tuple[str | None, int | None]:
    """Return (job, restart) from a name such as "42", "42-1" or "42.log"; (None, None) for other names."""
    found = re.match(r"(\d+)(?:_\d+)?(?:-(\d+))?(?:\.|$)", logs.name)
    return (found[1], int(found[2]) if found[2] else None) if found else (None, None)


def last_job(folder: RunFolder) -> tuple[str | None, int | None]:
    """Return (job, restart) of the run's last job in Slurm; (None, None) if it was last started without Slurm."""
    tries = attempts(folder.logs)
    job, restart = (tries[-1].job, tries[-1].restart) if tries else (None, None)
    if tries and job is None:
        return None, None
    jobs = folder.path / "jobs"
    found = [named_job(path) for path in jobs.iterdir()] if jobs.is_dir() else []
    newest = max((name for name, _ in found if name), key=int, default=None)
    if newest is not None and (job is None or int(newest) > int(job)):
        return newest, max((again for name, again in found if name == newest and again is not None), default=None)
    return job, restart


def cause_of(folder: RunFolder, job: str | None, restart: int | None = None) -> FirstCause | None:
    """Return the cause of the last attempt of a job. job: None for a run outside Slurm. restart: None for the job's last one."""
    every = attempts(folder.logs)
    ours = [each for each in every if each.job == job and restart in (None, each.restart)]
    if not ours:
        return _judge(folder, None, None, _job_logs(folder, job, restart))
    found = [_cause_of_attempt(folder, each, every) for each in ours[-4:]]
    last = found[-1]
    if last is None:
        return None
    same = [each for each in found[:-1] if each is not None and _alike(each.first, last.first)]
    return replace(last, same_before=len(same))


def _alike(a: Failure, b: Failure) -> bool:
    return a.rank == b.rank and a.finding.signature.name == b.finding.signature.name


def _cause_of_attempt(folder: RunFolder, attempt: Attempt, every: Sequence[Attempt]) -> FirstCause | None:
    after = every[every.index(attempt) + 1 :]
    until = _start(after[0]) if after else None
    return _judge(folder, attempt, until, _job_logs(folder, attempt.job, attempt.restart))


def _start(attempt: Attempt) -> float:
    """Return when an attempt began, in seconds since 1970, from the beginning of its logs; 0 if they are gone."""
    return min(filter(None, map(began_at, attempt.folder.glob("rank-*.log"))), default=0.0)


def _ranks(attempt: Attempt) -> list[Log]:
    return [read_log(path) for path in sorted(attempt.folder.glob("rank-*.log"))]


def _job_logs(folder: RunFolder, job: str | None, restart: int | None) -> list[Log]:
    return [read_log(path) for path in job_logs(folder.path / "jobs", job, restart)] if job is not None else []


def _judge(folder: RunFolder, attempt: Attempt | None, until: float | None, of_job: Sequence[Log]) -> FirstCause | None:
    """Weigh all failures. attempt: None if no worker was started. until: when the next attempt began."""
    ranks = _ranks(attempt) if attempt is not None else []
    began = min((log.began for log in ranks if log.began is not None), default=None)
    events = _Events.read(folder, began, until, alone=attempt is None and not of_job)
    failures = [*_of_ranks(ranks, events), *events.failures(ranks)]
    outside = list(_outside(attempt, of_job, began))
    if ranks and all(log.ended in _FINE for log in ranks):  # requeued because it was asked to stop
        outside = [each for each in outside if each.finding.signature.name not in ("requeued", "cancelled")]
    failures += outside
    if not ranks:
        failures += [
            _process(None, None, each, CAUSE) for log in of_job for each in find(log) if each.kind != "outside"
        ]
    if not any(each.weight == CAUSE for each in failures):
        failures += [*_silent(ranks), *_absent(ranks, failures)]
    cause = _first(failures, attempt.name if attempt else "")
    failed = {each.rank for each in failures}
    stopped = sum(log.ended == STOPPED and log.rank not in failed for log in ranks)
    return replace(cause, stopped=stopped) if cause is not None else None


class _Events:
    """The events of an attempt: crashes and hangs that launchers have recorded."""

    def __init__(self, path: Path, events: Sequence[Mapping[str, Any]]) -> None:
        self._path = path
        self.crashes = {e["rank"]: e for e in reversed(events) if e.get("event") == "crashed" and "rank" in e}
        self.hangs = [e for e in events if e.get("event") == "hang" and "rank" in e]

    @classmethod
    def read(cls, folder: RunFolder, began: float | None, until: float | None, *, alone: bool) -> _Events:
        """Read those from `began` to `until`. alone: there are no logs; then take what came after the last start."""
        path = folder.events_file
        events = read_json_lines(path)
        if alone:
            ends = [n for n, e in enumerate(events) if e.get("event") in ("started", "finished", "stopped")]
            return cls(path, events[ends[-1] + 1 if ends else 0 :])
        if began is None:
            return cls(path, [])
        last = until - SLACK_SECONDS if until is not None else float("inf")
        return cls(path, [e for e in events if began - SLACK_SECONDS <= float(e.get("time", 0)) <= max(last, began)])

    def where(self, rank: int) -> str:
        """Return the phase and step of a rank's crash; "" if none was recorded."""
        crash = self.crashes.get(rank)
        if crash is None:
            return ""
        step = f" of step {crash['step']}" if crash.get("step") else ""
        return f"in {crash['phase']}{step}" if crash.get("phase") else ""

    def failures(self, ranks: Sequence[Log]) -> Iterator[Failure]:
        """Yield the hangs, and the crashes that are not in a rank's log."""
        hosts = {log.rank: log.host for log in ranks}
        for hang in self.hangs:
            rank, why = hang["rank"], str(hang.get("why", ""))
            what = re.sub(r"^rank \d+(?: on \S+)? ", "", why)
            finding = self._finding(HANG, what or "did not join the others", why, hang)
            yield Failure(finding, CAUSE, rank, hosts.get(rank), finding.time)
        for rank, crash in self.crashes.items():
            how = str(crash.get("how", ""))
            known = recognize(how, TABLE)
            if known and (rank not in hosts or known[0].kind == "outside"):
                finding = self._finding(known[0], known[0].sentence(known[1]), how, crash)
                weight = _weight(finding.signature.kind)
                yield Failure(finding, weight, rank, hosts.get(rank), finding.time, self.where(rank))

    def _finding(self, of: Signature, what: str, line: str, event: Mapping[str, Any]) -> Finding:
        return Finding(of, what, line[:LONGEST], self._path, None, event.get("time"), event["rank"], kind=of.kind)


def _weight(kind: str) -> int:
    return {"cause": CAUSE, "outside": CAUSE, "end": UNCLEAR, "follows": CONSEQUENCE}[kind]


def _of_ranks(ranks: Sequence[Log], events: _Events) -> Iterator[Failure]:
    """Yield one failure for each rank that failed."""
    hung = {hang["rank"] for hang in events.hangs}
    for log in ranks:
        if log.ended in _FINE:
            continue
        found = find(log)
        best = next(
            (each for kind in ("cause", "outside", "follows", "end") for each in found if each.kind == kind), None
        )
        if best is None:
            continue
        weight = _weight(best.kind)
        if log.ended == STOPPED and weight == CAUSE and log.rank not in hung:
            weight = POSSIBLE  # it wrote of a problem, but another process ended first
        yield replace(_process(log.rank, log.host, best, weight), where=events.where(log.rank or 0))


def _process(rank: int | None, host: str | None, finding: Finding, cause: int) -> Failure:
    weight = cause if finding.kind == "cause" else _weight(finding.kind)
    return Failure(finding, weight, rank if rank is not None else finding.rank, host, finding.time)


def _outside(attempt: Attempt | None, of_job: Sequence[Log], began: float | None) -> Iterator[Failure]:
    """Yield what the kernels of the nodes and Slurm report of this attempt."""
    for path in sorted(attempt.folder.glob("kernel-*.log")) if attempt is not None else ():
        log = read_log(path)
        for each in find(log):
            # memory of another program, a slow disk: a cause only if it explains what happened to a process
            weight = CAUSE if each.signature.name in _OF_GPU and each.kind == "outside" else POSSIBLE
            yield Failure(each, weight if each.kind == "outside" else CONSEQUENCE, None, log.host, each.time)
    for log in of_job:
        for each in _of_this_start(find_outside(log), began):
            # srun cancels its step when a task fails
            of_step = each.signature.name == "cancelled" and "STEP" in each.line
            when = each.time + 1 if each.time is not None else None  # Slurm prints whole seconds, rounded down
            host = each.groups.get("node") or each.groups.get("nodes")
            yield Failure(each, UNCLEAR if of_step else CAUSE, None, host, when)


def _of_this_start(findings: Sequence[Finding], began: float | None) -> Sequence[Finding]:
    """Return the findings after the last one that Slurm printed before `began`: all restarts of a job may share a log."""
    if began is None:
        return findings
    old = [n for n, each in enumerate(findings) if each.time is not None and each.time < began - SLACK_SECONDS]
    return findings[old[-1] + 1 if old else 0 :]


def _silent(ranks: Sequence[Log]) -> Iterator[Failure]:
    """Yield the nodes whose logs all end without an exit while others' have one."""
    hosts: dict[str | None, list[Log]] = {}
    for log in ranks:
        hosts.setdefault(log.host, []).append(log)
    if not any(log.ended for log in ranks):
        return
    for host, logs in hosts.items():
        if host is not None and not any(log.ended for log in logs):
            last = max(logs, key=_last_time)
            line = last.entries[-1].text if last.entries else "(empty)"
            finding = Finding(SILENT, SILENT.what, line[:LONGEST], last.path, None, _last_time(last) or None)
            yield Failure(finding, UNCLEAR, None, host, finding.time)


def _last_time(log: Log) -> float:
    return max((each.time for each in log.entries if each.time is not None), default=0.0)


def _absent(ranks: Sequence[Log], failures: Sequence[Failure]) -> Iterator[Failure]:
    """Yield the ranks that others waited for in a collective, if most ranks waited."""
    waited = {each.rank for each in failures if each.finding.signature.name in ("nccl timeout", "gloo timeout")}
    if not waited or len(waited) * 2 < len(ranks):
        return
    absent = [log for log in ranks if log.rank not in waited and log.ended not in _FINE]
    queued = {log.rank: _queued(log) for log in ranks if log.rank in waited}
    known = {rank: number for rank, number in queued.items() if number is not None}
    behind = [log for log in ranks if log.rank in known and known[log.rank] < max(known.values())]
    for log in [*absent, *behind][: len(ranks) // 2]:
        number = known.get(log.rank)
        more = f": it had queued {number} of them, others {max(known.values())}" if number is not None else ""
        line = log.entries[-1].text if log.entries else "(empty)"
        finding = Finding(ABSENT, ABSENT.what + more, line[:LONGEST], log.path, None, None, log.rank)
        yield Failure(finding, UNCLEAR, log.rank, log.host, _last_time(log) or None)


def _queued(log: Log) -> int | None:
    """Return how many collectives a rank had queued when NCCL's watchdog ended it."""
    counts = [int(each.groups["enqueued"]) for each in find(log) if "enqueued" in each.groups]
    return max(counts, default=None)


def _first(failures: Iterable[Failure], attempt: str) -> FirstCause | None:
    """Choose the first cause; sort the others into consequences and failures of their own."""
    ordered = sorted(failures, key=lambda each: (each.weight, each.time is None, each.time or 0.0))
    if not ordered:
        return None
    first = ordered[0]
    rest = ordered[1:]
    deeper = next((each for each in rest if _explains(each, first)), None)
    if deeper is not None:
        rest.remove(deeper)
        first = replace(
            first, finding=deeper.finding, host=first.host or deeper.host, time=_earlier(first.time, deeper.time)
        )
    rest = [each for each in rest if not (each.rank == first.rank and each.rank is not None)]
    followed = [each for each in rest if each.weight == CONSEQUENCE or _explains(first, each)]
    also = [each for each in rest if each not in followed and each.weight in (CAUSE, UNCLEAR)]
    return FirstCause(first, tuple(followed), tuple(also), attempt)


def _earlier(a: float | None, b: float | None) -> float | None:
    return min((each for each in (a, b) if each is not None), default=None)


def _explains(outside: Failure, failure: Failure) -> bool:
    """Return whether what the kernel or Slurm reports explains a failure: of this kind, on this node or this rank."""
    if failure.finding.signature.name not in _EXPLAINS.get(outside.finding.signature.name, ()):
        return False
    if outside.rank is not None:
        return outside.rank == failure.rank
    late = outside.time is not None and failure.time is not None and outside.time - 1 > failure.time
    if outside.finding.signature.name in _OF_JOB and late:
        return False  # srun cancels a step because a process failed
    return outside.host is None or failure.host is None or outside.host == failure.host
