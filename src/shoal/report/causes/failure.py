"""A failure, and the first cause among many: facts, and their text. No torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from shoal.report.causes.findings import Finding

SHOWN: Final = 4  # failures of a kind that are listed, one line each
CAUSE, UNCLEAR, POSSIBLE, CONSEQUENCE = range(4)  # how likely a failure is the first cause; smaller is likelier


@dataclass(frozen=True)
class Failure:
    """
    A failure of a process, a node or a job. Unknown values are None.

    weight: `CAUSE` to `CONSEQUENCE`. where: the phase and step, as "in forward of step 7", or "".
    """

    finding: Finding
    weight: int
    rank: int | None = None
    host: str | None = None
    time: float | None = None
    where: str = ""

    @property
    def who(self) -> str:
        """Name the process or the node."""
        if self.rank is not None:
            return f"rank {self.rank}" + (f" on {self.host}" if self.host else "")
        return f"node {self.host}" if self.host else "the job"

    def __str__(self) -> str:
        return f"{self.who} {self.finding.what}" + (f", {self.where}" if self.where else "")

    def as_json(self) -> dict[str, Any]:
        """Return the facts as JSON values; the time is in seconds since 1970."""
        found = self.finding
        return {
            "rank": self.rank, "host": self.host, "time": self.time, "kind": found.signature.name, "what": found.what,
            "where": self.where, "line": found.line, "log": str(found.path), "number": found.number, "frame": found.frame,
        }  # fmt: skip


@dataclass(frozen=True)
class FirstCause:
    """
    Why a job failed. followed: consequences. also: other failures that nothing explains, later ones first among them.

    attempt: the name of its folder of logs, or "". stopped: how many other processes the launchers then stopped. same_before: how
    many attempts of this job before it failed the same way.
    """

    first: Failure
    followed: tuple[Failure, ...]
    also: tuple[Failure, ...]
    attempt: str
    stopped: int = 0
    same_before: int = 0

    def lines(self) -> list[str]:
        """Return the cause, its evidence, advice, and what followed, one line each."""
        first = self.first
        lines = [f"first cause: {first}" + (f" ({_clock(first.time)})" if first.time is not None else "")]
        lines += [f"  {_place(first.finding)}"]
        lines += [f"  raised at {first.finding.frame}"] if first.finding.frame else []
        lines += [f"  what helps: {first.finding.signature.helps}"] if first.finding.signature.helps else []
        if self.same_before:
            lines.append(f"  the attempts of this job before it failed the same way: {self.same_before}")
        same = [each for each in self.also if each.finding.what == first.finding.what]
        if same:
            lines.append(f"also failed: {len(same)} other{'s' * (len(same) > 1)} in the same way")
        lines += _listed("also failed", [each for each in self.also if each not in same], first.time)
        lines += _listed("followed", self.followed, first.time)
        if self.stopped:
            lines.append(
                f"followed: the launchers stopped {self.stopped} process{'es' * (self.stopped > 1)} that had not failed"
            )
        return lines

    def as_json(self) -> dict[str, Any]:
        """Return all facts as JSON values."""
        return {
            "first": self.first.as_json(),
            "helps": self.first.finding.signature.helps,
            "also": [each.as_json() for each in self.also],
            "followed": [each.as_json() for each in self.followed],
            "attempt": self.attempt,
            "stopped": self.stopped,
            "same_before": self.same_before,
        }


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _place(finding: Finding) -> str:
    number = f":{finding.number}" if finding.number is not None else ""
    return f"{finding.path}{number}: {finding.line}"


def _listed(title: str, failures: Sequence[Failure], since: float | None) -> list[str]:
    """Return a line for each of the first `SHOWN` failures, and one that counts the others."""
    lines = []
    for each in failures[:SHOWN]:
        later = each.time - since if each.time is not None and since is not None else None
        lines.append(f"{title}: {each}" + (f", {later:.1f} s later" if later is not None and later >= 0 else ""))
    if len(failures) > SHOWN:
        lines.append(f"{title}: {len(failures) - SHOWN} more")
    return lines
