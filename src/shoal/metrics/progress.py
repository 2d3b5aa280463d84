"""The progress of a device through the work that its host queued."""

from __future__ import annotations

import time
from collections import deque
from typing import Final

import torch

from shoal.elastic.heartbeat import Heartbeat
from shoal.metrics.moment import Moment

_LOOK_SECONDS: Final = 0.0005  # between polls of the device: a step's numbers are not urgent


class DeviceProgress:
    """
    Keeps a worker's heartbeat page accurate while the host runs ahead of its device.

    When a device hangs, all hosts end up waiting at the same place, up to a step later. So while a host waits, its page
    shows the phase its device has reached.
    """

    def __init__(self, device: torch.device, heartbeat: Heartbeat) -> None:
        self._runs_ahead, self._device, self._heartbeat = device.type == "cuda", device, heartbeat
        heartbeat.strict = heartbeat.strict or self._runs_ahead  # a host that waits for its device looks busy
        self._ahead: deque[tuple[Moment, tuple[int, int, str]]] = deque()  # beats that the device has not reached
        self._reached: tuple[int, int, str] | None = None  # the last beat that the device has reached

    def enter(self, phase: str) -> None:
        """Send a heartbeat; work queued from here on belongs to `phase`."""
        self._heartbeat.beat(phase)
        if self._runs_ahead:
            self._ahead.append((Moment(self._device), self._heartbeat.place))

    def leave(self, phase: str) -> None:
        """Do nothing: a page keeps the phase reached last."""

    def wait(self, moment: Moment) -> None:
        """Wait for `moment`, and show the device's phase meanwhile."""
        told = None
        while not moment.has_come():
            self._look()
            if self._reached is not None and self._reached is not told:
                self._heartbeat.device_reached(*self._reached)
                told = self._reached
            time.sleep(_LOOK_SECONDS)
        self._look()
        if told is not None:
            self._heartbeat.device_reached(*self._heartbeat.place)  # the host continues

    def _look(self) -> None:
        """Drop the beats that the device has reached."""
        while self._ahead and self._ahead[0][0].has_come():
            _, self._reached = self._ahead.popleft()
