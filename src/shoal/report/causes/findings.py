"""What a log says about a failure: the lines that the table recognizes, and Python's tracebacks. No torch."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from shoal.report.causes.logs import Entry, Log
from shoal.report.causes.signatures import XIDS, XIDS_THAT_FOLLOW, Kind, Signature, recognize
from shoal.report.causes.table import ENDS, EXCEPTION, OUTSIDE, REPORTED, TABLE
from shoal.run.log_lines import ENDED, ERR, OUT, RUN
from shoal.run.log_lines import REPORTED as REPORTED_BEGINS

TAIL_SECONDS: Final = 120.0  # before the last line of a process: an earlier error did not end it
LONGEST: Final = 300  # characters of a line that are kept
_TRACEBACK: Final = "Traceback (most recent call last):"
_FRAME: Final = re.compile(r'\s+File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>\S+)')
_EXCEPTION: Final = re.compile(r"(?P<type>[A-Za-z_][\w.]*)(?:: (?P<text>.*))?$")
# Lines of progress and notes, in which words such as "disk full" tell what a run has survived.
_HARMLESS: Final = re.compile(r"note: |preparing: |step +\d+/\d+ |.*; (?:the save is retried|training continues)")


@dataclass(frozen=True)
class Finding:
    """
    A failure that a log tells of.

    what: completes "rank 3 on node1 ...". line: the log's own words. number: of the line, from 1; None if unknown. frame: where
    a Python exception was raised. groups: the named parts of the line.
    """

    signature: Signature
    what: str
    line: str
    path: Path
    number: int | None
    time: float | None
    rank: int | None = None
    frame: str = ""
    kind: Kind = "cause"
    groups: dict[str, str] = field(default_factory=dict)


def find(log: Log) -> list[Finding]:
    """Return what a log tells, in its order. A process's output counts only near its end, the kernel's lines always."""
    last = max((e.time for e in log.entries if e.time is not None and e.mark in (OUT, ERR)), default=None)
    found = []
    for each in _findings(log):
        early = last is not None and each.time is not None and each.time < last - TAIL_SECONDS
        if log.is_of_kernel or not early:
            found.append(each)
    return found


def find_outside(log: Log) -> list[Finding]:
    """Return what Slurm and the shell tell in a log that also has the output of ranks, which have logs of their own."""
    return [
        each
        for entry in log.entries
        if entry.rank is None and (known := recognize(entry.text, OUTSIDE)) and (each := _finding(log, entry, *known))
    ]


def _findings(log: Log) -> Iterator[Finding]:
    frames: list[str] | None = None  # of the traceback that we are in
    for entry in log.entries:
        text = entry.text
        if entry.mark == RUN:
            yield from _of_launcher(log, entry)
        elif text.startswith(_TRACEBACK):
            frames = []
        elif frames is not None and text.startswith((" ", "\t")):
            if found := _FRAME.match(text):
                frames.append(f"{found['file']}:{found['line']} in {found['name']}")
        elif frames is not None and (exception := _EXCEPTION.match(text)):
            yield _exception(log, entry, exception, frames)
            frames = None
        elif not _HARMLESS.match(text) and (known := recognize(text, TABLE)):
            yield _finding(log, entry, *known)
        elif text.startswith("shoal: ") and entry.mark == "":
            yield _plain(log, entry, REPORTED, text.removeprefix("shoal: "))


def _of_launcher(log: Log, entry: Entry) -> Iterator[Finding]:
    """Yield what the launcher wrote: how the process ended, or the message that it left."""
    if entry.text.startswith(REPORTED_BEGINS):
        text = entry.text.removeprefix(REPORTED_BEGINS)
        known = recognize(text, TABLE)
        yield _finding(log, entry, *known) if known else _plain(log, entry, REPORTED, text)
    elif entry.text.startswith(ENDED) and (known := recognize(entry.text, TABLE)):
        yield _finding(log, entry, *known)


def _exception(log: Log, entry: Entry, found: re.Match[str], frames: Sequence[str]) -> Finding:
    """Return the finding of a traceback's last line."""
    frame = frames[-1] if frames else ""
    known = recognize(entry.text, [each for each in TABLE if each not in ENDS])
    if known:
        return _finding(log, entry, *known, frame=frame)
    return _plain(log, entry, EXCEPTION, entry.text, frame=frame)


def _plain(log: Log, entry: Entry, of: Signature, text: str, frame: str = "") -> Finding:
    """Return a finding whose sentence is a line of the log."""
    what = of.what.format(text=text[:LONGEST])
    return Finding(of, what, entry.text[:LONGEST], log.path, entry.number, entry.time, entry.rank, frame, of.kind)


def _finding(log: Log, entry: Entry, of: Signature, found: re.Match[str], frame: str = "") -> Finding:
    groups = {name: value for name, value in found.groupdict().items() if value}
    what, kind = of.sentence(found), of.kind
    if "xid" in groups:
        number = int(groups["xid"])
        what += f": {XIDS[number]}" if number in XIDS and of.name == "gpu error" else ""
        kind = "follows" if number in XIDS_THAT_FOLLOW else kind
    when = entry.time if entry.time is not None else _slurm_time(groups.get("at", ""))
    return Finding(of, what, entry.text[:LONGEST], log.path, entry.number, when, entry.rank, frame, kind, groups)


def _slurm_time(text: str) -> float | None:
    """Return a time that Slurm printed, as "2026-11-29T10:15:00", in the local time of this machine; None for other text."""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except (ValueError, OverflowError):
        return None
