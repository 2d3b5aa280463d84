"""How far a device is with what its host has queued."""

from __future__ import annotations

import time
from collections import deque
from typing import Final

import torch

from shoal.elastic.heartbeat import Heartbeat
from shoal.metrics.moment import Moment

_LOOK_SECONDS: Final = 0.0005  # between two looks at a device that is waited for: a step's numbers are not urgent


class DeviceProgress:
    """
    Keeps a worker's page true where the host runs ahead of its device.

    When a device hangs, all hosts come to wait at the same place, up to a step later. So while a host waits, its page says
    which phase its device has come to.
    """

    def __init__(self, device: torch.device, heartbeat: Heartbeat) -> None:
        self._runs_ahead, self._device, self._heartbeat = device.type == "cuda", device, heartbeat
        heartbeat.strict = heartbeat.strict or self._runs_ahead  # a host that waits for its device works too
        self._ahead: deque[tuple[Moment, tuple[int, int, str]]] = deque()  # beats that the device has not come to
        self._reached: tuple[int, int, str] | None = None  # the last one that it has

    def enter(self, phase: str) -> None:
        """Beat: what is queued from here on belongs to `phase`."""
        self._heartbeat.beat(phase)
        if self._runs_ahead:
            self._ahead.append((Moment(self._device), self._heartbeat.place))

    def leave(self, phase: str) -> None:
        """Do nothing: a worker's page says which phase it came to last."""

    def wait(self, moment: Moment) -> None:
        """Until it has come."""
        told = None
        while not moment.has_come():
            self._look()
            if self._reached is not None and self._reached is not told:
                self._heartbeat.device_reached(*self._reached)
                told = self._reached
            time.sleep(_LOOK_SECONDS)
        self._look()
        if told is not None:
            self._heartbeat.device_reached(*self._heartbeat.place)  # the host goes on

    def _look(self) -> None:
        while self._ahead and self._ahead[0][0].has_come():
            _, self._reached = self._ahead.popleft()
