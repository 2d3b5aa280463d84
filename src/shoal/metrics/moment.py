"""Points in time on a device, without waiting for it."""

from __future__ import annotations

import time

import torch


class Moment:
    """The time at which a device finishes all work queued so far; on a CPU, now. Creating a moment does not wait."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record()
        self._seconds = time.perf_counter()

    def has_come(self) -> bool:
        """Return whether the moment has come, without waiting."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Wait until the moment has come."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: Moment) -> float:
        """Return the seconds from `earlier` to this moment, on the device's clock. Both must have come."""
        if self._event is None or earlier._event is None:
            return self._seconds - earlier._seconds
        return float(earlier._event.elapsed_time(self._event)) / 1000
