"""The logs of one attempt to train, and of the job that it was part of. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from shoal.run.log_lines import ENDED, KERNEL, RUN, LogLine, read_stamp

MOST_BYTES: Final = 1 << 20  # read from the end of a log: a failure is there
HEAD_BYTES: Final = 1 << 10  # read from its beginning: the line about the process
_HEADER: Final = re.compile(r"rank (\d+) of (\d+) on (\S+), process (\d+)")
# An attempt's folder: the Slurm job and its restart, if any, the time of the start, and a number if that was taken.
_ATTEMPT: Final = re.compile(r"(?:(?P<job>\d+)-(?P<restart>\d+)-)?(?P<time>\d{8}T\d{6}Z)(?:-(?P<again>\d+))?")
# Put before a line by torch ("[rank3]: "), by `srun --label` ("3: "), and by shoal's launcher ("rank 3: ").
_PREFIX: Final = re.compile(r"(?:\s*\d+: )?(?:rank (?P<rank>\d+): )?(?:\[rank\d+\]: ?)?")


class Attempt(NamedTuple):
    """A start of the workers. job, restart: the Slurm job, and how often it had been requeued; None outside Slurm."""

    folder: Path
    job: str | None
    restart: int | None

    @property
    def name(self) -> str:
        """Return the name of its folder."""
        return self.folder.name


def attempts(logs: Path) -> list[Attempt]:
    """Return the attempts whose logs are in a run's folder of logs, oldest first."""
    found = []
    for folder in logs.iterdir() if logs.is_dir() else ():
        match = _ATTEMPT.fullmatch(folder.name)
        if match and folder.is_dir():
            restart = int(match["restart"]) if match["restart"] else None
            found.append((match["time"], int(match["again"] or 0), Attempt(folder, match["job"], restart)))
    return [attempt for _, _, attempt in sorted(found, key=lambda each: each[:2])]


class Entry(NamedTuple):
    """A line of a log, without the prefixes that launchers put before it. number: of the line, from 1; None if unknown."""

    number: int | None
    time: float | None
    mark: str
    text: str
    rank: int | None  # from a prefix


@dataclass(frozen=True)
class Log:
    """
    A log. Unknown values are None.

    rank, host, pid: the process that wrote it. entries: its last lines. ended: how the process ended, in the launcher's words.
    """

    path: Path
    rank: int | None
    host: str | None
    pid: int | None
    entries: tuple[Entry, ...]
    began: float | None = None
    ended: str | None = None
    ended_at: float | None = None

    @property
    def is_of_kernel(self) -> bool:
        """Return whether it has the kernel's lines of a node."""
        return self.path.name.startswith("kernel-")


def _first_line(file: BinaryIO) -> str:
    return file.read(HEAD_BYTES).decode("utf-8", "replace").partition("\n")[0]


def began_at(path: Path) -> float | None:
    """Return the time of a log's first line, in seconds since 1970; None if it has none or cannot be read."""
    try:
        with path.open("rb") as file:
            first = read_stamp(_first_line(file))
    except OSError:
        return None
    return first.time if first else None


def read_log(path: Path) -> Log:
    """Read the end of a log. A log that cannot be read is empty."""
    try:
        with path.open("rb") as file:
            head = _first_line(file)
            size = file.seek(0, 2)
            file.seek(max(0, size - MOST_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        head, text, size = "", "", 0
    lines = text.split("\n")
    whole = size <= MOST_BYTES
    if not whole:
        del lines[0]  # cut in the middle
    entries = tuple(_entries(lines, numbered=whole))
    header = _HEADER.search(head)
    named = re.fullmatch(r"rank-(\d+)", path.stem)
    first = read_stamp(head)
    ends = [each for each in entries if each.mark == RUN and each.text.startswith(ENDED)]
    return Log(
        path,
        rank=int(header[1]) if header else int(named[1]) if named else None,
        host=header[3] if header else path.stem.removeprefix("kernel-") if path.name.startswith("kernel-") else None,
        pid=int(header[4]) if header else None,
        entries=entries,
        began=first.time if first else None,
        ended=ends[-1].text.removeprefix(ENDED) if ends else None,
        ended_at=ends[-1].time if ends else None,
    )


def _entries(lines: list[str], *, numbered: bool) -> Iterator[Entry]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        stamped = read_stamp(line) or LogLine(None, "", line)
        prefix = _PREFIX.match(stamped.text)
        assert prefix is not None  # it matches also nothing
        text = stamped.text if stamped.mark in (RUN, KERNEL) else stamped.text[prefix.end() :]
        rank = int(prefix["rank"]) if prefix["rank"] else None
        yield Entry(number if numbered else None, stamped.time, stamped.mark, text.rstrip("\r"), rank)


def job_logs(jobs: Path, job: str, restart: int | None) -> list[Path]:
    """
    Return the logs of a Slurm job in a run's folder of jobs: what its batch script and its launchers printed.

    restart: how often the job had been requeued; None for all. A log that all restarts of a job share is always included.
    """
    found = []
    for path in sorted(jobs.iterdir()) if jobs.is_dir() else ():
        match = re.fullmatch(r"(\d+)(?:_\d+)?(?:-(\d+))?(?:\..*)?", path.name)
        if match is None or match[1] != job or (match[2] and restart is not None and int(match[2]) != restart):
            continue
        found += [each for each in sorted(path.rglob("*")) if each.is_file()] if path.is_dir() else [path]
    return found
