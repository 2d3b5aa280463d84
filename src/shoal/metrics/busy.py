"""
How long this process is busy in each phase of a step, without the time it waits for other processes.

A step takes equally long on all processes, since fast ones wait for the slowest: only busy time tells them apart.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
import torch.distributed as dist

from shoal.run.phases import PHASES

PARTS: Final = (*PHASES, "between")
"""The parts of a step; `between`: everything else on the host until the next step, including a save's stall."""


class Waits:
    """
    Seconds that this process waited for other processes.

    On a CPU a process waits only in torch's `Work.wait`, for shoal's own collectives and those of FSDP2 and
    pipelines: that call is timed. On CUDA `Work.wait` returns at once, and a stream waits instead.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tell: Callable[[bool], None] = lambda waits: None
        """Called with True when a wait begins, with False when it ends."""
        self._wait: Callable[..., Any] | None = None

    def watch(self) -> None:
        """Time torch's `Work.wait`, until `close`."""
        wait = self._wait = dist.Work.wait

        def timed(work: dist.Work, *args: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            self.tell(True)
            try:
                return wait(work, *args, **options)
            finally:
                self.tell(False)
                self.seconds += time.perf_counter() - begun

        dist.Work.wait = timed  # type: ignore[method-assign, assignment]

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        """Count the time inside as waiting, for other processes or for the device; count nested waits once."""
        begun, before = time.perf_counter(), self.seconds
        try:
            yield
        finally:
            self.seconds = before + time.perf_counter() - begun

    def close(self) -> None:
        """Restore `Work.wait`. May be called twice."""
        if self._wait is not None:
            dist.Work.wait, self._wait = self._wait, None  # type: ignore[method-assign]


class Busy:
    """
    This process's seconds in each of `PARTS`, step by step: `begin`, then `enter` and `leave` for each phase.

    On CUDA forward, backward and optimizer are timed on the device, by events that are read long after they occurred; the
    first forward and backward of a step stand for all of them.
    """

    def __init__(self, device: torch.device, turns: int, *, measures: bool = True, waits: bool = False) -> None:
        """
        Start measuring.

        turns: number of forwards of this process in a step. measures: whether to measure every step, not only those that
        are kept. waits: whether to time waits for other processes in any case; `measures` implies it.
        """
        self.waits = Waits()
        self._cuda, self._turns, self._always = device.type == "cuda", turns, measures
        if (measures or waits) and not self._cuda:
            self.waits.watch()
        self._measures = False  # whether the step now is measured
        self._kept: dict[int, dict[str, float]] = {}
        self._entered: dict[str, tuple[float, float]] = {}  # by phase: seconds waited before it, start time
        self._ends: dict[str, torch.cuda.Event] = {}  # by phase: recorded when it ends
        self._begun: float | None = None
        self._waited = 0.0
        self._interrupted = False
        self._steps: list[_Step] = []  # steps that are over on the host, perhaps not on the device
        self._now = _Step()

    def begin(self, keep: int | None = None) -> None:
        """Begin a step, which ends the previous one. keep: the step's number, if `take` is to return its times later."""
        if not self._always and not self._measures and keep is None:
            return
        now = time.perf_counter()
        if self._measures and self._begun is not None:
            passed = now - self._begun - (self.waits.seconds - self._waited)
            if not self._interrupted:
                self._now.host["between"] = max(0.0, passed - sum(self._now.host.values()))
            self._steps.append(self._now)
        self._measures = self._always or keep is not None
        self._begun, self._waited, self._interrupted, self._now = now, self.waits.seconds, False, _Step(keep)

    def enter(self, phase: str) -> None:
        """Start timing `phase`."""
        if not self._measures:
            return
        device = self._now.device
        if self._cuda and phase in ("forward", "backward", "optimizer") and phase not in device:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            device[phase] = start, end
            start.record()
            self._ends[phase] = end
        self._entered[phase] = self.waits.seconds, time.perf_counter()

    def leave(self, phase: str) -> None:
        """Add the time since `enter`, without waits."""
        if not self._measures:
            return
        waited, begun = self._entered[phase]
        own = time.perf_counter() - begun - (self.waits.seconds - waited)
        host = self._now.host
        host[phase] = host.get(phase, 0.0) + own
        if self._ends and (end := self._ends.pop(phase, None)) is not None:
            end.record()

    def interrupt(self) -> None:
        """Mark `between` as unknown: something other than training happens before the next step."""
        self._interrupted = True

    def seconds(self) -> dict[str, float]:
        """Return seconds by part of the newest finished step not returned before; empty if there is none."""
        found: dict[str, float] = {}
        while self._steps and self._steps[0].is_over():
            step = self._steps.pop(0)
            found = step.host | {n: start.elapsed_time(end) / 1000 for n, (start, end) in step.device.items()}
            for name in ("forward", "backward") if self._cuda else ():
                found[name] = found.get(name, 0.0) * self._turns
            if step.keep is not None:
                self._kept[step.keep] = found
        return found

    def take(self, step: int) -> dict[str, float]:
        """Return seconds by part of a step that was kept; empty if it is not over, was taken before or was not measured."""
        self.seconds()
        return self._kept.pop(step, {})

    def close(self) -> None:
        """Stop measuring. May be called twice."""
        self.waits.close()


class _Step:
    __slots__ = ("device", "host", "keep")

    def __init__(self, keep: int | None = None) -> None:
        self.keep = keep
        self.host: dict[str, float] = {}
        self.device: dict[str, tuple[torch.cuda.Event, torch.cuda.Event]] = {}

    def is_over(self) -> bool:
        """Return whether the step is over on the device too, without waiting."""
        return all(end.query() for _, end in self.device.values())  # type: ignore[no-untyped-call]
