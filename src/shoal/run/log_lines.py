"""
The format of a rank's log: each line begins with its time, in UTC, and a mark for its origin. No torch.

    2026-11-29T10:15:00.123Z run rank 3 of 8 on node1, process 4711, job 42, restart 0
    2026-11-29T10:15:07.450Z out what the process printed to standard output
    2026-11-29T10:15:09.002Z err what it printed to standard error
    2026-11-29T10:15:09.310Z run ended: was killed by SIGKILL

"run" marks the lines of shoal's launcher, and "krn" those of the node's kernel, which are in a file of their own.
"""

from __future__ import annotations

import calendar
import re
import time
from typing import Final, NamedTuple

OUT: Final = "out"
ERR: Final = "err"
RUN: Final = "run"
KERNEL: Final = "krn"

ENDED: Final = "ended: "  # begins the launcher's last line about a process; how it ended follows
REPORTED: Final = "reported: "  # begins a line with the message that the process left for the launcher to print
STOPPED: Final = "stopped by the launcher"  # because another process failed or hung, or this one hung

_STAMP: Final = re.compile(r"(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d):(\d\d)(?:\.(\d{1,6}))?Z (out|err|run|krn) ?")


class LogLine(NamedTuple):
    """A line of a log: its time in seconds since 1970, its mark, and its text. Time None: a log without times."""

    time: float | None
    mark: str
    text: str


def stamp(seconds: float, mark: str) -> str:
    """Return the beginning of a line: the time `seconds` after 1970, to the millisecond, and the mark."""
    whole, milliseconds = divmod(int(seconds * 1000), 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{milliseconds:03d}Z {mark} "


def read_stamp(line: str) -> LogLine | None:
    """Return a line that `stamp` began; None if the line has another format."""
    found = _STAMP.match(line)
    if found is None:
        return None
    *date, fraction, mark = found.groups()
    try:
        seconds = calendar.timegm(tuple(map(int, date)))
    except ValueError:  # a month that does not exist
        return None
    return LogLine(seconds + (float(f"0.{fraction}") if fraction else 0.0), mark, line[found.end() :])
