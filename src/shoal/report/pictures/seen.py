"""A run as pictures need it: its config, its curves by several x axes, its events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from shoal.config.options import Config
from shoal.errors import RunError
from shoal.plan.estimate import flops_per_token, why_no_flops
from shoal.report.curves.curves import Curves, Window
from shoal.run.events import read_json_lines
from shoal.run.folder import RunFolder

Floats = NDArray[np.float64]
XAxis = Literal["step", "tokens", "flops", "seconds"]

# Events that a curve shows, by their name in events.jsonl: (words, marker)
MARKED: Final = {
    "started": ("restart", "v"),
    "went back": ("rollback", "D"),
    "overflowed": ("skipped step", "x"),
    "quarantined": ("quarantined data", "s"),
    "straggler": ("slow rank", "P"),
    "alert": ("alert", "*"),
}


UNITS_OF_TIME: Final = (("days", 86_400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
COUNTS: Final = ((" (trillions)", 1e12), (" (billions)", 1e9), (" (millions)", 1e6), (" (thousands)", 1e3), ("", 1.0))
FLOPS: Final = (
    ("YFLOP, 10²⁴", 1e24), ("ZFLOP, 10²¹", 1e21), ("EFLOP, 10¹⁸", 1e18), ("PFLOP, 10¹⁵", 1e15), ("TFLOP, 10¹²", 1e12),
    ("GFLOP, 10⁹", 1e9), ("FLOP", 1.0),
)  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """The unit of an x axis: its name, and what one unit is in steps, tokens, FLOP or seconds."""

    label: str
    unit: float = 1.0


@dataclass(frozen=True)
class Seen:
    """A run with at least one step."""

    name: str
    folder: RunFolder
    config: Config
    curves: Curves
    events: Sequence[Mapping[str, Any]]

    @classmethod
    def read(cls, folder: RunFolder) -> Seen:
        """Read a run. Raises `RunError` if there is no run, or it has no step yet."""
        config = folder.load_config()
        curves = Curves.open(folder.path)
        if "loss" not in curves.names():
            raise RunError(f"{folder.path} has no step yet: nothing to draw")
        return cls(folder.path.resolve().name, folder, config, curves, read_json_lines(folder.events_file))

    def window(self, name: str, columns: int) -> Window | None:
        """Return all of a curve in at most `columns` buckets; None if the run has no such curve."""
        return self.curves.window(name, columns=columns) if name in self.curves.names() else None

    def x(self, window: Window, axis: XAxis) -> Floats:
        """Return where a window's buckets stand on an x axis. Raises `RunError` if the model's FLOP are unknown."""
        match axis:
            case "step":
                return np.asarray(window.step, float)
            case "tokens":
                return np.asarray(window.tokens, float)
            case "seconds":
                return np.asarray(window.seconds, float)
            case "flops":
                return np.asarray(window.tokens, float) * self._flops_per_token()

    def _flops_per_token(self) -> int:
        if (known := self.started.get("flops_per_token")) is not None:
            return int(known)
        if why := why_no_flops(self.config.model, self.config.data.seq_len):
            raise RunError(f"{self.name} has no FLOP axis: {why}; use --x tokens")
        return flops_per_token(self.config.model, self.config.data.seq_len)

    def marks(self) -> Mapping[str, Sequence[float]]:
        """Return the steps of the events that a curve shows, by their name in `MARKED`; the first start is none."""
        found: dict[str, list[float]] = {}
        for event in self.events:
            step, name = event.get("step"), event.get("event")
            if name in MARKED and step is not None and not (name == "started" and step == 0):
                found.setdefault(name, []).append(step)
        return found

    @property
    def started(self) -> Mapping[str, Any]:
        """Return the last `started` event; empty if there is none."""
        return next((e for e in reversed(self.events) if e.get("event") == "started"), {})


def scale_of(axis: XAxis, largest: float) -> Scale:
    """Return the unit in which an x axis up to `largest` is easy to read."""
    if axis == "step":
        return Scale("step")
    if axis == "seconds":
        name, unit = next(each for each in UNITS_OF_TIME if largest >= 3 * each[1] or each[1] == 1)
        return Scale(f"time in steps ({name})", unit)
    words, unit = next(each for each in (FLOPS if axis == "flops" else COUNTS) if largest >= each[1] or each[1] == 1)
    return Scale(f"computation ({words})" if axis == "flops" else f"tokens trained on{words}", unit)


def read_runs(targets: Sequence[str], runs: Path) -> list[Seen]:
    """Read the runs that a user names. Raises `RunError` for one that is not a run or has no step."""
    return [Seen.read(RunFolder.named(target, runs)) for target in targets]
