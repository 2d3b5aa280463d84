"""The interface of a tracker. A new tracker is one file with a class, and two lines in `choice.py`. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from shoal.config.track_options import Track
from shoal.trackers.points import About, Batch


@dataclass(frozen=True)
class Opened:
    """A tracker run that takes records."""

    where: str  # for people: its URL, or its folder and how to look at it
    state: Mapping[str, Any]  # what the next start needs to continue the same tracker run
    exists: bool = True  # whether the tracker run is there even if this process crashes now


class Tracker(ABC):
    """
    One tracker's library, behind four calls. Each may raise anything and may take long: no training step waits for it.

    Made with: track, its options; folder, its own folder within the run's.
    """

    rewinds: ClassVar[bool] = False  # whether it takes steps again, in place of those that it has

    def __init__(self, track: Track, folder: Path) -> None:
        self.track, self.folder = track, folder
        self.complaint = ""  # what the tracker cannot take, beside the numbers

    @property
    def destination(self) -> str:
        """Return where tracker runs are, without a secret. With another one than before, the whole run is sent to a new run there."""
        return ""

    @abstractmethod
    def open(self, about: About, state: Mapping[str, Any]) -> Opened:
        """Start a tracker run, or continue the one of `state`: what the last `open` returned; empty for a new one."""

    @abstractmethod
    def write(self, batch: Batch) -> None:
        """Send a batch. A batch that raised is sent again."""

    def is_safe(self) -> bool:
        """Return whether all that was written survives a crash of this process; if not, it is sent again after one."""
        return True

    @abstractmethod
    def close(self) -> None:
        """Finish the tracker run: wait until everything has arrived."""
