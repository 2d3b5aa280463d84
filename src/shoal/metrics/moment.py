"""Points in time that the host and a device agree on."""

from __future__ import annotations

import time

import torch


class Moment:
    """When a device is done with all that was queued on it so far; on a CPU, now. Nothing waits for it to be made."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record()
        self._seconds = time.perf_counter()

    def has_come(self) -> bool:
        """Does not wait."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Until it has come."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: Moment) -> float:
        """From `earlier` to this one, on the device's own clock. Both must have come."""
        if self._event is None or earlier._event is None:
            return self._seconds - earlier._seconds
        return float(earlier._event.elapsed_time(self._event)) / 1000
