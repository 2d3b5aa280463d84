"""The run's own records: `metrics.jsonl`, a line a step, and `events.jsonl`, a line an event."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from shoal.run.jsonl import PatientLines, whole_lines
from shoal.system.disk import write_whole


class Events(PatientLines):
    """Starts, saves, faults and stops, with the time of day."""

    def say(self, event: str, **facts: Any) -> None:
        self.add({"time": round(time.time(), 3), "event": event, **facts})


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that are whole; none where there is no file."""
    return list(whole_lines(path)) if path.is_file() else []


def forget_after(path: Path, step: int, *, evaluation: bool = False) -> int:
    """
    Take the lines of steps after `step` out of a metrics file, as a resume will make them anew; how many. evaluation: that
    after `step` as well.
    """
    records = read_json_lines(path)
    kept = [r for r in records if r["step"] < step or (r["step"] == step and not (evaluation and "val_loss" in r))]
    if not path.is_file():
        return 0
    write_whole(path, (f"{json.dumps(r)}\n".encode() for r in kept))
    return len(records) - len(kept)
