"""A run's folder with logs that a test writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shoal.report.causes.cause import first_cause
from shoal.report.causes.failure import FirstCause
from shoal.run.events import Events
from shoal.run.folder import RunFolder
from shoal.run.log_lines import ENDED, KERNEL, RUN, stamp

BEGAN = 1_790_000_000.0  # seconds since 1970
LOST = "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:3021"
KILL = ENDED + "was killed by SIGKILL"


class Made:
    """A run's folder with logs that a test writes. Times are seconds since the attempt began."""

    def __init__(self, path: Path) -> None:
        self.folder = RunFolder(path)
        self.folder.path.mkdir()

    def rank(
        self, rank: int, host: str, *lines: tuple[float, str, str], attempt: str = "20260921T140000Z", began: float = 0
    ) -> None:
        """Write a rank's log, with the line about its process first. Each line: (time, mark, text)."""
        logs = self.folder.logs / attempt
        logs.mkdir(parents=True, exist_ok=True)
        first = (began, RUN, f"rank {rank} of 4 on {host}, process {100 + rank}")
        text = "".join(f"{stamp(BEGAN + at, mark)}{words}\n" for at, mark, words in (first, *lines))
        (logs / f"rank-{rank}.log").write_text(text, encoding="utf-8")

    def kernel(self, host: str, *lines: tuple[float, str], attempt: str = "20260921T140000Z") -> None:
        """Write the kernel's lines of a node."""
        text = "".join(f"{stamp(BEGAN + at, KERNEL)}{words}\n" for at, words in lines)
        (self.folder.logs / attempt / f"kernel-{host}.log").write_text(text, encoding="utf-8")

    def job(self, name: str, *lines: str) -> Path:
        """Write a log that a job's batch script printed, and return its path."""
        path = self.folder.path / "jobs" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    def event(self, event: str, **facts: Any) -> None:
        """Record an event of the run now."""
        events = Events(self.folder.events_file)
        events.say(event, **facts)
        events.close()

    def cause(self, logs: Path | None = None) -> FirstCause:
        found = first_cause(self.folder, logs)
        assert found is not None
        return found
