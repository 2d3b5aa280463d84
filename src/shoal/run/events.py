"""The run's events: `events.jsonl`, one line per event."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from shoal.run.jsonl import PatientLines, whole_lines


class Events(PatientLines):
    """Starts, saves, faults and stops, with the time of day."""

    def say(self, event: str, **facts: Any) -> None:
        """Add a line for `event`, with the time."""
        self.add({"time": round(time.time(), 3), "event": event, **facts})


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a file; none if there is no file."""
    return list(whole_lines(path)) if path.is_file() else []
